"""The closed-form schedule as each worker of a GPU kernel computes it for itself: no launch, no list, no host.

kernels/schedule.py and kernels/row_tiles.py say the same in Python and are what this is held against. A worker needs

1. the length of the line: the cost of every tile of rows, summed by blocks of them (the heads only multiply),
2. the last item that begins at or before its own interval: the same sum, up to there,
3. from there on, item by item: which units of it lie in the interval (`cut` at both ends), and where an item is cut,
   which intervals have the others (`pieces`), for the slots of their results and for who comes last and merges.

An item is a tile of rows and a KV head, heads fastest. `batch` is (query_starts, key_lens, num_requests, num_tokens,
most_keys, left, right, halvings), `setup` anything with the fields of `ScheduleSetup`. The line has 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.launch import on_device_of

LINE_BLOCK = tl.constexpr(256)  # tiles of rows summed at once


@dataclass(frozen=True)
class ScheduleSetup:
    """How rows become tiles (row_tiles.py), and what work costs (schedule.py)."""

    group: int
    rows: int
    unit_keys: int
    top_left: bool
    weight: int
    overhead: int
    merge_cost: int
    snap: int
    least: int


@triton.jit
def clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def request_of(tile, batch, setup: tl.constexpr):
    """Whose the tile is: the last request whose first tile is not behind it, by halving."""
    starts, _, num_requests, num_tokens, _, _, _, halvings = batch
    low = tile * 0
    high = low + num_requests - 1
    for _ in range(halvings):
        middle = (low + high + 1) // 2
        first = clamped(tl.load(starts + middle), 0, num_tokens) * setup.group // setup.rows + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle - 1)
    return low


@triton.jit
def extent_of(tile, batch, setup: tl.constexpr):
    """Of a tile or a block of them: its request, that one's first token, tokens and keys; its first row; the keys
    [begin, end) its rows may see; the first unit and the number of units that hold them."""
    starts, lens, _, num_tokens, most_keys, left, right, _ = batch
    request = request_of(tile, batch, setup)
    token = clamped(tl.load(starts + request), 0, num_tokens)
    tokens = tl.maximum(clamped(tl.load(starts + request + 1), 0, num_tokens) - token, 0)
    keys = clamped(tl.load(lens + request), 0, most_keys)
    # Below 0 only where starts fall, which they must not; then whatever is computed lies within the arrays.
    first_row = tl.maximum((tile - (token * setup.group // setup.rows + request)) * setup.rows, 0)
    last_row = tl.minimum(first_row + setup.rows, tokens * setup.group) - 1
    own = keys * 0 if setup.top_left else keys - tokens
    begin = tl.where(left < 0, 0, tl.maximum(own + first_row // setup.group - left, 0))
    end = tl.where(right < 0, keys, tl.minimum(own + last_row // setup.group + right + 1, keys))
    first_unit = begin // setup.unit_keys
    units = tl.where(end > begin, (end + setup.unit_keys - 1) // setup.unit_keys - first_unit, 0)
    return request, token, tokens, keys, first_row, begin, end, first_unit, units


@triton.jit
def costs_of(tiles, num_tiles, batch, setup: tl.constexpr):
    """What each tile takes of the line, int64; 0 where it has no rows."""
    _, _, tokens, _, first_row, _, _, _, units = extent_of(tl.minimum(tiles, num_tiles - 1), batch, setup)
    live = (tiles < num_tiles) & (first_row < tokens * setup.group)
    return tl.where(live, setup.overhead + units.to(tl.int64) * setup.weight, 0)


@triton.jit
def line_length(num_tiles, kv_heads, batch, setup: tl.constexpr):
    """Of all items together."""
    total = tl.full((), 0, tl.int64)
    for base in range(0, num_tiles, LINE_BLOCK):
        total += tl.sum(costs_of(base + tl.arange(0, LINE_BLOCK), num_tiles, batch, setup))
    return total * kv_heads


@triton.jit
def item_at(x, num_tiles, kv_heads, batch, setup: tl.constexpr):
    """The last item that begins at or before x, which must be on the line: its tile, its head, where it begins."""
    tile = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int64)
    cost = tl.full((), 1, tl.int64)
    before = tl.full((), 0, tl.int64)
    for base in range(0, num_tiles, LINE_BLOCK):
        tiles = base + tl.arange(0, LINE_BLOCK)
        costs = costs_of(tiles, num_tiles, batch, setup)
        starts = before + tl.cumsum(costs) - costs
        here = (costs > 0) & (starts * kv_heads <= x)
        found = tl.max(tl.where(here, tiles, -1))
        if found >= 0:
            tile = found
            start = tl.max(tl.where(here, starts, 0))
            cost = tl.sum(tl.where(tiles == found, costs, 0))
        before += tl.sum(costs)
    head = (x - start * kv_heads) // cost
    return tile, head.to(tl.int32), start * kv_heads + head * cost


@triton.jit
def step_of(total, num_workers, setup: tl.constexpr):
    """How much of the line lies between two boundaries."""
    shared = tl.maximum(total - setup.overhead - 2 * setup.merge_cost, 0)
    return tl.maximum((shared + num_workers - 1) // num_workers, setup.least)


@triton.jit
def border(worker, num_workers, total, step, setup: tl.constexpr):
    """Where on the line that worker's interval begins."""
    inner = tl.minimum(setup.overhead + setup.merge_cost + worker * step, total)
    return tl.where(worker <= 0, 0, tl.where(worker >= num_workers, total, inner))


@triton.jit
def cut(x, start, units, setup: tl.constexpr):
    """Before which unit a boundary at x cuts the item that begins at `start`: 0 all of it is behind, `units` before."""
    inside = tl.maximum(x - start - setup.overhead, 0)
    unit = tl.minimum((inside + setup.weight // 2) // setup.weight, units)
    rest = units - unit
    begin = tl.where(unit * setup.weight < setup.snap, 0, unit)
    end = tl.where(rest * setup.weight < setup.snap, units, unit)
    inner = tl.where(unit <= rest, begin, end)
    return tl.where(x >= start + setup.overhead + units * setup.weight, units, inner).to(tl.int32)


@triton.jit
def pieces(start, units, num_workers, total, step, setup: tl.constexpr):
    """Of an item that is cut: the interval its first piece lies in, and how many pieces there are, one an interval."""
    lead = setup.overhead + setup.merge_cost
    first = tl.maximum((start - lead) // step, 1)
    while cut(border(first, num_workers, total, step, setup), start, units, setup) <= 0:
        first += 1
    end = start + setup.overhead + units * setup.weight
    last = clamped((end - lead) // step + 1, 1, num_workers - 1)
    while cut(border(last, num_workers, total, step, setup), start, units, setup) >= units:
        last -= 1
    return (first - 1).to(tl.int32), (last - first + 2).to(tl.int32)


@triton.jit
def write_intervals(
    found,
    query_starts,
    key_lens,
    num_requests,
    num_tokens,
    most_keys,
    left,
    right,
    halvings,
    num_tiles,
    kv_heads,
    num_workers,
    most,
    setup: tl.constexpr,
):
    """What each worker has, to be looked at: of every segment in its turn tile, head, first unit, end, the interval of
    the item's first piece and the number of pieces (0 where it is whole), at most `most` of them; then -1."""
    batch = (query_starts, key_lens, num_requests, num_tokens, most_keys, left, right, halvings)
    worker = tl.program_id(0)
    place = found + worker * (most + 1) * 6
    count = 0
    total = line_length(num_tiles, kv_heads, batch, setup)
    step = step_of(total, num_workers, setup)
    x = border(worker, num_workers, total, step, setup)
    x_end = border(worker + 1, num_workers, total, step, setup)
    if x < x_end:
        tile, head, start = item_at(x, num_tiles, kv_heads, batch, setup)
        while (start < x_end) & (tile < num_tiles):
            _, _, tokens, _, first_row, _, _, _, units = extent_of(tile, batch, setup)
            if first_row >= tokens * setup.group:
                tile += 1
            else:
                begin = cut(x, start, units, setup)
                end = cut(x_end, start, units, setup)
                after = start + setup.overhead + units.to(tl.int64) * setup.weight
                here = (end > begin) | ((units == 0) & (x < after) & (x_end >= after))
                if here & (count < most):
                    first = 0
                    number = 0
                    if end - begin < units:
                        first, number = pieces(start, units, num_workers, total, step, setup)
                    tl.store(place, tile)
                    tl.store(place + 1, head)
                    tl.store(place + 2, begin)
                    tl.store(place + 3, end)
                    tl.store(place + 4, first)
                    tl.store(place + 5, number)
                    place += 6
                    count += 1
                start = after
                head += 1
                if head == kv_heads:
                    head = 0
                    tile += 1
    tl.store(place, -1)


def intervals(
    query_starts: torch.Tensor,
    key_lens: torch.Tensor,
    setup: ScheduleSetup,
    *,
    num_tokens: int,
    most_keys: int,
    kv_heads: int,
    workers: int,
    left: int = -1,
    right: int = -1,
    most: int = 64,
) -> torch.Tensor:
    """What the device makes of these lengths, int32 [workers, most + 1, 6]: see `write_intervals`."""
    requests = len(key_lens)
    found = torch.full((workers, most + 1, 6), -1, dtype=torch.int32, device=key_lens.device)
    tiles = num_tokens * setup.group // setup.rows + requests
    sizes = (requests, num_tokens, most_keys, left, right, (requests - 1).bit_length())
    with on_device_of(key_lens):
        write_intervals[(workers,)](found, query_starts, key_lens, *sizes, tiles, kv_heads, workers, most, setup=setup)
    return found
