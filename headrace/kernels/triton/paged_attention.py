"""Attention over a paged KV cache: decode, append, verification and prefill in one launch, keys split among workers.

Wins: always among kernels over pages of which keys are read once by many heads. Schedule: an item is a request, a KV
head and a tile of its query rows (tokens times heads of the group). Items lie on a line, their tiles of keys in them;
each worker takes an equal interval of it, found by itself (schedule.py). Keys and values of a tile are under way while
the one before is computed. An item cut by a boundary leaves float32 partial results, two slots to a worker at most; who
comes last at an item joins them in the order of the keys. Nothing depends on the host but shapes.
Source: Dao 2023, "Flash-Decoding"; the schedule is docs/kernels/schedule.md, its device side docs/kernels/paged_gpu.md.
Batch-invariant: the parts are chunks of 512 keys from the beginning of the request, joined one by one by whoever.
Error: products of 16-bit numbers are exact and their sums float32, weights are rounded to 16 bits before they meet the
values; float32 in three products of tf32 (2^-21 of each), or in full on AMD. Not measured yet: `headrace bench gpu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from headrace.kernels.triton.attention_scores import HIDDEN, LOG2_E, rounded_to, tanh
from headrace.kernels.triton.launch import dot, on_device_of
from headrace.kernels.triton.paged_launch import launch_of, paged_variants
from headrace.kernels.triton.paged_parts import (
    LEAST_SHIFT,
    MOST_SHIFT,
    arrived_last,
    joined,
    keep,
    kept,
    nothing,
    numbers,
    pages_at,
    queries_at,
    rows_at,
    scales_at,
    write_rows,
)
from headrace.kernels.triton.schedule import border, cost_of, cut, extent_of, item_at, line_of, pieces
from headrace.kernels.triton.variants import Variant

_RUNTIME = [
    *("num_requests", "num_tokens", "num_pages", "max_pages", "most_keys", "left", "right", "halvings"),
    *("num_tiles", "num_columns", "most_units", "by_item", "kv_heads"),
]


@triton.jit
def scores_of(products, place, live, rows, mask, column, factors, setup: tl.constexpr):
    """The products of a tile as scores in powers of two, -inf where a row does not see a key."""
    own, first_key, last_key, slopes, mask_rows = rows
    scale, softcap = factors
    seen = live[None, :] & (place[None, :] >= first_key[:, None]) & (place[None, :] <= last_key[:, None])
    if setup.capped or setup.alibi or setup.mask == "float":
        scores = products * scale
        if setup.capped:
            scores = softcap * tanh(scores / softcap)
        if setup.alibi:
            scores -= slopes[:, None] * tl.abs(own[:, None] - place[None, :]).to(tl.float32)
        if setup.mask == "float":
            shown = seen & (column >= 0)[None, :]
            scores += tl.load(mask + mask_rows[:, None] + column[None, :], mask=shown, other=0.0).to(tl.float32)
        scores *= LOG2_E
    else:
        scores = products * (scale * LOG2_E)
    if setup.mask == "bool":
        shown = seen & (column >= 0)[None, :]
        seen = seen & (tl.load(mask + mask_rows[:, None] + column[None, :], mask=shown, other=1) != 0)
    return tl.where(seen, scores, HIDDEN)


@triton.jit
def over_keys(q, q_rest, tiles, where, key_scales, value_scales, mask, setup: tl.constexpr):
    """Largest score, sum of weights and weighted sum of values of a tile of rows over tiles of keys, online."""
    rows, keys, values, key_scale_strides, value_scale_strides, table, extent, factors = where
    key, key_page, key_row = keys
    value, value_page, value_row = values
    first_tile, end_tile = tiles
    begin, end, first_column, max_pages, num_pages = extent
    size: tl.constexpr = setup.keys
    precision: tl.constexpr = setup.precision
    evict: tl.constexpr = setup.evict
    head_items: tl.constexpr = setup.head_dim // setup.packed
    value_items: tl.constexpr = setup.value_dim // setup.packed
    block: tl.constexpr = setup.block // setup.packed
    rest: tl.constexpr = setup.rest // setup.packed
    value_block: tl.constexpr = setup.values // setup.packed
    top = tl.full([setup.rows], HIDDEN, tl.float32)
    total = tl.full([setup.rows], 0.0, tl.float32)
    sums = tl.full([setup.rows, setup.values], 0.0, tl.float32)
    in_tile = tl.arange(0, size)
    page = pages_at(table, first_tile * size, max_pages, num_pages, setup)
    for tile in tl.range(first_tile, end_tile, disable_licm=True):
        first = tile * size
        place = first + in_tile
        live = (place >= begin) & (place < end)
        # Of the next tile: its keys can only be asked for once their pages are known.
        next_page = pages_at(table, first + size, max_pages, num_pages, setup)
        slot = first % setup.page + in_tile if setup.one_page else place % setup.page
        key_rows = key + (page * key_page + slot * key_row)
        value_rows = value + (page * value_page + slot * value_row)
        k = rows_at(key_rows, live, head_items, block, 0, evict)
        products = tl.full([setup.rows, size], 0.0, tl.float32)
        products = dot(q, tl.trans(numbers(k, q.dtype, setup)), products, precision)
        if rest > 0:
            k_rest = rows_at(key_rows, live, head_items, rest, block, evict)
            products = dot(q_rest, tl.trans(numbers(k_rest, q.dtype, setup)), products, precision)
        v = rows_at(value_rows, live, value_items, value_block, 0, evict)
        if setup.key_scales:
            scales = scales_at(key_scales, key_scale_strides, page, slot, live, 0.0)
            products *= scales[None, :]
        scores = scores_of(products, place, live, rows, mask, place + first_column, factors, setup)
        counted = scores
        if setup.value_scales:
            scales_v = scales_at(value_scales, value_scale_strides, page, slot, live, 1.0)
            if setup.shifted:
                # Weights of float16 are then at most 1 with their scales, and as exact as they can be.
                shift = tl.minimum(tl.maximum(tl.log2(scales_v), LEAST_SHIFT), MOST_SHIFT)
                counted = scores + shift[None, :]
        larger = tl.maximum(top, tl.max(counted, 1))
        safe = tl.where(larger == HIDDEN, 0.0, larger)
        weights = tl.exp2(scores - safe[:, None])
        share = tl.exp2(top - safe)
        total = total * share + tl.sum(weights, 1)
        if setup.value_scales:
            weights *= scales_v[None, :]
        sums = dot(rounded_to(weights, q.dtype), numbers(v, q.dtype, setup), sums * share[:, None], precision)
        top = larger
        page = next_page
    return top, total, sums


@triton.jit
def over_chunks(
    q, q_rest, units, where, key_scales, value_scales, mask, partial_out, partial_sums, whole, setup: tl.constexpr
):
    """The same chunk by chunk: joined one by one where all of the item is here, else each kept in its slot."""
    unit, unit_end, first_unit, first_slot = units
    _, _, _, _, _, _, extent, _ = where
    begin, end, _, _, _ = extent
    top, total, sums = nothing(setup)
    for chunk in range(unit, unit_end):
        first = tl.maximum((first_unit + chunk) * setup.chunk, begin // setup.keys)
        last = tl.minimum((first_unit + chunk + 1) * setup.chunk, (end + setup.keys - 1) // setup.keys)
        part_top, part_total, part_sums = over_keys(
            q, q_rest, (first, last), where, key_scales, value_scales, mask, setup
        )
        if whole:
            top, total, sums = joined(top, total, sums, part_top, part_total, part_sums)
        else:
            keep(partial_out, partial_sums, first_slot + chunk, part_top, part_total, part_sums, setup)
    return top, total, sums


@triton.jit
def rows_of(tile_extent, head, window, alibi_slopes, slopes_request, mask_strides, setup: tl.constexpr):
    """Who the rows of a tile are and what they see: token, head, whether there is one, and what `scores_of` takes."""
    request, token, tokens, num_keys, first_row = tile_extent
    left, right = window
    mask_head, mask_token = mask_strides
    row = first_row + tl.arange(0, setup.rows)
    live = row < tokens * setup.group
    own_token = token + row // setup.group
    own_head = head * setup.group + row % setup.group
    own = row // setup.group + (0 if setup.top_left else num_keys - tokens)
    first_key = tl.where(left < 0, 0, tl.maximum(own - left, 0))
    last_key = tl.where(right < 0, num_keys - 1, tl.minimum(own + right, num_keys - 1))
    last_key = tl.where(live, last_key, -1)
    slopes = own.to(tl.float32)
    if setup.alibi:
        slopes = tl.load(alibi_slopes + request * slopes_request + own_head, mask=live, other=0.0)
    mask_rows = own_head.to(tl.int64) * mask_head + own_token.to(tl.int64) * mask_token
    return own_token, own_head, live, (own, first_key, last_key, slopes, mask_rows)


@triton.jit(do_not_specialize=_RUNTIME)
def paged_attention_kernel(
    query,
    key,
    value,
    out,
    lse,
    query_starts,
    key_lens,
    page_table,
    key_scales,
    value_scales,
    mask,
    sinks,
    alibi_slopes,
    partial_out,
    partial_sums,
    counters,
    num_requests,
    num_tokens,
    num_pages,
    max_pages,
    most_keys,
    left,
    right,
    halvings,
    num_tiles,
    num_columns,
    most_units,
    by_item,
    kv_heads,
    scale,
    softcap,
    query_token,
    query_head,
    out_token,
    out_head,
    lse_token,
    lse_head,
    key_page,
    key_row,
    key_head,
    value_page,
    value_row,
    value_head,
    table_row,
    key_scale_page,
    key_scale_row,
    key_scale_head,
    value_scale_page,
    value_scale_row,
    value_scale_head,
    mask_head,
    mask_token,
    slopes_request,
    setup: tl.constexpr,
):
    batch = (query_starts, key_lens, num_requests, num_tokens, most_keys, left, right, halvings)
    worker = tl.program_id(0)
    num_workers = tl.num_programs(0)
    line = line_of(num_tiles, kv_heads, num_workers, batch, setup)
    x = border(worker, num_workers, line, setup)
    x_end = border(worker + 1, num_workers, line, setup)
    if x >= x_end:
        return
    tile, head, start = item_at(x, num_tiles, kv_heads, batch, line, setup)
    while (start < x_end) & (tile < num_tiles):
        request, token, tokens, num_keys, first_row, begin, end, first_unit, units = extent_of(tile, batch, setup)
        if first_row >= tokens * setup.group:
            tile += 1
        else:
            unit = cut(x, start, units, line, setup)
            unit_end = cut(x_end, start, units, line, setup)
            after = start + cost_of(units, line, setup)
            if (unit_end > unit) | ((units == 0) & (x < after) & (x_end >= after)):
                own_token, own_head, live, rows = rows_of(
                    (request, token, tokens, num_keys, first_row),
                    head,
                    (left, right),
                    alibi_slopes,
                    slopes_request,
                    (mask_head, mask_token),
                    setup,
                )
                query_rows = query + own_token.to(tl.int64) * query_token + own_head.to(tl.int64) * query_head
                q, q_rest = queries_at(query_rows, live, setup)
                far = head.to(tl.int64)
                keys = (key + far * key_head, key_page, key_row)
                values = (value + far * value_head, value_page, value_row)
                scales = (far * key_scale_head, key_scale_page, key_scale_row)
                scales_v = (far * value_scale_head, value_scale_page, value_scale_row)
                table = page_table + request.to(tl.int64) * table_row
                extent = (begin, end, num_columns - num_keys, max_pages, num_pages)
                # Where the item is cut: who has the other pieces, and where the results of its parts are kept.
                whole = unit_end - unit >= units
                first = worker
                number = 1
                if unit_end - unit < units:
                    first, number = pieces(start, units, num_workers, line, setup)
                place = tl.where(by_item > 0, tile * kv_heads + head, first) * most_units
                where = (rows, keys, values, scales, scales_v, table, extent, (scale, softcap))
                if setup.chunk > 1:
                    units_here = (unit, unit_end, first_unit, place)
                    top, total, sums = over_chunks(
                        q,
                        q_rest,
                        units_here,
                        where,
                        key_scales,
                        value_scales,
                        mask,
                        partial_out,
                        partial_sums,
                        whole,
                        setup,
                    )
                else:
                    tiles = (first_unit + unit, first_unit + unit_end)
                    top, total, sums = over_keys(q, q_rest, tiles, where, key_scales, value_scales, mask, setup)
                    if unit_end - unit < units:
                        slot = 2 * worker - (unit > 0).to(tl.int32)
                        keep(partial_out, partial_sums, slot, top, total, sums, setup)
                finished = whole
                if unit_end - unit < units:
                    finished = arrived_last(counters + first, number)
                    if finished:
                        top, total, sums = nothing(setup)
                        parts = units if setup.chunk > 1 else number
                        for n in range(parts):
                            slot = place + n if setup.chunk > 1 else 2 * (first + n) - tl.minimum(n, 1)
                            part_top, part_total, part_sums = kept(partial_out, partial_sums, slot, setup)
                            top, total, sums = joined(top, total, sums, part_top, part_total, part_sums)
                if finished:
                    strides = (out_token, out_head, lse_token, lse_head)
                    write_rows(out, lse, sinks, own_token, own_head, live, top, total, sums, strides, setup)
            start = after
            head += 1
            if head == kv_heads:
                head = 0
                tile += 1


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    launch = launch_of(arrays, options)
    if launch is None:
        return
    with on_device_of(arrays["query"]):
        paged_attention_kernel[(launch.workers,)](
            **launch.arguments, num_warps=launch.tile.num_warps, num_stages=launch.tile.num_stages
        )


def variants() -> list[Variant]:
    """What `run` picks for common shapes."""
    return paged_variants(paged_attention_kernel)
