"""Latent attention over pages: tiles of query rows against tiles of latents, each byte read once for scores and values.

Computes   ops/attention_latent.py: one KV head whose values are the first value_dim numbers of its keys.
Wins       decode, verification and prompts over a latent cache of any type: the tile in shared memory that scores are
           made from is the one that values are taken from, so a cached row crosses the bus once for up to 64 rows.
Schedule   rows = tokens x heads of a request. An item is some tiles of rows (its members), side by side over the same
           keys, so that all but one find them in L2. Workers take intervals of the line of all items (schedule.py); a
           prompt, which has more items than workers, one item each; batch-invariant, one fixed part of an item each.
           A tile of keys: scores, softmax in base 2, values from the same tile. 16 rows have tiles of 16; for 32 the
           products are turned, keys are the rows of the tensor core's tile. Parts are joined by mla_merge.py.
Source     DeepSeek-AI 2024, "DeepSeek-V2"; 2025, "FlashMLA"; Dao 2023, "Flash-Decoding". kernels/mla_tiles.py: sizes.
Error      16-bit: exact products, sums in float32, weights rounded to the query's type. float32: as float32 arithmetic.
Measured   not measured yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from headrace.kernels.triton.attention_scores import HIDDEN, LOG2_E, rounded_to, tanh
from headrace.kernels.triton.launch import dot, on_device_of
from headrace.kernels.triton.mla_launch import launch_of, mla_variants
from headrace.kernels.triton.mla_merge import mla_merge_kernel
from headrace.kernels.triton.paged_parts import keep, numbers, pages_at, rows_at, write_rows
from headrace.kernels.triton.schedule import border, cost_of, cut, extent_of, item_at, line_of, pieces
from headrace.kernels.triton.variants import Variant

_NO_BOUND = tl.constexpr(1 << 30)
_RUNTIME = [
    *("num_requests", "num_tokens", "num_pages", "max_pages", "most_keys", "left", "right", "halvings"),
    *("num_items", "num_workers", "num_columns", "most_units"),
]


# A tile of keys


@triton.jit
def latents_at(places, seen, first: tl.constexpr, end: tl.constexpr, block: tl.constexpr, setup: tl.constexpr):
    """Numbers first .. end of the rows of a tile, [keys, block], before any scale; zeros where no key is seen."""
    items: tl.constexpr = 2 if setup.format == "int4" else 1
    codes = rows_at(places, seen, end // items, block // items, first // items, "")
    return numbers(codes, setup.products, setup)


@triton.jit
def products_of(queries, latent, setup: tl.constexpr):
    """Of rows and keys; keys_first: as [keys, rows]."""
    precision: tl.constexpr = setup.precision
    if setup.keys_first:
        found = dot(latent, tl.trans(queries), tl.full([setup.keys, setup.rows], 0.0, tl.float32), precision)
    else:
        found = dot(queries, tl.trans(latent), tl.full([setup.rows, setup.keys], 0.0, tl.float32), precision)
    return found


@triton.jit
def products_by_columns(query_rows, live, places, seen, setup: tl.constexpr):
    """The same, of columns out of memory a few at a time: queries of float32 would not fit into registers."""
    precision: tl.constexpr = setup.precision
    dim: tl.constexpr = setup.head_dim
    columns: tl.constexpr = setup.columns
    found = tl.full([setup.rows, setup.keys], 0.0, tl.float32)
    for first in tl.static_range(0, dim, columns):
        queries = rows_at(query_rows, live, setup.head_dim, setup.columns, first, "").to(setup.products)
        latent = latents_at(places, seen, first, setup.head_dim, setup.columns, setup)
        found = dot(queries, tl.trans(latent), found, precision)
    return found


@triton.jit
def plus_values(sums, weights, latent, setup: tl.constexpr):
    """Plus the values of a tile by their weights; keys_first: as [values, rows]."""
    precision: tl.constexpr = setup.precision
    if setup.keys_first:
        found = dot(tl.trans(latent), weights, sums, precision)
    else:
        found = dot(weights, latent, sums, precision)
    return found


@triton.jit
def masked(scores, keys, own, left, right, num_keys, mask_rows, first_column, setup: tl.constexpr):
    """Scores without the pairs that are not seen, plus the mask. All are broadcast to the scores."""
    seen = (keys < num_keys) & (keys <= own + right) & (keys >= own - left)
    if setup.mask == "bool":
        found = tl.load(mask_rows + (keys - first_column), mask=seen & (keys >= first_column), other=1)
        seen = seen & (found != 0)
    elif setup.mask == "float":
        found = tl.load(mask_rows + (keys - first_column), mask=seen & (keys >= first_column), other=0.0)
        scores += found.to(tl.float32) * LOG2_E
    return tl.where(seen, scores, HIDDEN)


@triton.jit
def attend(extent, member, first_unit, end_unit, place, arrays, strides, scalars, setup: tl.constexpr):
    """A member of an item against units of its keys; the sums go to slot `place`, or, below 0, are the result."""
    query, latents, scales, page_table, mask, sinks, slopes, out, lse, partial_out, partial_sums = arrays
    query_strides, latent_strides, mask_strides, result_strides = strides
    page_stride, scale_page, scale_row, table_stride = latent_strides
    factor, cap, num_pages, max_pages, num_columns, left, right = scalars
    request, first_token, tokens, num_keys, item_row, begin, end, unit, _ = extent
    axis: tl.constexpr = 0 if setup.keys_first else 1  # of the keys in scores

    first_row = item_row + member * setup.rows
    row = first_row + tl.arange(0, setup.rows)
    live = row < tokens * setup.heads
    token = first_token + tl.minimum(row // setup.heads, tokens - 1)
    head = row % setup.heads
    shift = 0 if setup.top_left else num_keys - tokens
    own = tl.expand_dims(token - first_token + shift, axis)
    query_rows = query + token.to(tl.int64) * query_strides[0] + head * query_strides[1]
    queries = query_rows
    rest_queries = query_rows
    if setup.columns == 0:
        queries = rounded_to(rows_at(query_rows, live, setup.value_dim, setup.values, 0, ""), setup.products)
    if setup.rest:
        rest_queries = rows_at(query_rows, live, setup.head_dim, setup.rest, setup.value_dim, "")
        rest_queries = rounded_to(rest_queries, setup.products)
    slope = tl.full([setup.rows], 0.0, tl.float32)
    if setup.alibi:
        slope = tl.load(slopes + request * mask_strides[2] + head) * LOG2_E
    mask_rows = mask
    if setup.mask != "":
        far = token.to(tl.int64) * mask_strides[1] + head.to(tl.int64) * mask_strides[0]
        mask_rows = mask + tl.expand_dims(far, axis)
    # Every row sees every key from clear_begin to clear_end.
    clear_begin = shift + tl.minimum((first_row + setup.rows - 1) // setup.heads, tokens - 1) - left
    clear_end = tl.minimum(shift + first_row // setup.heads + right + 1, num_keys - num_columns)

    top = tl.full([setup.rows], HIDDEN, tl.float32)
    total = tl.full([setup.rows], 0.0, tl.float32)
    sums = tl.full([setup.values, setup.rows] if setup.keys_first else [setup.rows, setup.values], 0.0, tl.float32)
    first_tile = tl.maximum((unit + first_unit) * setup.unit_tiles, begin // setup.keys)
    end_tile = tl.minimum((unit + end_unit) * setup.unit_tiles, (end + setup.keys - 1) // setup.keys)
    table = page_table + request.to(tl.int64) * table_stride
    pages = pages_at(table, first_tile * setup.keys, max_pages, num_pages, setup)
    # NOTE: what does not change is computed anew for 64 rows, whose sums leave no registers to keep it in.
    for tile in tl.range(first_tile, end_tile, disable_licm=setup.rows >= 64):
        first_key = tile * setup.keys
        keys = first_key + tl.arange(0, setup.keys)
        seen = keys < end
        slots = (first_key % setup.page + tl.arange(0, setup.keys)) if setup.one_page else keys % setup.page
        places = latents + pages * page_stride + slots * setup.row_stride
        latent = latents_at(places, seen, 0, setup.value_dim, setup.values, setup)
        if setup.columns:
            scores = products_by_columns(query_rows, live, places, seen, setup) * factor
        else:
            scores = products_of(queries, latent, setup) * factor
        if setup.rest:
            rest = latents_at(places, seen, setup.value_dim, setup.head_dim, setup.rest, setup)
            # NOTE: multiplied apart, for products that feed products are computed by every warpgroup for itself.
            scores += products_of(rest_queries, rest, setup) * factor
        key_scales = seen
        if setup.scaled:
            key_scales = tl.load(scales + (pages * scale_page + slots * scale_row), mask=seen, other=0.0)
            scores *= tl.expand_dims(key_scales, 1 - axis)
        if setup.capped:
            scores = tanh(scores) * cap
        keys = tl.expand_dims(keys, 1 - axis)
        if setup.alibi:
            scores -= tl.expand_dims(slope, axis) * tl.abs(own - keys).to(tl.float32)
        if (first_key < clear_begin) | (first_key + setup.keys > clear_end):
            scores = masked(scores, keys, own, left, right, num_keys, mask_rows, num_keys - num_columns, setup)

        larger = tl.maximum(top, tl.max(scores, axis))
        base = tl.where(larger == HIDDEN, 0.0, larger)
        weights = tl.exp2(scores - tl.expand_dims(base, axis))
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(weights, axis)
        if setup.scaled:
            # In units of the largest code: weights of float16 then keep the digits that values have.
            weights *= tl.expand_dims(key_scales * setup.largest, 1 - axis)
        sums *= tl.expand_dims(shrunk, axis)
        sums = plus_values(sums, rounded_to(weights, setup.products), latent, setup)
        top = larger
        pages = pages_at(table, first_key + setup.keys, max_pages, num_pages, setup)

    if setup.keys_first:
        sums = tl.trans(sums)
    sums *= 1.0 / setup.largest
    if place >= 0:
        keep(partial_out, partial_sums, place, top, total, sums, setup)
    else:
        write_rows(out, lse, sinks, token, head, live, top, total, sums, result_strides, setup)


# Who computes what


@triton.jit
def bound(keys):
    """Of a window: far away when there is none."""
    return tl.where(keys < 0, _NO_BOUND, tl.minimum(keys, _NO_BOUND))


@triton.jit
def interval_of(worker, num_workers, num_items, batch, line: tl.constexpr):
    """A worker's part of the line: from, to, and the line itself; its first item, where that begins."""
    whole = line_of(num_items, 1, num_workers, batch, line)
    x = border(worker, num_workers, whole, line)
    x_end = border(worker + 1, num_workers, whole, line)
    item = num_items * 0
    start = x_end
    if x < x_end:
        item, _, start = item_at(x, num_items, 1, batch, whole, line)
    return (x, x_end, whole), item, start


@triton.jit
def part_of(worker, num_workers, interval, start, units, line: tl.constexpr):
    """What of an item of so many units lies in an interval: units from and to, whether there is anything to do, where
    the item ends; the slot of this part and the number of parts, -1 and 0 when it is the whole item."""
    x, x_end, whole = interval
    first_unit = cut(x, start, units, whole, line)
    end_unit = cut(x_end, start, units, whole, line)
    after = start + cost_of(units, whole, line)
    here = (end_unit > first_unit) | ((units == 0) & (x < after) & (x_end >= after))
    slot = worker * 0 - 1
    number = worker * 0
    if here & (end_unit - first_unit < units):
        _, number = pieces(start, units, num_workers, whole, line)
        slot = 2 * worker - (first_unit > 0).to(tl.int32)
    return first_unit, end_unit, here, after, slot, number


@triton.jit(do_not_specialize=_RUNTIME)
def mla_kernel(
    query,
    latents,
    scales,
    page_table,
    key_lens,
    query_starts,
    mask,
    sinks,
    slopes,
    out,
    lse,
    partial_out,
    partial_sums,
    parts,
    num_requests,
    num_tokens,
    num_pages,
    max_pages,
    most_keys,
    left,
    right,
    halvings,
    num_items,
    num_workers,
    num_columns,
    most_units,
    factor,
    cap,
    query_token,
    query_head,
    page_stride,
    scale_page,
    scale_row,
    table_stride,
    mask_head,
    mask_token,
    slope_request,
    out_token,
    out_head,
    lse_token,
    lse_head,
    setup: tl.constexpr,
    line: tl.constexpr,
):
    """shared_out: programs are members of a group of workers, which has an interval of the line; else (member of an
    item, unit of its keys). parts [items, 2]: the slot of an item's first part, and how many there are."""
    arrays = (query, latents, scales, page_table, mask, sinks, slopes, out, lse, partial_out, partial_sums)
    strides = (
        (query_token, query_head),
        (page_stride, scale_page, scale_row, table_stride),
        (mask_head, mask_token, slope_request),
        (out_token, out_head, lse_token, lse_head),
    )
    scalars = (factor, cap, num_pages, max_pages, num_columns, bound(left), bound(right))
    batch = (query_starts, key_lens, num_requests, num_tokens, most_keys, left, right, halvings)
    member = tl.program_id(0) % setup.members
    worker = tl.program_id(0) // setup.members
    item = num_items - 1 - worker  # the last rows of a prompt, which see most keys, first
    start = tl.full((), 0, tl.int64)
    x_end = tl.full((), 1, tl.int64)
    interval = (start, x_end, x_end, x_end)
    if setup.shared_out:
        interval, item, start = interval_of(worker, num_workers, num_items, batch, line)
        x_end = interval[1]
    while (start < x_end) & (item < num_items):
        extent = extent_of(item, batch, line)
        tokens, first_row, units = extent[2], extent[4], extent[8]
        after = start if setup.shared_out else x_end
        if first_row < tokens * setup.heads:
            if setup.shared_out:
                first_unit, end_unit, here, after, slot, number = part_of(
                    worker, num_workers, interval, start, units, line
                )
            else:
                first_unit = tl.program_id(1)
                end_unit = first_unit + 1
                here = (first_unit < units) | (first_unit == 0)
                slot = tl.where(units > 1, item * most_units + first_unit, -1)
                number = units
            if here & (first_row + member * setup.rows < tokens * setup.heads):
                if first_unit == 0:
                    tl.store(parts + 2 * item, slot)
                    tl.store(parts + 2 * item + 1, number)
                place = tl.where(slot < 0, -1, slot * setup.members + member)
                attend(extent, member, first_unit, end_unit, place, arrays, strides, scalars, setup)
        item += 1
        start = after


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"], tensors of one GPU."""
    launch = launch_of(arrays, options)
    if launch is None:
        return
    tile = launch.division.tile
    with on_device_of(arrays["query"]):
        mla_kernel[launch.division.grid](**launch.arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)
        if launch.merged:
            mla_merge_kernel[launch.merge_grid](**launch.merged, num_warps=4)


def variants() -> list[Variant]:
    """What `run` picks for the shapes of DeepSeek's models."""
    return mla_variants(mla_kernel, mla_merge_kernel)
