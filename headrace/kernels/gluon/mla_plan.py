"""Which keys of which rows each worker takes in MLA decode, computed on the device in one launch.

An item is one request and a chunk of its row tiles, as many as programs share a worker's number: they read the same
keys at the same time, so that memory is read once and the cache serves the others. Items lie on a line, each OVERHEAD
units and then its keys in units of 128; worker p takes what lies between p/P and (p + 1)/P of the line, or, where that
is not much longer for any, as many whole items as the others, or an equal part of one: less is cut, less is merged.
Lengths and starts are read on the device: nothing waits for the host, and one CUDA graph serves all lengths.

    items [num, 2]: request, first row tile          bounds [workers + 1, 2]: item, unit before which a worker begins
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.variants import Variant

TILE, UNIT = 64, 128
OVERHEAD = 1  # units that a segment costs besides its keys: queries in, output out
SNAP = 1  # no segment at an end of a split item is shorter
WHOLE = 4  # units that it may take longer if nothing is cut: what cutting, writing parts and merging them costs
EVEN = 1  # and if all are cut alike: the beginning of a second segment


@triton.jit
def _first_above(ends, count, value, STEPS: tl.constexpr):
    """For each value, how many of the rising `ends` are not above it."""
    low = tl.zeros_like(value)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        above = tl.load(ends + middle, mask=searching, other=0) > value
        high = tl.where(searching & above, middle, high)
        low = tl.where(searching & (above == 0), middle + 1, low)
    return low


@triton.jit
def _even(p, line_ends, num_items, workers, OVERHEAD: tl.constexpr):
    """Item and unit where worker p begins if all take as many items, or as many equal parts of one; where on the line
    that is, with the overhead of a segment that begins there or without."""
    items = tl.maximum(tl.cdiv(num_items, workers), 1)
    parts = tl.maximum(workers // tl.maximum(num_items, 1), 1)
    item = tl.minimum(p // parts * items, num_items)
    inside = item < num_items
    begin = tl.load(line_ends + item - 1, mask=item > 0, other=0)
    count = tl.load(line_ends + item, mask=inside, other=0) - begin - OVERHEAD
    unit = tl.where(inside, p % parts * tl.cdiv(tl.maximum(count, 0), parts), 0)
    over = (unit > 0) & (unit >= count)
    begin += tl.where(unit > 0, tl.minimum(unit, count) + tl.where(over, OVERHEAD, 0), 0)
    return item + over, tl.where(over, 0, unit), begin, begin + tl.where((unit > 0) & (over == 0), OVERHEAD, 0)


_INTEGERS = ("requests", "heads", "tokens", "most_keys", "most_items", "workers", "tiles_together")


@triton.jit(do_not_specialize=_INTEGERS)
def _plan_kernel(
    key_lens,
    query_starts,
    items,
    bounds,
    chunk_ends,  # [requests]
    line_ends,  # [ITEMS]
    requests,
    heads,
    tokens,
    most_keys,
    most_items,
    workers,
    tiles_together,
    OVERHEAD: tl.constexpr,
    SNAP: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    REQUESTS: tl.constexpr,
    ITEMS: tl.constexpr,
    WORKERS: tl.constexpr,
    STEPS: tl.constexpr,
):
    r = tl.arange(0, REQUESTS)
    start = tl.load(query_starts + r, mask=r < requests, other=0)
    stop = tl.load(query_starts + r + 1, mask=r < requests, other=0)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    rows = (tl.minimum(tl.maximum(stop, start), tokens) - start) * heads
    ends = tl.cumsum(tl.cdiv(tl.cdiv(rows, TILE), tiles_together), 0)
    tl.store(chunk_ends + r, ends, mask=r < requests)
    num_items = tl.minimum(tl.max(ends, 0), most_items)
    tl.debug_barrier()

    item = tl.arange(0, ITEMS)
    exists = item < num_items
    request = tl.minimum(_first_above(chunk_ends, requests, item, STEPS), requests - 1)
    before = tl.load(chunk_ends + request - 1, mask=exists & (request > 0), other=0)
    keys = tl.load(key_lens + request, mask=exists, other=0)
    units = tl.cdiv(tl.minimum(tl.maximum(keys, 0), most_keys), UNIT)
    line = tl.cumsum(tl.where(exists, units + OVERHEAD, 0), 0)
    tl.store(items + 2 * item, request, mask=exists)
    tl.store(items + 2 * item + 1, (item - before) * tiles_together, mask=exists)
    tl.store(line_ends + item, line)
    whole = tl.max(line, 0)
    tl.debug_barrier()

    p = tl.arange(0, WORKERS)
    even_item, even_unit, even_begin, _ = _even(p, line_ends, num_items, workers, OVERHEAD)
    _, _, _, even_end = _even(p + 1, line_ends, num_items, workers, OVERHEAD)
    longest = tl.max(tl.where(p < workers, even_end - even_begin, 0), 0)
    length = tl.maximum(tl.cdiv(whole, workers), 1)
    even = longest <= length + tl.where(2 * num_items > workers, WHOLE, EVEN)

    at = tl.minimum(p * length, whole)
    owner = _first_above(line_ends, num_items, at, STEPS)
    inside = owner < num_items
    begin = tl.load(line_ends + owner - 1, mask=inside & (owner > 0), other=0)
    count = tl.load(line_ends + owner, mask=inside, other=0) - begin - OVERHEAD
    unit = tl.maximum(at - begin - OVERHEAD, 0)
    unit = tl.where(inside & (unit > SNAP), unit, 0)
    ended = inside & (unit > 0) & (count - unit <= SNAP)
    owner = tl.where(even, even_item, owner + ended)
    unit = tl.where(even, even_unit, tl.where(ended, 0, unit))
    tl.store(bounds + 2 * p, tl.where(p == workers, num_items, owner), mask=p <= workers)
    tl.store(bounds + 2 * p + 1, tl.where(p == workers, 0, unit), mask=p <= workers)


def most_items(requests: int, tokens: int, heads: int, tiles_together: int) -> int:
    """Items there can be, whatever the lengths."""
    return requests + tokens * heads // (TILE * tiles_together)


def plan_work(
    arrays: Any, *, workers: int, tiles_together: int, most_keys: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Items, bounds, and how many items there can be; launched, not waited for."""
    lens, starts = arrays["key_lens"], arrays["query_starts"]
    tokens, heads = arrays["query"].shape[:2]
    num = most_items(len(lens), tokens, heads, tiles_together)
    sizes = {"REQUESTS": triton.next_power_of_2(len(lens)), "ITEMS": triton.next_power_of_2(num)}
    lists = torch.empty(2 * num + 2 * (workers + 1) + len(lens) + sizes["ITEMS"], dtype=torch.int32, device=lens.device)
    items, bounds, chunks, line = lists.split([2 * num, 2 * (workers + 1), len(lens), sizes["ITEMS"]])
    with on_device_of(lens):
        _plan_kernel[1,](
            lens,
            starts,
            items,
            bounds,
            chunks,
            line,
            len(lens),
            heads,
            tokens,
            most_keys,
            num,
            workers,
            tiles_together,
            **_CONSTANTS,
            **sizes,
            WORKERS=triton.next_power_of_2(workers + 1),
            STEPS=max(sizes["ITEMS"], sizes["REQUESTS"]).bit_length(),
            num_warps=4 if num <= 2048 else 16,
        )
    return items.view(-1, 2), bounds.view(-1, 2), num


_CONSTANTS = {"OVERHEAD": OVERHEAD, "SNAP": SNAP, "WHOLE": WHOLE, "EVEN": EVEN, "TILE": TILE, "UNIT": UNIT}
_POINTERS = ("key_lens", "query_starts", "items", "bounds", "chunk_ends", "line_ends")


def variants() -> list[Variant]:
    """A small and a large batch."""
    types = dict.fromkeys(_POINTERS, "*i32") | dict.fromkeys(_INTEGERS, "i32")
    sizes = [{"REQUESTS": n, "ITEMS": 2 * n, "WORKERS": 256, "STEPS": (2 * n).bit_length()} for n in (64, 1024)]
    return [
        Variant(f"{size['REQUESTS']} requests", _plan_kernel, types, {**_CONSTANTS, **size}, chips=("sm_90",))
        for size in sizes
    ]
