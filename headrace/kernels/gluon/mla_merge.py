"""Merging the parts of MLA decode whose keys were shared out among workers: weighted by their sums, in their order.

    out = sum_k exp(lse_k - lse) out_k,   lse = log sum_k exp(lse_k)            parts as mla_attention.py writes them

Bound by reading the parts, 64 x 512 float32 each; items that one worker took whole were written by it. Launched while
the attention still runs (programmatic dependent launch): a program waits for its end before it reads. Not measured yet.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from headrace.kernels.gluon.mla_plan import TILE, UNIT
from headrace.kernels.triton.launch import INTERPRETED, on_device_of
from headrace.kernels.triton.variants import Variant

ROWS = 8  # of a program
_DEPENDENT = tl.constexpr(not INTERPRETED)


@triton.jit
def _first_interval_after(bounds, workers, item, unit, STEPS: tl.constexpr):
    """The first worker whose interval ends behind a place."""
    low = 0
    high = workers
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        end_item = tl.load(bounds + 2 * middle + 2)
        end_unit = tl.load(bounds + 2 * middle + 3)
        behind = (end_item > item) | ((end_item == item) & (end_unit > unit))
        high = tl.where((low < high) & behind, middle, high)
        low = tl.where((low < high) & (behind == 0), middle + 1, low)
    return low


@triton.jit
def _slot(bounds, worker, item, tile, tiles_together):
    first = tl.load(bounds + 2 * worker) == item
    return (2 * worker + tl.where(first, 0, 1)) * tiles_together + tile


_CHANGING = ("heads", "tokens", "most_keys", "workers", "tiles_together")


@triton.jit(do_not_specialize=_CHANGING)
def _merge_kernel(
    partial_out,
    partial_lse,
    out,
    lse,
    items,
    bounds,
    key_lens,
    query_starts,
    heads,
    tokens,
    most_keys,
    workers,
    tiles_together,
    out_token,
    out_head,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if _DEPENDENT:
        gdc_wait()
    item = tl.program_id(0)
    tile = tl.program_id(1)
    if item >= tl.load(bounds + 2 * workers):
        return
    request = tl.load(items + 2 * item)
    start = tl.minimum(tl.maximum(tl.load(query_starts + request), 0), tokens)
    stop = tl.minimum(tl.maximum(tl.load(query_starts + request + 1), start), tokens)
    keys = tl.minimum(tl.maximum(tl.load(key_lens + request), 0), most_keys)
    units = tl.cdiv(keys, UNIT)
    first = _first_interval_after(bounds, workers, item, 0, STEPS)
    last = _first_interval_after(bounds, workers, item, tl.maximum(units - 1, 0), STEPS)
    within = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row = (tl.load(items + 2 * item + 1) + tile) * TILE + within
    exists = row < (stop - start) * heads
    if (first == last) | (tl.max(exists.to(tl.int32), 0) == 0):
        return
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    worker = first
    while worker <= last:
        at = _slot(bounds, worker, item, tile, tiles_together).to(tl.int64) * TILE + within
        largest = tl.maximum(largest, tl.load(partial_lse + at))
        worker += 1
    offset = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, COLUMNS], tl.float32)
    columns = tl.arange(0, COLUMNS)
    worker = first
    while worker <= last:
        at = _slot(bounds, worker, item, tile, tiles_together).to(tl.int64) * TILE + within
        weight = tl.exp(tl.load(partial_lse + at) - offset)
        total += weight
        merged += weight[:, None] * tl.load(partial_out + at[:, None] * COLUMNS + columns[None, :])
        worker += 1
    merged = merged / tl.where(total > 0, total, 1.0)[:, None]
    token = (start + row // heads).to(tl.int64)
    at = token * out_token + (row % heads) * out_head
    tl.store(out + at[:, None] + columns[None, :], merged.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + start.to(tl.int64) * heads + row, offset + tl.log(total), mask=exists)


def merge(arrays: Any, partial: Any, lists: Any, *, workers: int, tiles_together: int, most_keys: int) -> None:
    """Fills out and lse of the items whose keys several workers shared. partial: out, lse; lists: items, bounds."""
    out, query = arrays["out"], arrays["query"]
    items, bounds = lists
    grid = (len(items), tiles_together, TILE // ROWS)
    with on_device_of(query):
        _merge_kernel[grid](
            *partial,
            out,
            arrays["lse"],
            items,
            bounds,
            arrays["key_lens"],
            arrays["query_starts"],
            query.shape[1],
            query.shape[0],
            most_keys,
            workers,
            tiles_together,
            out.stride(0),
            out.stride(1),
            STEPS=workers.bit_length() + 1,
            **_CONSTANTS,
            num_warps=4,
            **({} if INTERPRETED else {"launch_pdl": True}),
        )


_CONSTANTS = {"TILE": TILE, "UNIT": UNIT, "ROWS": ROWS, "COLUMNS": 512}
_POINTERS = {"partial_out": "*fp32", "partial_lse": "*fp32", "lse": "*fp32", "key_lens": "*i32", "query_starts": "*i32"}
_INTEGERS = (*_CHANGING, "out_token", "out_head")


def variants() -> list[Variant]:
    """Both types of output."""
    types: dict[str, str] = {**_POINTERS, "items": "*i32", "bounds": "*i32", **dict.fromkeys(_INTEGERS, "i32")}
    constants = {**_CONSTANTS, "STEPS": 9}
    told = {"sm_90": ("griddepcontrol.wait",)}
    return [
        Variant(name, _merge_kernel, {**types, "out": f"*{name}"}, constants, chips=("sm_90",), instructions=told)
        for name in ("bf16", "fp16")
    ]
