"""sample on a GPU: a token for each row of logits, without a sort and without the host.

Wins always there. Bound: a row of 150000 logits is read twice, 0.3 us of the memory's time: the chain of launches and,
with filters, the passes over what is left of a row, 10 to 30 us, are all of it.
Schedule:
  1. `find_peaks`: each segment of a row (4096 logits, more for large vocabularies) gives its largest logit and place.
  2. `weigh_segments`: weights e^((x - peak) / temperature) are summed by segment; where a filter wants it, logits
     within 12 temperatures of the peak are put together at the beginning of their segment, in the order of ids.
  3. `draw_rows`, a program per row: the borders of top-k, top-p and typical-p are found by measuring how much lies
     above three values at once and going on between two of them, over what step 2 put together; over the whole row only
     when that does not reach. Then the segment, and in it the token, where the sum exceeds u of the total.
Source: Philox 4x32-10, Salmon et al. 2011; the rest is ops/sampling.py.
Error: weights are float32 (tl.exp), sums float32 over at most 128 numbers a lane, then float64 in a tree. All in an
order that follows from the row alone: the same bits in any company and any run. Draws are those of the CPU's kernels,
from the same random numbers, but where u falls within 1e-7 of the border between two tokens.
Speed: not measured yet (`headrace bench gpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.rows import packed, sent
from headrace.kernels.triton.variants import Variant

SEGMENT = 4096  # logits, twice and four times as many where a row has more than 64 segments
SEGMENTS = 64
TILE = 2048  # logits that draw_rows looks at together: some of every segment
BLOCK = 2048  # logits of a segment at a time
DRAW_WARPS = 8
REACH = 12.0  # temperatures below the peak that are put together
NO_TOKEN = -1

_FAR = tl.constexpr(1 << 30)
_LOWEST = tl.constexpr(-(1 << 31))


# Numbers of a row


@triton.jit
def order_of(x):
    """The order of floats as integers; -0 and +0 are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def weight_of(x, peak, temperature):
    return tl.exp(tl.div_rn(x - peak, temperature))


@triton.jit
def uniform(seed, step):
    """The number in [0, 1) of a draw: key `seed`, counter `step`, the first 53 bits."""
    c0 = step & 0xFFFFFFFF
    c1 = (step >> 32) & 0xFFFFFFFF
    c2 = c0 * 0
    c3 = c0 * 0
    k0 = seed & 0xFFFFFFFF
    k1 = (seed >> 32) & 0xFFFFFFFF
    for _ in tl.static_range(10):
        a_high, a_low = wide_product(c0, 0xD2511F53)
        b_high, b_low = wide_product(c2, 0xCD9E8D57)
        c0 = b_high ^ c1 ^ k0
        c1 = b_low
        c2 = a_high ^ c3 ^ k1
        c3 = a_low
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return ((c0 << 21) | (c1 >> 11)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def wide_product(a, b):
    """The high and the low 32 bits of a product, in int64 throughout: by halves of b, so that nothing overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


# Launch 1


@triton.jit
def find_peaks(
    logits, logits_stride, integers, peaks, places, vocab, num_segments, SEGMENT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest of a segment and the lowest id that has it; NaN where one is NaN or infinite."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(integers + row * 3 + 2) < 0:
        return
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], _FAR, tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(segment * SEGMENT, (segment + 1) * SEGMENT, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * logits_stride + ids, mask=ids < vocab, other=float("-inf"))
        bad |= (~(x < float("inf"))).to(tl.int32)
        place = tl.where(x > most, ids, place)
        most = tl.where(x > most, x, most)
    peak = tl.max(most)
    where = tl.min(tl.where(most == peak, place, _FAR))
    peak = tl.where(tl.max(bad) > 0, float("nan"), peak)
    tl.store(peaks + row * num_segments + segment, peak)
    tl.store(places + row * num_segments + segment, where)


@triton.jit
def row_peak(peaks, places, row, num_segments, SEGMENTS: tl.constexpr):
    """A row's largest logit, its place, and whether it can be drawn from."""
    segments = tl.arange(0, SEGMENTS)
    inside = segments < num_segments
    found = tl.load(peaks + row * num_segments + segments, mask=inside, other=float("-inf"))
    where = tl.load(places + row * num_segments + segments, mask=inside, other=_FAR)
    bad = tl.max((found != found).to(tl.int32))
    peak = tl.max(tl.where(found == found, found, float("-inf")))
    place = tl.min(tl.where(found == peak, where, _FAR))
    return peak, place, (bad == 0) & (peak > float("-inf"))


# Launch 2


@triton.jit
def weigh_segments(
    logits, logits_stride, reals, integers, peaks, places, sums, counts, near, near_ids, vocab, num_segments, reach,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight of a segment; with top-k or top-p what of it is near the peak, and its number."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(reals + row * 7).to(tl.float32)
    if (tl.load(integers + row * 3 + 2) < 0) | (temperature == 0):
        return
    peak, _, proper = row_peak(peaks, places, row, num_segments, SEGMENTS)
    if not proper:
        return
    top_k = tl.load(integers + row * 3)
    filtered = ((top_k > 0) & (top_k < vocab)) | (tl.load(reals + row * 7 + 1) < 1)
    total = tl.zeros([BLOCK], tl.float32)
    kept = 0
    base = (row * num_segments + segment) * SEGMENT
    for start in range(0, SEGMENT, BLOCK):
        ids = segment * SEGMENT + start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * logits_stride + ids, mask=ids < vocab, other=float("-inf"))
        total += weight_of(x, peak, temperature)
        if filtered:
            close = (x >= peak - reach * temperature) & (ids < vocab)
            here = base + kept + tl.cumsum(close.to(tl.int32), axis=0) - 1
            tl.store(near + here, x, mask=close)
            tl.store(near_ids + here, ids, mask=close)
            kept += tl.sum(close.to(tl.int32))
    tl.store(sums + row * num_segments + segment, tl.sum(total.to(tl.float64)))
    tl.store(counts + row * num_segments + segment, kept)


# Launch 3. A view of a row is what a program looks at: the row itself, or what of it lies near the peak, segment by
# segment, `lens` of each. Tiles are [SEGMENTS, COLUMNS]: some columns of all segments.


@triton.jit
def tile_of_view(view, start, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Logits, ids and what there is of a tile."""
    logits, near, near_ids, lens, whole = view
    columns = start + tl.arange(0, COLUMNS)[None, :]
    places = tl.arange(0, SEGMENTS)[:, None] * SEGMENT + columns
    return logits_at(logits, near, near_ids, whole, places, columns < lens[:, None])


@triton.jit
def logits_at(logits, near, near_ids, whole, places, mask):
    x = tl.load(logits + places, mask=mask & whole, other=float("-inf"))
    x = tl.maximum(x, tl.load(near + places, mask=mask & (not whole), other=float("-inf")))
    ids = tl.load(near_ids + places, mask=mask & (not whole), other=0)
    return x, tl.where(whole, places, ids), mask


@triton.jit
def kept_weights(x, ids, mask, peak, temperature, kept):
    """Weights of what top-k, top-p and min-p leave; 0 elsewhere."""
    border, last_id, lightest = kept
    key, weight = order_of(x), tl.where(mask, weight_of(x, peak, temperature), 0.0)
    inside = (key > border) | ((key == border) & (ids <= last_id))
    return tl.where(inside & (weight >= lightest), weight, 0.0)


@triton.jit
def nearness(x, weight, peak, temperature, mean):
    """Rising with nearness of a weight's logarithm to the mean one."""
    high, low = mean
    distance = tl.abs(tl.div_rn(x - peak, temperature) - high - low)
    return tl.where(weight > 0, order_of(0.0 - distance), _LOWEST)


@triton.jit
def keys_of_tile(view, start, row, typical, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a border is looked for in: logits with their weights, or nearness to the mean with the weights left."""
    peak, temperature, kept, mean = row
    x, ids, mask = tile_of_view(view, start, SEGMENT, SEGMENTS, COLUMNS)
    key = tl.where(mask, order_of(x), _LOWEST)
    weight = tl.where(mask, weight_of(x, peak, temperature), 0.0)
    if typical:
        weight = kept_weights(x, ids, mask, peak, temperature, kept)
        key = nearness(x, weight, peak, temperature, mean)
    return key, weight, ids, mask


@triton.jit
def measure(
    view, row, typical, limit1, limit2, limit3, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """How many, and how much weight, have keys of at least each of three limits."""
    weight1 = tl.zeros([SEGMENTS, COLUMNS], tl.float32)
    weight2, weight3 = weight1, weight1
    count1 = tl.zeros([SEGMENTS, COLUMNS], tl.int32)
    count2, count3 = count1, count1
    for start in range(0, tl.max(view[3], axis=0), COLUMNS):
        key, weight, _, mask = keys_of_tile(view, start, row, typical, SEGMENT, SEGMENTS, COLUMNS)
        weight1 += tl.where(key >= limit1, weight, 0.0)
        weight2 += tl.where(key >= limit2, weight, 0.0)
        weight3 += tl.where(key >= limit3, weight, 0.0)
        count1 += (mask & (key >= limit1)).to(tl.int32)
        count2 += (mask & (key >= limit2)).to(tl.int32)
        count3 += (mask & (key >= limit3)).to(tl.int32)
    return sum_of(count1), sum_of(count2), sum_of(count3), total_of(weight1), total_of(weight2), total_of(weight3)


@triton.jit
def sum_of(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def total_of(tile):
    return sum_of(tile.to(tl.float64))


@triton.jit
def limit_between(lo, hi, quarters, by_value):
    """A key between two, by their values (logits are even there) or by their bits (which always ends)."""
    of_bits = lo + (hi - lo) * quarters // 4
    a, b = value_of(lo.to(tl.int32)), value_of(hi.to(tl.int32))
    of_value = order_of(a + (b - a) * (quarters * 0.25)).to(tl.int64)
    return tl.minimum(tl.maximum(tl.where(by_value, of_value, of_bits), lo + 1), hi - 1)


@triton.jit
def value_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def find_border(
    view, row, typical, lowest, highest, wanted_count, wanted_weight,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The shortest beginning, by falling key and rising id, with a count or a weight, whichever comes first.

    Returns whether it is reached at all from `lowest` up, the last key inside, the last id inside of those with that
    key, and the weight of all inside.
    """
    lo, hi = lowest.to(tl.int64) - 1, highest.to(tl.int64) + 1
    count_lo, count_hi = tl.full([], _FAR, tl.int32), tl.full([], 0, tl.int32)
    weight_lo, weight_hi = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    turn = 0
    reached = True
    while reached & (hi - lo > 1) & (count_lo - count_hi > 1):
        limit1 = limit_between(lo, hi, 1, turn % 2 == 1)
        limit1 = tl.where(turn == 0, lo + 1, limit1)
        limit2, limit3 = limit_between(lo, hi, 2, turn % 2 == 1), limit_between(lo, hi, 3, turn % 2 == 1)
        count1, count2, count3, weight1, weight2, weight3 = measure(
            view,
            row,
            typical,
            limit1.to(tl.int32),
            limit2.to(tl.int32),
            limit3.to(tl.int32),
            SEGMENT,
            SEGMENTS,
            COLUMNS,
        )
        enough1 = (count1 >= wanted_count) | (weight1 >= wanted_weight)
        enough2 = (count2 >= wanted_count) | (weight2 >= wanted_weight)
        enough3 = (count3 >= wanted_count) | (weight3 >= wanted_weight)
        hi = tl.where(enough1, tl.where(enough2, tl.where(enough3, hi, limit3), limit2), limit1)
        count_hi = tl.where(enough1, tl.where(enough2, tl.where(enough3, count_hi, count3), count2), count1)
        weight_hi = tl.where(enough1, tl.where(enough2, tl.where(enough3, weight_hi, weight3), weight2), weight1)
        lo = tl.where(enough3, limit3, tl.where(enough2, limit2, tl.where(enough1, limit1, lo)))
        count_lo = tl.where(enough3, count3, tl.where(enough2, count2, tl.where(enough1, count1, count_lo)))
        weight_lo = tl.where(enough3, weight3, tl.where(enough2, weight2, tl.where(enough1, weight1, weight_lo)))
        reached = (turn > 0) | enough1
        turn += 1
    border = lo.to(tl.int32)
    equals = count_lo - count_hi
    each = (weight_lo - weight_hi) / equals
    ties = tl.minimum(equals, wanted_count - count_hi).to(tl.float64)
    ties = tl.where(weight_hi + each * ties > wanted_weight, tl.ceil((wanted_weight - weight_hi) / each), ties)
    ties = tl.maximum(ties, 1.0)
    last_id = tl.full([], _FAR, tl.int32)
    if reached & (ties < equals):
        last_id = nth_equal(view, row, typical, border, ties, SEGMENT, SEGMENTS, COLUMNS)
    return reached, border, last_id, weight_hi + each * ties


@triton.jit
def nth_equal(view, row, typical, border, wanted, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr):
    """The id up to which so many have a key."""
    lo, hi = -1, SEGMENT * SEGMENTS
    while hi - lo > 1:
        middle = (lo + hi) // 2
        count = tl.zeros([SEGMENTS, COLUMNS], tl.int32)
        for start in range(0, tl.max(view[3], axis=0), COLUMNS):
            key, _, ids, mask = keys_of_tile(view, start, row, typical, SEGMENT, SEGMENTS, COLUMNS)
            count += (mask & (key == border) & (ids <= middle)).to(tl.int32)
        enough = sum_of(count) >= wanted
        lo, hi = tl.where(enough, lo, middle), tl.where(enough, middle, hi)
    return hi


@triton.jit
def mean_logarithm(view, row, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of what is kept: the sum of its weights, and their mean logarithm in two parts."""
    peak, temperature, kept, _ = row
    weights = tl.zeros([SEGMENTS, COLUMNS], tl.float32)
    moments = weights
    for start in range(0, tl.max(view[3], axis=0), COLUMNS):
        x, ids, mask = tile_of_view(view, start, SEGMENT, SEGMENTS, COLUMNS)
        weight = kept_weights(x, ids, mask, peak, temperature, kept)
        weights += weight
        moments += tl.where(weight > 0, weight * tl.div_rn(x - peak, temperature), 0.0)
    total = total_of(weights)
    mean = total_of(moments) / total
    high = mean.to(tl.float32)
    return total, high, (mean - high.to(tl.float64)).to(tl.float32)


@triton.jit
def left_weights(x, ids, mask, row, typical_border, typical_last):
    """Weights of what all filters leave."""
    peak, temperature, kept, mean = row
    weight = kept_weights(x, ids, mask, peak, temperature, kept)
    key = nearness(x, weight, peak, temperature, mean)
    inside = (key > typical_border) | ((key == typical_border) & (ids <= typical_last))
    return tl.where(inside, weight, 0.0)


@triton.jit
def draw_rows(
    logits, logits_stride, reals, integers, peaks, places, sums, counts, near, near_ids, out, vocab, num_segments,
    reach, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row."""
    number = tl.program_id(0).to(tl.int64)
    step = tl.load(integers + number * 3 + 2)
    if step < 0:
        return
    peak, place, proper = row_peak(peaks, places, number, num_segments, SEGMENTS)
    temperature = tl.load(reals + number * 7).to(tl.float32)
    if (not proper) | (temperature == 0):
        tl.store(out + number, tl.where(proper, place, -1))
        return
    top_k, top_p = tl.load(integers + number * 3), tl.load(reals + number * 7 + 1)
    typical_p = tl.load(reals + number * 7 + 3)
    lightest = tl.load(reals + number * 7 + 2).to(tl.float32)
    segments = tl.arange(0, SEGMENTS)
    inside = segments < num_segments
    segment_sums = tl.load(sums + number * num_segments + segments, mask=inside, other=0.0)
    near_lens = tl.load(counts + number * num_segments + segments, mask=inside, other=0)
    lens = tl.minimum(tl.maximum(vocab - segments * SEGMENT, 0), SEGMENT)
    logits += number * logits_stride
    near += number * num_segments * SEGMENT
    near_ids += number * num_segments * SEGMENT

    # Jobs: top-k near the peak, top-k in the whole row, top-p near, top-p in the whole row, typical-p of what is left.
    some = (top_k > 0) & (top_k < vocab)
    border, last_id = tl.full([], _LOWEST, tl.int32), tl.full([], _FAR, tl.int32)
    typical_border, typical_last = tl.full([], _LOWEST, tl.int32), tl.full([], _FAR, tl.int32)
    high, low = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    within = tl.sum(segment_sums, axis=0)
    whole, done = tl.full([], 1, tl.int1), tl.full([], 0, tl.int1)
    for job in range(5):
        of_count, of_weight, typical = job < 2, (job == 2) | (job == 3), job == 4
        done = done & (job != 2)
        active = (of_count & some) | (of_weight & (top_p < 1)) | (typical & (typical_p < 1))
        if active & (typical | (not done)):
            far = tl.where(typical, whole, (job % 2) == 1)
            view = (logits, near, near_ids, tl.where(far, lens, near_lens), far)
            lowest = order_of(tl.maximum(peak - temperature * tl.where(far, 128.0, reach), -3.4e38))
            highest = order_of(peak)
            if typical:
                row = (peak, temperature, (border, last_id, lightest), (high, low))
                within, high, low = mean_logarithm(view, row, SEGMENT, SEGMENTS, COLUMNS)
                lowest, highest = (
                    order_of(peak * 0.0 - 200.0),
                    order_of(peak * 0.0),
                )  # a weight above 0 is e^-104 at least
            asked = (peak, temperature, (border, last_id, tl.where(typical, lightest, 0.0)), (high, low))
            wanted_count = tl.where(of_count, tl.minimum(top_k, _FAR), _FAR).to(tl.int32)
            share = tl.where(typical, typical_p, top_p)
            wanted_weight = tl.where(of_count, float("inf"), share * within)
            reached, found, found_last, weight = find_border(
                view, asked, typical, lowest, highest, wanted_count, wanted_weight, SEGMENT, SEGMENTS, COLUMNS
            )
            done = reached
            if reached & typical:
                typical_border, typical_last = found, found_last
            elif reached:
                whole = whole & far
                within = tl.where(of_count, weight, within)
                tighter = (found > border) | ((found == border) & (found_last < last_id))
                border, last_id = tl.where(tighter, found, border), tl.where(tighter, found_last, last_id)

    view = (logits, near, near_ids, tl.where(whole, lens, near_lens), whole)
    row = (peak, temperature, (border, last_id, lightest), (high, low))
    if some | (top_p < 1) | (lightest > 0) | (typical_p < 1):
        left = tl.zeros([SEGMENTS, COLUMNS], tl.float32)
        for start in range(0, tl.max(view[3], axis=0), COLUMNS):
            x, ids, mask = tile_of_view(view, start, SEGMENT, SEGMENTS, COLUMNS)
            left += left_weights(x, ids, mask, row, typical_border, typical_last)
        segment_sums = tl.sum(left.to(tl.float64), axis=1)
    target = uniform(tl.load(integers + number * 3 + 1), step) * tl.sum(segment_sums, axis=0)
    token = pick(view, row, typical_border, typical_last, segment_sums, target, SEGMENT, SEGMENTS, BLOCK)
    tl.store(out + number, token)


@triton.jit
def pick(
    view, row, typical_border, typical_last, segment_sums, target,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first token, by id, where the sum exceeds the target; where rounding keeps it from that the last of all."""
    logits, near, near_ids, lens, whole = view
    segments = tl.arange(0, SEGMENTS)
    passed = (tl.cumsum(segment_sums, axis=0) > target) & (segment_sums > 0)
    last = tl.max(tl.where(segment_sums > 0, segments, 0), axis=0)
    segment = tl.minimum(tl.min(tl.where(passed, segments, SEGMENTS), axis=0), last)
    before = tl.sum(tl.where(segments < segment, segment_sums, 0.0), axis=0)
    length = tl.sum(tl.where(segments == segment, lens, 0), axis=0)
    token = tl.full([], 0, tl.int32)
    found = tl.full([], 0, tl.int1)
    for start in range(0, length, BLOCK):
        if not found:
            columns = start + tl.arange(0, BLOCK)
            x, ids, mask = logits_at(logits, near, near_ids, whole, segment * SEGMENT + columns, columns < length)
            weight = left_weights(x, ids, mask, row, typical_border, typical_last)
            running = before + tl.cumsum(weight.to(tl.float64), axis=0)
            first = tl.min(tl.where((running > target) & (weight > 0), ids, _FAR), axis=0)
            found = first < _FAR
            token = tl.where(found, first, tl.maximum(token, tl.max(tl.where(weight > 0, ids, 0), axis=0)))
            before += tl.sum(weight.to(tl.float64), axis=0)
    return token


# Penalties, on a copy of the logits


@triton.jit
def penalize_rows(logits, logits_stride, reals, seen_ids, seen_counts, seen_starts, vocab, BLOCK: tl.constexpr):
    """The three penalties of what a row has seen, in float64 as on the CPU. Ids outside the row are left out."""
    row = tl.program_id(0).to(tl.int64)
    repetition, presence = tl.load(reals + row * 7 + 4), tl.load(reals + row * 7 + 5)
    frequency = tl.load(reals + row * 7 + 6)
    first, last = tl.load(seen_starts + row), tl.load(seen_starts + row + 1)
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        ids = tl.load(seen_ids + places, mask=places < last, other=-1)
        count = tl.load(seen_counts + places, mask=places < last, other=0)
        mask = (ids >= 0) & (ids < vocab)
        x = tl.load(logits + row * logits_stride + ids, mask=mask, other=0.0).to(tl.float64)
        x = tl.where(x > 0, x / repetition, x * repetition)
        x = tl.where(count > 0, x - (presence + frequency * count), x)
        tl.store(logits + row * logits_stride + ids, x.to(tl.float32), mask=mask)


def segments_of(vocab: int) -> tuple[int, int]:
    """Logits of a segment, and segments of a row."""
    segment = SEGMENT
    while segment * SEGMENTS < vocab:
        segment *= 2
    return segment, triton.cdiv(vocab, segment)


def run(logits: Any, settings: Sequence[Any], counts: Sequence[Any] | None, out: Any) -> Any:
    """Token ids [rows] in `out`. settings, counts: those of ops/sampling.py; tensors there are read when it runs."""
    if len(out):
        logits = packed(logits, "logits")
        reals, integers = (sent(array, logits.device) for array in settings)
        seen = None if counts is None else [sent(array, logits.device) for array in counts]
        _launch(logits, reals, integers, seen, packed(out, "out", logits.shape[:1], "int32"))
    return out


def _launch(logits: torch.Tensor, reals: torch.Tensor, integers: torch.Tensor, seen: Any, out: torch.Tensor) -> None:
    rows, vocab = logits.shape
    segment, number = segments_of(vocab)
    segments, block = triton.next_power_of_2(number), min(BLOCK, segment)
    shape = {"SEGMENT": segment, "SEGMENTS": segments}
    new: dict[str, Any] = {"device": logits.device}
    peaks, places = torch.empty((rows, number), **new), torch.empty((rows, number), dtype=torch.int32, **new)
    sums, lens = torch.empty((rows, number), dtype=torch.float64, **new), torch.empty_like(places)
    near = torch.empty((rows, number * segment), **new)
    near_ids = torch.empty((rows, number * segment), dtype=torch.int32, **new)
    with on_device_of(logits):
        if seen is not None:
            logits = logits.clone()
            penalize_rows[(rows,)](logits, logits.stride(0), reals, *seen, vocab, BLOCK=256, num_warps=4)
        grid, stride = (rows, number), logits.stride(0)
        find_peaks[grid](
            logits, stride, integers, peaks, places, vocab, number, SEGMENT=segment, BLOCK=block, num_warps=4
        )
        found = (reals, integers, peaks, places, sums, lens, near, near_ids)
        weigh_segments[grid](logits, stride, *found, vocab, number, REACH, **shape, BLOCK=block, num_warps=4)
        draw_rows[(rows,)](
            logits,
            stride,
            *found,
            out,
            vocab,
            number,
            REACH,
            **shape,
            COLUMNS=TILE // segments,
            BLOCK=block,
            num_warps=DRAW_WARPS,
        )


def variants() -> list[Variant]:
    """The launches for vocabularies of 32000 and 150000."""
    return [variant for vocab in (32000, 151936) for variant in _variants(vocab)] + [_penalties()]


def _variants(vocab: int) -> list[Variant]:
    segment, number = segments_of(vocab)
    segments = triton.next_power_of_2(number)
    rows = {"logits": "*fp32", "logits_stride": "i32", "integers": "*i64", "peaks": "*fp32", "places": "*i32"}
    rows |= {"vocab": "i32", "num_segments": "i32"}
    found = rows | {"reals": "*fp64", "sums": "*fp64", "counts": "*i32", "near": "*fp32", "near_ids": "*i32"}
    found |= {"reach": "fp32"}
    shape = {"SEGMENT": segment, "SEGMENTS": segments, "BLOCK": BLOCK}
    aligned = ("logits_stride", "vocab")
    name = f"vocabulary {vocab}"
    return [
        Variant(f"peaks, {name}", find_peaks, rows, {"SEGMENT": segment, "BLOCK": BLOCK}, 4, aligned=aligned),
        Variant(f"weights, {name}", weigh_segments, found, shape, 4, aligned=aligned),
        Variant(
            f"draw, {name}",
            draw_rows,
            found | {"out": "*i32"},
            shape | {"COLUMNS": TILE // segments},
            DRAW_WARPS,
            aligned=aligned,
        ),
    ]


def _penalties() -> Variant:
    types = {"logits": "*fp32", "logits_stride": "i32", "reals": "*fp64", "vocab": "i32"}
    types |= {"seen_ids": "*i32", "seen_counts": "*i32", "seen_starts": "*i32"}
    return Variant("penalties", penalize_rows, types, {"BLOCK": 256}, 4)
