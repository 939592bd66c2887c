"""The steps of paged attention on one tile: pages, codes, queries, and partial results joined, kept and written."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.attention_scores import HIDDEN, LN_2, LOG2_E, rounded_to

# In powers of two: how much a value's scale may count beside its score in the largest of a row.
LEAST_SHIFT, MOST_SHIFT = tl.constexpr(-40.0), tl.constexpr(60.0)


# Reading


@triton.jit
def pages_at(table, key, max_pages, num_pages, setup: tl.constexpr):
    """The page of a tile of keys that begins at `key`, or of each of its keys, as a 64-bit number inside the pages."""
    index = (key if setup.one_page else key + tl.arange(0, setup.keys)) // setup.page
    page = tl.load(table + index, mask=index < max_pages, other=0, eviction_policy="evict_last")
    return tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)


@triton.jit
def rows_at(places, live, dim: tl.constexpr, block: tl.constexpr, first: tl.constexpr, evict: tl.constexpr):
    """Elements first .. first + block of rows of `dim`; zeros in rows that are not live and past the end."""
    item = first + tl.arange(0, block)
    inside = live[:, None]
    if first + block > dim:
        inside = inside & (item < dim)[None, :]
    return tl.load(places[:, None] + item[None, :], mask=inside, other=0, eviction_policy=evict)


@triton.jit
def queries_at(places, live, setup: tl.constexpr):
    """The queries of a tile's rows, in one part or two, in the type they are multiplied in."""
    evict: tl.constexpr = "evict_last"
    block: tl.constexpr = setup.block
    rest: tl.constexpr = setup.rest
    products: tl.constexpr = setup.products
    q = rounded_to(rows_at(places, live, setup.head_dim, block, 0, evict), products)
    q_rest = q
    if rest > 0:
        q_rest = rounded_to(rows_at(places, live, setup.head_dim, rest, block, evict), products)
    return q, q_rest


@triton.jit
def scales_at(scales, strides, page, slot, live, other: tl.constexpr):
    """The scales of a tile of keys."""
    first, of_page, of_row = strides
    return tl.load(scales + (first + page * of_page + slot * of_row), mask=live, other=other)


@triton.jit
def numbers(codes, dtype: tl.constexpr, setup: tl.constexpr):
    """What pages hold [keys, items] as numbers [keys, dim] of a type, before any scale."""
    if setup.format == "int4":
        low = (((codes.to(tl.int32) & 15) ^ 8) - 8).to(tl.float32)
        high = (((codes.to(tl.int32) >> 4) ^ 8) - 8).to(tl.float32)
        found = tl.interleave(rounded_to(low, dtype), rounded_to(high, dtype))
    elif setup.format == "float8_bits":
        # The exponent's bias is 8 less than float16's; what is no number is 0x7F of either sign.
        bits = codes.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        found = rounded_to(tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0), dtype)
    elif setup.format == "float8":
        found = codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif codes.dtype == dtype:
        found = codes
    else:
        found = rounded_to(codes.to(tl.float32), dtype)
    return found


# Partial results


@triton.jit
def nothing(setup: tl.constexpr):
    """The result over no keys: largest score, sum of weights, weighted sum of values."""
    top = tl.full([setup.rows], HIDDEN, tl.float32)
    return top, tl.full([setup.rows], 0.0, tl.float32), tl.full([setup.rows, setup.values], 0.0, tl.float32)


@triton.jit
def joined(top, total, sums, other_top, other_total, other_sums):
    """Two partial results as one.

    NOTE: fused by hand, for all places that join chunks must round alike.
    """
    larger = tl.maximum(top, other_top)
    safe = tl.where(larger == HIDDEN, 0.0, larger)
    mine = tl.exp2(top - safe)
    other = tl.exp2(other_top - safe)
    total = tl.fma(total, mine, other_total * other)
    sums = tl.fma(sums, tl.broadcast_to(mine[:, None], sums.shape), other_sums * other[:, None])
    return larger, total, sums


@triton.jit
def keep(partial_out, partial_sums, slot, top, total, sums, setup: tl.constexpr):
    """Writes a partial result to its slot."""
    row = tl.arange(0, setup.rows)
    item = tl.arange(0, setup.values)
    place = slot.to(tl.int64) * setup.rows
    tl.store(partial_sums + place * 2 + row, top)
    tl.store(partial_sums + place * 2 + setup.rows + row, total)
    tl.store(partial_out + (place + row)[:, None] * setup.values + item[None, :], sums)


@triton.jit
def kept(partial_out, partial_sums, slot, setup: tl.constexpr):
    """Reads one, past the first cache, which does not know what other multiprocessors write."""
    row = tl.arange(0, setup.rows)
    item = tl.arange(0, setup.values)
    place = slot.to(tl.int64) * setup.rows
    top = tl.load(partial_sums + place * 2 + row, cache_modifier=".cg")
    total = tl.load(partial_sums + place * 2 + setup.rows + row, cache_modifier=".cg")
    places = partial_out + (place + row)[:, None] * setup.values + item[None, :]
    return top, total, tl.load(places, cache_modifier=".cg")


@triton.jit
def arrived_last(counter, pieces):
    """Whether all other pieces of an item have been kept. The last one to come leaves the counter as it was: 0."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == pieces - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return last


@triton.jit
def write_rows(out, lse, sinks, token, head, live, top, total, sums, strides, setup: tl.constexpr):
    """The results of a tile's rows: values over the sum of weights and the sink's; zeros where nothing was seen."""
    out_token, out_head, lse_token, lse_head = strides
    everything = total
    if setup.sinks:
        sink = tl.load(sinks + head, mask=live, other=0.0)
        everything += tl.exp2(sink * LOG2_E - tl.where(top == HIDDEN, 0.0, top))
    nobody = total == 0.0
    everything = tl.where(nobody, 1.0, everything)
    result = tl.where(nobody[:, None], 0.0, sums / everything[:, None])
    logarithm = tl.where(nobody, HIDDEN, (top + tl.log2(tl.where(nobody, 1.0, total))) * LN_2)
    item = tl.arange(0, setup.values)
    inside = live[:, None] & (item < setup.value_dim)[None, :]
    places = out + token.to(tl.int64) * out_token + head.to(tl.int64) * out_head
    tl.store(places[:, None] + item[None, :], rounded_to(result, out.dtype.element_ty), mask=inside)
    tl.store(lse + token.to(tl.int64) * lse_token + head.to(tl.int64) * lse_head, logarithm, mask=live)
