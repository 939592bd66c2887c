"""Attention over dense or ragged keys: FlashAttention-2's forward, every option of the op.

Wins: prefill; also few queries where there are as many requests and KV heads as multiprocessors.
Schedule: a program has a tile of query rows of one head, or of few queries all heads of a KV head (packed), so that
each key is read once for them; it walks the keys that any of its rows sees, tile by tile, an online softmax in base 2:
first those that some rows do not see, then those seen by all, which need no comparison, then again those seen in part.
Ragged: grid from the sizes of the arrays alone, the request of a tile found on the device. Tiles of a bool mask that
nobody sees are skipped. Source: Dao 2023, "FlashAttention-2"; docs/kernels/attention_gpu.md.
A row's bits follow from its own keys: tiles of keys begin at multiples of their size, whole and masked tiles compute
alike, and with deterministic=True a tile's shape follows from types and options alone.
Error: products of 16-bit types are exact, sums are float32, weights are rounded to 16 bits before they meet the values;
float32 is multiplied in three products of tf32 (2^-22), on AMD in full. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from headrace.kernels.triton.attention_call import forward_call
from headrace.kernels.triton.attention_mask import mask_bits, mask_state
from headrace.kernels.triton.attention_scores import (
    HIDDEN,
    LN_2,
    LOG2_E,
    adjusted,
    extent_of,
    keys_of_rows,
    mask_tile,
    narrowed,
    product,
    request_of,
    rounded_to,
    seen_by,
    size,
    sizes_of,
    store_parts,
    two_parts,
    whole_tiles,
)
from headrace.kernels.triton.attention_variants import forward_variants
from headrace.kernels.triton.launch import dot, on_device_of
from headrace.kernels.triton.variants import Variant


@triton.jit
def attention_kernel(
    query,
    key,
    value,
    out,
    lse,
    query_starts,
    key_starts,
    key_lens,
    first_keys,
    last_keys,
    key_scales,
    value_scales,
    sinks,
    alibi_slopes,
    mask,
    mask_states,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    lse_strides,
    key_scale_strides,
    value_scale_strides,
    mask_strides,
    state_strides,
    alibi_stride,
    sizes,
    window,
    scale,
    softcap,
    form: tl.constexpr,
):
    sizes, window = sizes_of(sizes), (size(window[0]), size(window[1]))
    rows: tl.constexpr = form.rows
    packed: tl.constexpr = form.packed
    query_part: tl.constexpr = form.query_part
    key_part: tl.constexpr = form.key_part
    value_part: tl.constexpr = form.value_part
    out_part: tl.constexpr = form.out_part
    precision: tl.constexpr = form.precision
    # The last rows first: under causality they see most, and what is left for the end is short.
    number = tl.program_id(0)
    tile = sizes[4] - 1 - number % sizes[4]
    block = number // sizes[4] % sizes[3]
    request = number // (sizes[4] * sizes[3])
    if query_starts is not None:
        request, tile = request_of(query_starts, tile, sizes, packed, rows)
    row_begin, query_len, key_begin, key_len = extent_of(request, query_starts, key_starts, key_lens, sizes)
    if (tile < 0) | (tile * rows >= query_len * packed):
        return

    # A row is a token and, where heads are packed, one of them.
    index = tile * rows + tl.arange(0, rows)
    token = index // packed
    head = (block * packed + index % packed).to(tl.int64)
    kv_head = (block // (sizes[5] // packed)).to(tl.int64)
    live, batch, place = token < query_len, request.to(tl.int64), (row_begin + token).to(tl.int64)
    first, last = tile * rows // packed, tl.minimum((tile * rows + rows - 1) // packed, query_len - 1)
    shift = 0 if form.top_left else key_len - query_len
    own = token + shift
    from_query = (batch * query_strides[0] + place * query_strides[1] + head * query_strides[2])[:, None]
    q_0, q_1 = two_parts(query, from_query, token, 0, query_len, query_part, form.score_type, False)

    any_begin, any_end, all_begin, all_end = keys_of_rows(first, last, shift, key_len, window, form)
    first_key, last_key = own, own
    if first_keys is not None:
        token_place = place if query_starts is not None else place + batch * sizes[1]
        first_key = tl.load(first_keys + token_place, mask=live, other=0)
        last_key = tl.load(last_keys + token_place, mask=live, other=-1)
        any_begin, any_end, all_begin, all_end = narrowed(
            any_begin, any_end, all_begin, all_end, first_key, last_key, live
        )
    begin, whole_begin, whole_end, end = whole_tiles(any_begin, any_end, all_begin, all_end, form.keys)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + batch * alibi_stride + head)[:, None]
    if mask is not None:
        mask += batch * mask_strides[0] + head * mask_strides[1] + place * mask_strides[2]
    if mask_states is not None:
        mask_states += batch * state_strides[0] + block.to(tl.int64) * state_strides[1]

    # Keys and values of the tile at key n lie n tokens from these.
    in_tile = tl.arange(0, form.keys)
    far = in_tile[:, None].to(tl.int64) if form.wide else in_tile[:, None]
    key += batch * key_strides[0] + key_begin.to(tl.int64) * key_strides[1] + kv_head * key_strides[2]
    value += batch * value_strides[0] + key_begin.to(tl.int64) * value_strides[1] + kv_head * value_strides[2]
    key_far, value_far = far * key_strides[1], far * value_strides[1]
    if key_scales is not None:
        key_scales += _scales_at(key_scale_strides, batch, key_begin, kv_head)
    if value_scales is not None:
        value_scales += _scales_at(value_scale_strides, batch, key_begin, kv_head)

    factor = LOG2_E if form.natural else scale * LOG2_E
    top, total = tl.full([rows], HIDDEN, tl.float32), tl.full([rows], 0.0, tl.float32)
    sum_0 = tl.full([rows, value_part.width_0], 0.0, tl.float32)
    sum_1 = tl.full([rows, value_part.width_1 if value_part.two else 16], 0.0, tl.float32)
    for phase in tl.static_range(3):
        if phase > 0 or form.has_left or first_keys is not None:
            start_at = begin if phase == 0 else (whole_begin if phase == 1 else whole_end)
            stop_at = whole_begin if phase == 0 else (whole_end if phase == 1 else end)
            for start in tl.range(start_at, tl.minimum(stop_at, end), form.keys):
                here = start + in_tile
                moved = (start + 0 * key_len).to(tl.int64)
                column = sizes[6] + start - key_len
                state = 2
                if mask_states is not None:
                    state = mask_state(
                        mask_states, state_strides[2], row_begin + first, row_begin + last, column, sizes[6], form
                    )
                if state != 1:
                    from_key = key + moved * key_strides[1]
                    k_0, k_1 = two_parts(
                        from_key, key_far, here, any_begin, any_end, key_part, form.score_type, phase == 1
                    )
                    scores = product(q_0, q_1, k_0, k_1, key_part.two, precision)
                    if key_scales is not None:
                        scores *= _scales(key_scales + here * key_scale_strides[1], here, any_begin, any_end)[None, :]
                    scores, shrunk = adjusted(scores, own[:, None], here[None, :], slopes, scale, softcap, form)
                    if form.masked == "float":
                        columns = (column + in_tile)[None, :]
                        scores += mask_tile(mask[:, None], columns, mask_strides[3], sizes[6], live[:, None])
                    if phase != 1:
                        seen = seen_by(own[:, None], here[None, :], any_begin, any_end, window, form)
                        if first_keys is not None:
                            seen = seen & (here[None, :] >= first_key[:, None]) & (here[None, :] <= last_key[:, None])
                        scores = tl.where(seen, scores, HIDDEN)
                    if form.masked == "bits" and state == 3:
                        bits = mask_bits(mask, column, sizes[7], live, form.keys)
                        scores = tl.where(bits, scores, HIDDEN)

                    weights, keep, top, total = _softened(scores, factor, top, total)
                    from_value = value + moved * value_strides[1]
                    v_0, v_1 = two_parts(
                        from_value, value_far, here, any_begin, any_end, value_part, form.loaded_value, phase == 1
                    )
                    if value_scales is not None:
                        by = _scales(value_scales + here * value_scale_strides[1], here, any_begin, any_end)[:, None]
                        v_0, v_1 = v_0 * by, v_1 * by
                    weights = rounded_to(weights, form.value_type)
                    sum_0 = dot(weights, rounded_to(v_0, form.value_type), sum_0 * keep[:, None], precision)
                    if value_part.two:
                        sum_1 = dot(weights, rounded_to(v_1, form.value_type), sum_1 * keep[:, None], precision)

    divisor = _divisor(total, top, sinks, head)[:, None]
    far = (batch * out_strides[0] + place * out_strides[1] + head * out_strides[2])[:, None]
    store_parts(out, far, sum_0 / divisor, sum_1 / divisor, live, out_part)
    logarithm = tl.where(total == 0, HIDDEN, top * LN_2 + tl.log(tl.where(total == 0, 1.0, total)))
    far = batch * size(lse_strides[0]) + place * size(lse_strides[1]) + head * size(lse_strides[2])
    tl.store(lse + far, logarithm, mask=live)


@triton.jit
def _softened(scores, factor, top, total):
    """Online softmax: a tile's weights, how much of earlier sums is kept, and the new largest score and total."""
    best = tl.maximum(top, tl.max(scores, 1) * factor)
    against = tl.where(best == HIDDEN, 0.0, best)
    weights = tl.exp2(tl.fma(scores, factor, -against[:, None]))
    keep = tl.exp2(top - against)
    return weights, keep, best, total * keep + tl.sum(weights, 1)


@triton.jit
def _divisor(total, top, sinks, head):
    """What weights sum up to, a sink's among them; 1 where nothing is seen."""
    divisor = total
    if sinks is not None:
        divisor += tl.exp2(tl.load(sinks + head) * LOG2_E - tl.where(top == HIDDEN, 0.0, top))
    return tl.where(total == 0, 1.0, divisor)


@triton.jit
def _scales_at(strides, batch, key_begin, kv_head):
    """Where the scales of a request's KV head begin."""
    return batch * strides[0] + key_begin.to(tl.int64) * strides[1] + kv_head * strides[2]


@triton.jit
def _scales(places, keys, begin, end):
    return tl.load(places, mask=(keys >= begin) & (keys < end), other=0.0)


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"]; nothing is read back from the device."""
    call = forward_call(arrays, options)
    if call.num_programs == 0:
        return
    with on_device_of(arrays["query"]):
        attention_kernel[(call.num_programs,)](**call.arguments, num_warps=call.num_warps, num_stages=call.num_stages)


def variants() -> list[Variant]:
    """Configurations that `run` picks."""
    return forward_variants(attention_kernel)
