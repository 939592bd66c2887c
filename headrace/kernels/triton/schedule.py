"""The closed-form schedule as each worker of a GPU kernel computes it for itself: no launch, no list, no host.

kernels/schedule.py and kernels/row_tiles.py say the same in Python and are what this is held against. A worker needs

1. the length of the line: the cost of every tile of rows, summed by blocks of them (the heads only multiply),
2. the last item that begins at or before its own interval: the same sum, up to there,
3. from there on, item by item: which units of it lie in the interval (`cut` at both ends), and where an item is cut,
   which intervals have the others (`pieces`), for the slots of their results and for who comes last and merges.

Where there are no more items than workers, each item may instead be cut in equal parts, a worker to each part: the line
is then counted in parts, and the same walk finds them (`equal_part`, of setups that are `equal`).

An item is a tile of rows and a KV head, heads fastest. `line` is what `line_of` returns, in 64 bits. `batch` is
(query_starts, key_lens, num_requests, num_tokens, most_keys, left, right, halvings), `setup` anything with the fields
of `ScheduleSetup`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.schedule import EQUAL_LENGTHS
from headrace.kernels.triton.launch import on_device_of

LINE_BLOCK = tl.constexpr(256)  # tiles of rows summed at once
_LENGTHS = tl.constexpr(EQUAL_LENGTHS)


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
    equal: bool = False


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
def units_of(tiles, num_tiles, batch, setup: tl.constexpr):
    """Of each tile; -1 where it has no rows."""
    _, _, tokens, _, first_row, _, _, _, units = extent_of(tl.minimum(tiles, num_tiles - 1), batch, setup)
    return tl.where((tiles < num_tiles) & (first_row < tokens * setup.group), units, -1)


@triton.jit
def cost_of(units, line, setup: tl.constexpr):
    """What an item of so many units takes of the line, int64; 0 where there is none."""
    cost = setup.overhead + units.to(tl.int64) * setup.weight
    if setup.equal:
        part = line[2]
        parts = tl.maximum((units + part - 1) // tl.maximum(part, 1), 1).to(tl.int64)
        cost = tl.where(part > 0, parts, cost)
    return tl.where(units < 0, 0, cost)


@triton.jit
def line_of(num_tiles, kv_heads, num_workers, batch, setup: tl.constexpr):
    """The length of all items together, how much of it lies between two boundaries, and the units of an equal part: 0
    where intervals of the line are quicker, or not shorter."""
    stretched = (0, 0, tl.full((), 0, tl.int32))
    total = tl.full((), 0, tl.int64)
    tiles = tl.full((), 0, tl.int32)
    most = tl.full((), 0, tl.int32)
    for base in range(0, num_tiles, LINE_BLOCK):
        units = units_of(base + tl.arange(0, LINE_BLOCK), num_tiles, batch, setup)
        total += tl.sum(cost_of(units, stretched, setup))
        if setup.equal:
            tiles += tl.sum((units >= 0).to(tl.int32))
            most = tl.maximum(most, tl.max(units))
    total *= kv_heads
    step = step_of(total, num_workers, setup)
    part = tl.full((), 0, tl.int32)
    if setup.equal:
        items = tiles * kv_heads
        if (items <= num_workers) & (most > 0):
            found = equal_part((total, items, most), num_tiles, kv_heads, num_workers, batch, setup)
            cost = tl.minimum(found, most).to(tl.int64) * setup.weight
            cost += tl.where(found < most, setup.merge_cost, 0)
            if cost <= step + 2 * setup.merge_cost:
                part = found
                step = tl.full((), 1, tl.int64)
    return total, step, part


@triton.jit
def equal_part(whole, num_tiles, kv_heads, num_workers, batch, setup: tl.constexpr):
    """The shortest of a few lengths that make no more parts than workers. whole: the line's length, items on it, units
    of the largest."""
    total, items, most = whole
    units = (total - items.to(tl.int64) * setup.overhead) // setup.weight
    least = (setup.least + setup.weight - 1) // setup.weight
    low = tl.maximum((units + num_workers - 1) // num_workers, tl.maximum(least, 1)).to(tl.int32)
    # So long that what is rounded up of each item's parts has a worker too.
    spare = tl.maximum(num_workers - items, 1)
    high = tl.minimum((units + spare - 1) // spare, most).to(tl.int32)
    high = tl.maximum(tl.where(items < num_workers, high, most), low)
    lengths = low + (high - low) * tl.arange(0, _LENGTHS) // (_LENGTHS - 1)
    counts = tl.zeros([_LENGTHS], tl.int32)
    for base in range(0, num_tiles, LINE_BLOCK):
        block = units_of(base + tl.arange(0, LINE_BLOCK), num_tiles, batch, setup)[:, None]
        parts = tl.maximum((block + lengths[None, :] - 1) // lengths[None, :], 1)
        counts += tl.sum(tl.where(block < 0, 0, parts), axis=0)
    return tl.min(tl.where(counts * kv_heads <= num_workers, lengths, high))


@triton.jit
def item_at(x, num_tiles, kv_heads, batch, line, setup: tl.constexpr):
    """The last item that begins at or before x, which must be on the line: its tile, its head, where it begins."""
    tile = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int64)
    cost = tl.full((), 1, tl.int64)
    before = tl.full((), 0, tl.int64)
    for base in range(0, num_tiles, LINE_BLOCK):
        tiles = base + tl.arange(0, LINE_BLOCK)
        costs = cost_of(units_of(tiles, num_tiles, batch, setup), line, setup)
        starts = before + tl.cumsum(costs) - costs
        here = (costs > 0) & (starts * kv_heads <= x)
        found = tl.max(tl.where(here, tiles, -1))
        if found >= 0:
            tile = found
            start = tl.max(tl.where(here, starts, 0))
            cost = tl.sum(tl.where(tiles == found, costs, 0))
        before += tl.sum(costs)
    head = (x - start * kv_heads) // cost
    # Behind the last part there are workers without one.
    tile = tl.where(head < kv_heads, tile, num_tiles)
    return tile, head.to(tl.int32), start * kv_heads + head * cost


@triton.jit
def step_of(total, num_workers, setup: tl.constexpr):
    """How much of the line lies between two boundaries."""
    shared = tl.maximum(total - setup.overhead - 2 * setup.merge_cost, 0)
    return tl.maximum((shared + num_workers - 1) // num_workers, setup.least)


@triton.jit
def border(worker, num_workers, line, setup: tl.constexpr):
    """Where on the line that worker's interval begins."""
    total, step, part = line
    inner = tl.minimum(setup.overhead + setup.merge_cost + worker * step, total)
    found = tl.where(worker <= 0, 0, tl.where(worker >= num_workers, total, inner))
    return tl.where(part > 0, worker, found) if setup.equal else found


@triton.jit
def cut(x, start, units, line, setup: tl.constexpr):
    """Before which unit a boundary at x cuts the item that begins at `start`: 0 all of it is behind, `units` before."""
    inside = tl.maximum(x - start - setup.overhead, 0)
    unit = tl.minimum((inside + setup.weight // 2) // setup.weight, units)
    rest = units - unit
    begin = tl.where(unit * setup.weight < setup.snap, 0, unit)
    end = tl.where(rest * setup.weight < setup.snap, units, unit)
    inner = tl.where(unit <= rest, begin, end)
    found = tl.where(x >= start + setup.overhead + units * setup.weight, units, inner)
    if setup.equal:
        found = tl.where(line[2] > 0, tl.minimum(tl.maximum(x - start, 0) * line[2], units), found)
    return found.to(tl.int32)


@triton.jit
def pieces(start, units, num_workers, line, setup: tl.constexpr):
    """Of an item that is cut: the interval its first piece lies in, and how many pieces there are, one an interval."""
    _, step, part = line
    lead = setup.overhead + setup.merge_cost
    if setup.equal:
        lead = tl.where(part > 0, 0, lead)
    first = tl.maximum((start - lead) // step, 1)
    while cut(border(first, num_workers, line, setup), start, units, line, setup) <= 0:
        first += 1
    end = start + cost_of(units, line, setup)
    last = clamped((end - lead) // step + 1, 1, num_workers - 1)
    while cut(border(last, num_workers, line, setup), start, units, line, setup) >= units:
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
    line = line_of(num_tiles, kv_heads, num_workers, batch, setup)
    x = border(worker, num_workers, line, setup)
    x_end = border(worker + 1, num_workers, line, setup)
    if x < x_end:
        tile, head, start = item_at(x, num_tiles, kv_heads, batch, line, setup)
        while (start < x_end) & (tile < num_tiles):
            _, _, tokens, _, first_row, _, _, _, units = extent_of(tile, batch, setup)
            if first_row >= tokens * setup.group:
                tile += 1
            else:
                begin = cut(x, start, units, line, setup)
                end = cut(x_end, start, units, line, setup)
                after = start + cost_of(units, line, setup)
                here = (end > begin) | ((units == 0) & (x < after) & (x_end >= after))
                if here & (count < most):
                    first = 0
                    number = 0
                    if end - begin < units:
                        first, number = pieces(start, units, num_workers, line, setup)
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
