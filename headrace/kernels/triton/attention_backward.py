"""Gradients of attention over dense or ragged keys, every option: in one order, or queries' added up in memory.

Wins always on a GPU: no other has every option. Schedule: per token and head the logarithm of what its weights sum up
to, and delta, all that its keys' gradients have in common. Gradients of keys and values: a program has a tile of keys
of one KV head and walks the rows that see any of them, head after head of the group, request after request.
`run`: those of queries from a second walk, a tile of rows past the keys they see, seven products; every sum has one
order, so bits depend on neither other requests nor the schedule. `run_atomic`: from the first walk too, five products:
each tile's share is added to float32 in memory, and the sums are rounded; wins by some 40 % where rows are many.
Gradients of sinks: parts of rows, summed in their order. Scores stand keys by rows: weights and slopes, rounded, are
the left factors of dV and dK as they lie in registers.
Source: Dao 2023, "FlashAttention-2", section 3.2; docs/kernels/attention_gpu.md. Error: as the forward's, with weights
and their slopes rounded to 16 bits where the inputs are. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import triton
import triton.language as tl

from headrace.kernels.triton.attention_backward_call import backward_calls
from headrace.kernels.triton.attention_call import KernelCall
from headrace.kernels.triton.attention_mask import mask_bits, mask_state
from headrace.kernels.triton.attention_scores import (
    HIDDEN,
    LOG2_E,
    adjusted,
    extent_of,
    held,
    keys_of_rows,
    mask_tile,
    narrowed,
    product,
    request_of,
    rounded_to,
    rows_of_keys,
    seen_by,
    size,
    sizes_of,
    store_parts,
    two_parts,
    whole_tiles,
)
from headrace.kernels.triton.attention_variants import backward_variants
from headrace.kernels.triton.launch import dot, on_device_of
from headrace.kernels.triton.variants import Variant


@triton.jit
def rows_kernel(
    d_out,
    out,
    lse,
    d_lse,
    sinks,
    query_starts,
    totals,
    deltas,
    d_sink_parts,
    d_out_strides,
    out_strides,
    lse_strides,
    d_lse_strides,
    sizes,
    form: tl.constexpr,
):
    """Of each row the logarithm to the base 2 of its weights' sum, and delta. Where nothing is seen: inf and 0.

    They lie in tiles that hold rows of one request: past its end as where nothing is seen.
    """
    out_part: tl.constexpr = form.out_part
    sizes = sizes_of(sizes)
    heads, tiles = sizes[3], sizes[4]
    number = tl.program_id(0)
    head, of_head = (number % heads).to(tl.int64), number // heads
    batch, tile = (of_head // tiles).to(tl.int64), of_head % tiles
    row_begin, query_len, first = _tile_of_rows(query_starts, tile, sizes, form.rows)
    token = first + tl.arange(0, form.rows)
    end = tl.where(first < 0, 0, query_len)
    live, place = (token >= 0) & (token < end), (row_begin + token).to(tl.int64)
    at, far = d_out + batch * d_out_strides[0] + head * d_out_strides[2], (place * d_out_strides[1])[:, None]
    d_0, d_1 = two_parts(at, far, token, 0, end, out_part, tl.float32, False)
    at, far = out + batch * out_strides[0] + head * out_strides[2], (place * out_strides[1])[:, None]
    o_0, o_1 = two_parts(at, far, token, 0, end, out_part, tl.float32, False)
    shared = tl.sum(d_0 * o_0, 1)
    if out_part.two:
        shared += tl.sum(d_1 * o_1, 1)
    far = batch * size(lse_strides[0]) + place * size(lse_strides[1]) + head * size(lse_strides[2])
    logarithm = tl.load(lse + far, mask=live, other=HIDDEN)
    sees = logarithm != HIDDEN
    logarithm = tl.where(sees, logarithm, 0.0)
    total = logarithm
    if sinks is not None:
        sink = tl.load(sinks + head)
        largest = tl.maximum(logarithm, sink)
        total = largest + tl.log(1.0 + tl.exp2(-tl.abs(logarithm - sink) * LOG2_E))
        lost = tl.where(sees, tl.exp2((sink - total) * LOG2_E) * shared, 0.0)
        tl.store(d_sink_parts + (head * (tl.num_programs(0) // heads) + number // heads), -tl.sum(lost, 0))
    if d_lse is not None:
        far = batch * size(d_lse_strides[0]) + place * size(d_lse_strides[1]) + head * size(d_lse_strides[2])
        shared -= tl.load(d_lse + far, mask=live, other=0.0) * tl.exp2((total - logarithm) * LOG2_E)
    to = ((batch * heads + head) * tiles + tile) * form.rows + tl.arange(0, form.rows)
    tl.store(totals + to, tl.where(sees, total * LOG2_E, float("inf")))
    tl.store(deltas + to, tl.where(sees, shared, 0.0))


@triton.jit
def _tile_of_rows(query_starts, tile, sizes, rows: tl.constexpr):
    """Where a tile's request begins, how long it is, and the tile's first row in it: negative for a tile of nobody."""
    row_begin = 0
    query_len = sizes[1]
    if query_starts is not None:
        request, tile = request_of(query_starts, tile, sizes, 1, rows)
        row_begin, query_len, _, _ = extent_of(request, query_starts, None, None, sizes)
    return row_begin, query_len, tile * rows


@triton.jit
def _places_of_rows(query_starts, row_begin, request, sizes, padded: tl.constexpr):
    """Of totals and deltas: how many a head has, and where a request's begin, which has tiles of its own."""
    if query_starts is not None:
        return (sizes[1] // padded + sizes[0]) * padded, (row_begin // padded + request) * padded
    else:
        return tl.cdiv(sizes[1], padded) * padded, 0


@triton.jit(do_not_specialize=["num_parts"])
def sinks_kernel(d_sink_parts, d_sinks, num_parts, width: tl.constexpr):
    """A head's parts, summed in their order."""
    head = tl.program_id(0)
    total = tl.full([width], 0.0, tl.float32)
    for start in tl.range(0, num_parts, width):
        place = start + tl.arange(0, width)
        total += tl.load(d_sink_parts + head.to(tl.int64) * num_parts + place, mask=place < num_parts, other=0.0)
    tl.store(d_sinks + head, tl.sum(total, 0))


@triton.jit
def _requests_of(first, last, key_starts, key_lens, num_requests):
    """The first and the last request that has any of these keys."""
    least = num_requests
    most = num_requests * 0 - 1
    for start in tl.range(0, num_requests, 128):
        request = start + tl.arange(0, 128)
        there = request < num_requests
        begin = tl.load(key_starts + request, mask=there, other=0)
        count = tl.load(key_lens + request, mask=there, other=0)
        meets = there & (count > 0) & (begin <= last) & (begin + count > first)
        least = tl.minimum(least, tl.min(tl.where(meets, request, num_requests), 0))
        most = tl.maximum(most, tl.max(tl.where(meets, request, -1), 0))
    return least, most


@triton.jit
def _slopes(scores, flows, shrunk, total, delta, factor, form: tl.constexpr):
    """Weights, and what the scores' gradients are, of scores and of d_out . value; total and delta shaped to fit."""
    weights = tl.exp2(tl.fma(scores, factor, -total))
    slopes = weights * (flows - delta)
    if form.capped:
        slopes *= 1.0 - shrunk * shrunk
    return weights, slopes


@triton.jit
def _add_slopes(d_query, tile, slopes, keys, width: tl.constexpr, form: tl.constexpr):
    """Adds what a tile of keys gives to the gradients of a tile of rows, both as columns."""
    precision: tl.constexpr = form.precision
    value_type: tl.constexpr = form.value_type
    found = tl.full([width, form.rows], 0.0, tl.float32)
    found = dot(tl.trans(rounded_to(keys, value_type)), slopes, found, precision)
    d_query.atomic_add([tile * width, 0], found)


@triton.jit
def _rows_walked(
    sums,
    k_0,
    k_1,
    v_0,
    v_1,
    query,
    d_out,
    totals,
    deltas,
    d_query_0,
    d_query_1,
    first_keys,
    last_keys,
    slope,
    mask,
    mask_states,
    bounds,
    tile,
    steps,
    here,
    shift,
    row_begin,
    key_len,
    num_columns,
    num_words,
    window,
    scale,
    softcap,
    form: tl.constexpr,
):
    """The sums of a tile of keys with what the rows of one head give. sums: of keys in two parts, then of values.

    Pointers are those of the request's first row. steps: between rows of query, d_out and mask, mask's columns, states.
    """
    key_part: tl.constexpr = form.key_part
    out_part: tl.constexpr = form.out_part
    precision: tl.constexpr = form.precision
    value_type: tl.constexpr = form.value_type
    dk_0, dk_1, dv_0, dv_1 = sums
    any_begin, any_end, all_begin, all_end = bounds
    begin, whole_begin, whole_end, end = whole_tiles(any_begin, any_end, all_begin, all_end, form.rows)
    # Rows past the end need no comparison: their total is infinite.
    whole_end = tl.where(all_end >= any_end, tl.maximum(whole_begin, end), whole_end)
    in_rows = tl.arange(0, form.rows)
    column = num_columns + tl.min(here, 0) - key_len
    factor = LOG2_E if form.natural else scale * LOG2_E
    for phase in tl.static_range(3):
        if phase < 2 or form.has_left:
            start_at = begin if phase == 0 else (whole_begin if phase == 1 else whole_end)
            stop_at = whole_begin if phase == 0 else (whole_end if phase == 1 else end)
            for start in tl.range(start_at, tl.minimum(stop_at, end), form.rows, disable_licm=True):
                token = start + in_rows
                live = (token >= any_begin) & (token < any_end)
                moved = (start + 0 * num_words).to(tl.int64)
                # Of a tile seen whole, rows past the end are the last one again, with weights of 0: no load is masked.
                place = tl.minimum(in_rows, any_end - 1 - start) if phase == 1 else in_rows
                far = place[:, None].to(tl.int64) if form.wide else place[:, None]
                state = 2
                if mask_states is not None:
                    last = row_begin + tl.minimum(start + form.rows, any_end) - 1
                    state = mask_state(mask_states, steps[4], row_begin + start, last, column, num_columns, form)
                if state != 1:
                    q_0, q_1 = two_parts(
                        query + moved * steps[0],
                        far * steps[0],
                        token,
                        any_begin,
                        any_end,
                        key_part,
                        form.score_type,
                        phase == 1,
                    )
                    o_0, o_1 = two_parts(
                        d_out + moved * steps[1],
                        far * steps[1],
                        token,
                        any_begin,
                        any_end,
                        out_part,
                        value_type,
                        phase == 1,
                    )
                    total = tl.load(totals + moved + in_rows)[None, :]
                    delta = tl.load(deltas + moved + in_rows)[None, :]
                    scores = product(k_0, k_1, q_0, q_1, key_part.two, precision)
                    own = (token + shift)[None, :]
                    scores, shrunk = adjusted(scores, own, here[:, None], slope, scale, softcap, form)
                    if form.masked == "float":
                        from_mask = (mask + (row_begin + token).to(tl.int64) * steps[2])[None, :]
                        columns = (column + tl.arange(0, form.keys))[:, None]
                        scores += mask_tile(from_mask, columns, steps[3], num_columns, live[None, :])
                    if phase != 1:
                        seen = live[None, :] & seen_by(own, here[:, None], 0, key_len, window, form)
                        if first_keys is not None:
                            first_key = tl.load(first_keys + token, mask=live, other=0)[None, :]
                            last_key = tl.load(last_keys + token, mask=live, other=-1)[None, :]
                            seen = seen & (here[:, None] >= first_key) & (here[:, None] <= last_key)
                        scores = tl.where(seen, scores, HIDDEN)
                    if form.masked == "bits" and state == 3:
                        words = mask + (row_begin + token).to(tl.int64) * steps[2]
                        bits = mask_bits(words, column, num_words, live, form.keys)
                        scores = tl.where(tl.trans(bits), scores, HIDDEN)
                    flows = product(v_0, v_1, o_0, o_1, out_part.two, precision)
                    weights, slopes = _slopes(scores, flows, shrunk, total, delta, factor, form)
                    if phase != 1:
                        slopes = tl.where(scores == HIDDEN, 0.0, slopes)  # even where what nobody sees is NaN
                    weights, slopes = rounded_to(weights, value_type), rounded_to(slopes, value_type)
                    dv_0 = dot(weights, o_0, dv_0, precision)
                    dk_0 = dot(slopes, rounded_to(q_0, value_type), dk_0, precision)
                    if out_part.two:
                        dv_1 = dot(weights, o_1, dv_1, precision)
                    if key_part.two:
                        dk_1 = dot(slopes, rounded_to(q_1, value_type), dk_1, precision)
                    if d_query_0 is not None:
                        _add_slopes(d_query_0, tile + start // form.rows, slopes, k_0, key_part.width_0, form)
                        if key_part.two:
                            _add_slopes(d_query_1, tile + start // form.rows, slopes, k_1, key_part.width_1, form)
    return dk_0, dk_1, dv_0, dv_1


@triton.jit
def keys_kernel(
    query,
    key,
    value,
    d_out,
    totals,
    deltas,
    d_key,
    d_value,
    d_query_0,
    d_query_1,
    query_starts,
    key_starts,
    key_lens,
    first_keys,
    last_keys,
    alibi_slopes,
    mask,
    mask_states,
    query_strides,
    key_strides,
    value_strides,
    d_out_strides,
    d_key_strides,
    d_value_strides,
    mask_strides,
    state_strides,
    alibi_stride,
    sizes,
    window,
    scale,
    softcap,
    form: tl.constexpr,
):
    """Gradients of a tile of keys and values of one KV head, from all rows of the heads that read it."""
    sizes, window = sizes_of(sizes), (size(window[0]), size(window[1]))
    key_part: tl.constexpr = form.key_part
    out_part: tl.constexpr = form.out_part
    num_queries, num_keys, group = sizes[1], sizes[2], sizes[5]
    number = tl.program_id(0)
    base = number % sizes[4] * form.keys
    kv_head = (number // sizes[4] % sizes[3]).to(tl.int64)
    batch = (number // (sizes[4] * sizes[3])).to(tl.int64)
    in_tile = tl.arange(0, form.keys)
    place = (base + in_tile).to(tl.int64)[:, None]
    key_end = num_keys
    first_request, last_request = batch.to(tl.int32), batch.to(tl.int32)
    if query_starts is not None:
        first_request, last_request = _requests_of(base, base + form.keys - 1, key_starts, key_lens, sizes[0])
    elif key_lens is not None:
        key_end = held(tl.load(key_lens + batch), 0, num_keys)
    key += batch * key_strides[0] + kv_head * key_strides[2]
    value += batch * value_strides[0] + kv_head * value_strides[2]
    if d_query_0 is None:
        k_0, k_1 = two_parts(key, place * key_strides[1], base + in_tile, 0, key_end, key_part, form.score_type, False)
    v_0, v_1 = two_parts(value, place * value_strides[1], base + in_tile, 0, key_end, out_part, form.value_type, False)
    dk_0 = tl.full([form.keys, key_part.width_0], 0.0, tl.float32)
    dk_1 = tl.full([form.keys, key_part.width_1 if key_part.two else 16], 0.0, tl.float32)
    dv_0 = tl.full([form.keys, out_part.width_0], 0.0, tl.float32)
    dv_1 = tl.full([form.keys, out_part.width_1 if out_part.two else 16], 0.0, tl.float32)
    # Computed anew in each round, what follows from the tile's place takes no registers while rows pass.
    kept = base
    for request in tl.range(first_request, last_request + 1, disable_licm=True):
        kept = tl.where(group > 0, kept, 0)
        row_begin, query_len, key_begin, key_len = extent_of(request, query_starts, key_starts, key_lens, sizes)
        first = kept - key_begin
        shift = 0 if form.top_left else key_len - query_len
        seen_first, seen_end = tl.maximum(first, 0), tl.minimum(first + form.keys, key_len)
        any_begin, any_end, all_begin, all_end = rows_of_keys(seen_first, seen_end - 1, shift, query_len, window, form)
        any_end = tl.where(seen_first < seen_end, any_end, any_begin)
        # A tile that is not all this request's is compared with all rows.
        whole = (first >= 0) & (first + form.keys <= key_len) & (first_keys is None)
        all_begin, all_end = tl.where(whole, all_begin, any_end), tl.where(whole, all_end, any_end)
        if d_query_0 is not None:
            # What is no key of this request's rows is 0, whatever it holds: it would be multiplied by slopes of 0.
            seen_begin, seen_last, _, _ = keys_of_rows(0, query_len - 1, shift, key_len, window, form)
            there = in_tile + first
            place = (kept + in_tile).to(tl.int64)[:, None]
            k_0, k_1 = two_parts(
                key, place * key_strides[1], there, seen_begin, seen_last, key_part, form.score_type, False
            )
        row = row_begin.to(tl.int64)
        head_rows, first_row = _places_of_rows(query_starts, row_begin, request, sizes, form.padded)
        from_first, from_last = first_keys, last_keys
        if first_keys is not None:
            from_first, from_last = from_first + batch * num_queries + row, from_last + batch * num_queries + row
        for member in tl.range(0, group, disable_licm=True):
            head = kv_head * group + member
            from_row = (batch * sizes[3] * group + head) * head_rows + first_row
            slope, from_mask, from_states = alibi_slopes, mask, mask_states
            if alibi_slopes is not None:
                slope = tl.load(alibi_slopes + request * alibi_stride + head)
            if mask is not None:
                from_mask = mask + batch * mask_strides[0] + head * mask_strides[1]
            if mask_states is not None:
                from_states = mask_states + batch * state_strides[0] + head * state_strides[1]
            dk_0, dk_1, dv_0, dv_1 = _rows_walked(
                (dk_0, dk_1, dv_0, dv_1),
                k_0,
                k_1,
                v_0,
                v_1,
                query + batch * query_strides[0] + row * query_strides[1] + head * query_strides[2],
                d_out + batch * d_out_strides[0] + row * d_out_strides[1] + head * d_out_strides[2],
                totals + from_row,
                deltas + from_row,
                d_query_0,
                d_query_1,
                from_first,
                from_last,
                slope,
                from_mask,
                from_states,
                (any_begin, any_end, all_begin, all_end),
                (from_row // form.rows).to(tl.int32),
                (query_strides[1], d_out_strides[1], mask_strides[2], mask_strides[3], state_strides[2]),
                first + in_tile,
                shift,
                row_begin,
                key_len,
                sizes[6],
                sizes[7],
                window,
                scale,
                softcap,
                form,
            )
    place, live = (kept + in_tile).to(tl.int64)[:, None], kept + in_tile < num_keys
    d_key += batch * d_key_strides[0] + kv_head * d_key_strides[2]
    d_value += batch * d_value_strides[0] + kv_head * d_value_strides[2]
    store_parts(d_key, place * d_key_strides[1], dk_0 * scale, dk_1 * scale, live, key_part)
    store_parts(d_value, place * d_value_strides[1], dv_0, dv_1, live, out_part)


@triton.jit
def queries_kernel(
    query,
    key,
    value,
    d_out,
    totals,
    deltas,
    d_query,
    query_starts,
    key_starts,
    key_lens,
    first_keys,
    last_keys,
    alibi_slopes,
    mask,
    mask_states,
    query_strides,
    key_strides,
    value_strides,
    d_out_strides,
    d_query_strides,
    mask_strides,
    state_strides,
    alibi_stride,
    sizes,
    window,
    scale,
    softcap,
    form: tl.constexpr,
):
    """Gradients of a tile of query rows of one head, from all keys they see. Its walk is that of the forward."""
    sizes, window = sizes_of(sizes), (size(window[0]), size(window[1]))
    rows: tl.constexpr = form.rows
    key_part: tl.constexpr = form.key_part
    out_part: tl.constexpr = form.out_part
    precision: tl.constexpr = form.precision
    value_type: tl.constexpr = form.value_type
    number = tl.program_id(0)
    tile = sizes[4] - 1 - number % sizes[4]
    head = (number // sizes[4] % sizes[3]).to(tl.int64)
    request = number // (sizes[4] * sizes[3])
    if query_starts is not None:
        request, tile = request_of(query_starts, tile, sizes, 1, rows)
    row_begin, query_len, key_begin, key_len = extent_of(request, query_starts, key_starts, key_lens, sizes)
    first = tile * rows
    if (first < 0) | (first >= query_len):
        return
    batch, kv_head = request.to(tl.int64), head // sizes[5]
    token, last = first + tl.arange(0, rows), tl.minimum(first + rows, query_len) - 1
    live, place = token < query_len, (row_begin + token).to(tl.int64)
    shift = 0 if form.top_left else key_len - query_len
    own = (token + shift)[:, None]
    at = query + batch * query_strides[0] + head * query_strides[2]
    q_0, q_1 = two_parts(at, place[:, None] * query_strides[1], token, 0, query_len, key_part, form.score_type, False)
    at = d_out + batch * d_out_strides[0] + head * d_out_strides[2]
    o_0, o_1 = two_parts(at, place[:, None] * d_out_strides[1], token, 0, query_len, out_part, value_type, False)
    head_rows, first_row = _places_of_rows(query_starts, row_begin, request, sizes, form.padded)
    in_totals = (head + (0 if query_starts is not None else batch) * sizes[3]) * head_rows + first_row + token
    total = tl.load(totals + in_totals)[:, None]
    delta = tl.load(deltas + in_totals)[:, None]
    any_begin, any_end, all_begin, all_end = keys_of_rows(first, last, shift, key_len, window, form)
    first_key, last_key = token, token
    if first_keys is not None:
        token_place = place if query_starts is not None else place + batch * sizes[1]
        first_key = tl.load(first_keys + token_place, mask=live, other=0)
        last_key = tl.load(last_keys + token_place, mask=live, other=-1)
        any_begin, any_end, all_begin, all_end = narrowed(
            any_begin, any_end, all_begin, all_end, first_key, last_key, live
        )
    begin, whole_begin, whole_end, end = whole_tiles(any_begin, any_end, all_begin, all_end, form.keys)
    slope = alibi_slopes
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch * alibi_stride + head)
    if mask is not None:
        mask += batch * mask_strides[0] + head * mask_strides[1] + place * mask_strides[2]
    if mask_states is not None:
        mask_states += batch * state_strides[0] + head * state_strides[1]
    in_tile = tl.arange(0, form.keys)
    far = in_tile[:, None].to(tl.int64) if form.wide else in_tile[:, None]
    key += batch * key_strides[0] + key_begin.to(tl.int64) * key_strides[1] + kv_head * key_strides[2]
    value += batch * value_strides[0] + key_begin.to(tl.int64) * value_strides[1] + kv_head * value_strides[2]
    factor = LOG2_E if form.natural else scale * LOG2_E
    dq_0 = tl.full([rows, key_part.width_0], 0.0, tl.float32)
    dq_1 = tl.full([rows, key_part.width_1 if key_part.two else 16], 0.0, tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or form.has_left or first_keys is not None:
            start_at = begin if phase == 0 else (whole_begin if phase == 1 else whole_end)
            stop_at = whole_begin if phase == 0 else (whole_end if phase == 1 else end)
            for start in tl.range(start_at, tl.minimum(stop_at, end), form.keys):
                here = start + in_tile
                moved = (start + 0 * sizes[2]).to(tl.int64)
                column = sizes[6] + start - key_len
                state = 2
                if mask_states is not None:
                    state = mask_state(
                        mask_states, state_strides[2], row_begin + first, row_begin + last, column, sizes[6], form
                    )
                if state != 1:
                    at = key + moved * key_strides[1]
                    k_0, k_1 = two_parts(
                        at, far * key_strides[1], here, any_begin, any_end, key_part, form.score_type, phase == 1
                    )
                    at = value + moved * value_strides[1]
                    v_0, v_1 = two_parts(
                        at, far * value_strides[1], here, any_begin, any_end, out_part, value_type, phase == 1
                    )
                    scores = product(q_0, q_1, k_0, k_1, key_part.two, precision)
                    scores, shrunk = adjusted(scores, own, here[None, :], slope, scale, softcap, form)
                    if form.masked == "float":
                        columns = (column + in_tile)[None, :]
                        scores += mask_tile(mask[:, None], columns, mask_strides[3], sizes[6], live[:, None])
                    if phase != 1:
                        seen = seen_by(own, here[None, :], any_begin, any_end, window, form)
                        if first_keys is not None:
                            seen = seen & (here[None, :] >= first_key[:, None]) & (here[None, :] <= last_key[:, None])
                        scores = tl.where(seen, scores, HIDDEN)
                    if form.masked == "bits" and state == 3:
                        bits = mask_bits(mask, column, sizes[7], live, form.keys)
                        scores = tl.where(bits, scores, HIDDEN)
                    flows = product(o_0, o_1, v_0, v_1, out_part.two, precision)
                    _, slopes = _slopes(scores, flows, shrunk, total, delta, factor, form)
                    slopes = rounded_to(slopes, value_type)
                    dq_0 = dot(slopes, rounded_to(k_0, value_type), dq_0, precision)
                    if key_part.two:
                        dq_1 = dot(slopes, rounded_to(k_1, value_type), dq_1, precision)
    at = d_query + batch * d_query_strides[0] + head * d_query_strides[2]
    store_parts(at, place[:, None] * d_query_strides[1], dq_0 * scale, dq_1 * scale, live, key_part)


@triton.jit
def round_kernel(d_query_0, d_query_1, d_query, query_starts, d_query_strides, sizes, scale, form: tl.constexpr):
    """Gradients of a tile of query rows from their sums, which lie as columns."""
    sizes = sizes_of(sizes)
    part: tl.constexpr = form.key_part
    number = tl.program_id(0)
    tile, head = number % sizes[4], (number // sizes[4] % sizes[3]).to(tl.int64)
    batch = (number // (sizes[4] * sizes[3])).to(tl.int64)
    row_begin, query_len, first = _tile_of_rows(query_starts, tile, sizes, form.rows)
    if (first < 0) | (first >= query_len):
        return
    token, row = first + tl.arange(0, form.rows), tl.arange(0, form.rows)
    at = number.to(tl.int64) * (form.rows * part.width_0) + tl.arange(0, part.width_0)[:, None] * form.rows
    sums_0 = tl.trans(tl.load(d_query_0 + at + row[None, :])) * scale
    sums_1 = sums_0
    if part.two:
        at = number.to(tl.int64) * (form.rows * part.width_1) + tl.arange(0, part.width_1)[:, None] * form.rows
        sums_1 = tl.trans(tl.load(d_query_1 + at + row[None, :])) * scale
    at = d_query + batch * d_query_strides[0] + head * d_query_strides[2]
    far = (row_begin + token).to(tl.int64)[:, None] * d_query_strides[1]
    store_parts(at, far, sums_0, sums_1, token < query_len, part)


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Fills arrays["d_query"], ["d_key"], ["d_value"] and, with sinks, ["d_sinks"]; nothing is read back."""
    _launch(arrays, backward_calls(arrays, options))


def run_atomic(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """The same, with the queries' gradients added up in memory in whatever order tiles of keys come."""
    _launch(arrays, backward_calls(arrays, options, atomic=True))


def _launch(arrays: Mapping[str, Any], calls: Iterator[tuple[str, KernelCall]]) -> None:
    with on_device_of(arrays["query"]):
        for name, call in calls:
            _KERNELS[name][(call.num_programs,)](**call.arguments, num_warps=call.num_warps, num_stages=call.num_stages)


def variants() -> list[Variant]:
    """Configurations that `run` picks."""
    return backward_variants(_KERNELS)


_KERNELS = {
    "rows": rows_kernel,
    "keys": keys_kernel,
    "queries": queries_kernel,
    "round": round_kernel,
    "sinks": sinks_kernel,
}
