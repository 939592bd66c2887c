"""What the kernels of attention do to scores, forward and backward: who sees whom, caps, distances, masks; codes.

Positions are counted within a request: query i stands at key own = i + shift, where shift is key_len - query_len, or 0
where they are aligned at the top left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.launch import INTERPRETED, dot

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(float("-inf"))
_FAR = tl.constexpr(2**30)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded_to(x, type: tl.constexpr):
    """As numbers of that type, rounded to the nearest.

    NOTE: the interpreter would cut off what bfloat16 has no bits for.
    """
    if _INTERPRETED and type == tl.bfloat16 and x.dtype != tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(type)
    else:
        return x.to(type)


@triton.jit
def size(number):
    """What `disguised` made a number of."""
    return (number - 3) >> 1


@triton.jit
def sizes_of(numbers):
    """Requests, queries, keys, heads or KV heads, tiles, heads of a group; columns of a mask and words of its rows."""
    return (
        size(numbers[0]),
        size(numbers[1]),
        size(numbers[2]),
        size(numbers[3]),
        size(numbers[4]),
        size(numbers[5]),
        size(numbers[6]),
        size(numbers[7]),
    )


@triton.jit
def held(number, least, most):
    """The number within least .. most."""
    return tl.minimum(tl.maximum(number, least), most)


@triton.jit
def request_of(query_starts, tile, sizes, packed: tl.constexpr, rows: tl.constexpr):
    """The request of a tile, and which of its tiles it is: a negative one where starts are none.

    Request r has those from query_starts[r] * packed // rows + r on: enough of them whatever the lengths are, and their
    number follows from the sizes of the arrays alone.
    """
    low = 0
    high = sizes[0]
    while high - low > 1:
        middle = (low + high) // 2
        before = held(tl.load(query_starts + middle), 0, sizes[1]) * packed // rows + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, tile - (held(tl.load(query_starts + low), 0, sizes[1]) * packed // rows + low)


@triton.jit
def extent_of(request, query_starts, key_starts, key_lens, sizes):
    """Where a request's queries begin and how many they are, and the same of its keys: never outside the arrays."""
    num_queries, num_keys = sizes[1], sizes[2]
    row_begin = 0
    query_len = num_queries
    key_begin = 0
    key_len = num_keys
    if query_starts is not None:
        row_begin = held(tl.load(query_starts + request), 0, num_queries)
        query_len = held(tl.load(query_starts + request + 1), row_begin, num_queries) - row_begin
    if key_lens is not None:
        key_len = held(tl.load(key_lens + request), 0, num_keys)
    if key_starts is not None:
        key_begin = held(tl.load(key_starts + request), 0, num_keys - key_len)
    return row_begin, query_len, key_begin, key_len


@triton.jit
def keys_of_rows(first, last, shift, key_len, window, form: tl.constexpr):
    """Of rows first .. last: the keys that any of them sees, begin .. end, and those that all see."""
    any_begin = 0
    all_begin = 0
    any_end = key_len
    all_end = key_len
    if form.has_left:
        any_begin = held(first + shift - window[0], 0, key_len)
        all_begin = held(last + shift - window[0], 0, key_len)
    if form.has_right:
        any_end = held(last + shift + window[1] + 1, 0, key_len)
        all_end = held(first + shift + window[1] + 1, 0, key_len)
    return any_begin, any_end, all_begin, all_end


@triton.jit
def rows_of_keys(first, last, shift, query_len, window, form: tl.constexpr):
    """Of keys first .. last: the rows that see any of them, begin .. end, and those that see all."""
    any_begin = 0
    all_begin = 0
    any_end = query_len
    all_end = query_len
    if form.has_right:
        any_begin = held(first - window[1] - shift, 0, query_len)
        all_begin = held(last - window[1] - shift, 0, query_len)
    if form.has_left:
        any_end = held(last + window[0] - shift + 1, 0, query_len)
        all_end = held(first + window[0] - shift + 1, 0, query_len)
    return any_begin, any_end, all_begin, all_end


@triton.jit
def whole_tiles(any_begin, any_end, all_begin, all_end, size: tl.constexpr):
    """Where tiles of that size begin, where those that are seen whole do, where these end, and where all end."""
    begin = any_begin // size * size
    end = tl.maximum(any_end, begin)
    last = begin + tl.cdiv(end - begin, size) * size
    whole_begin = held(tl.cdiv(all_begin, size) * size, begin, last)
    whole_end = held(all_end // size * size, whole_begin, last)
    return begin, whole_begin, whole_end, end


@triton.jit
def narrowed(any_begin, any_end, all_begin, all_end, first_keys, last_keys, live):
    """The same with each row's own first and last key."""
    sees = live & (last_keys >= first_keys)
    any_begin = tl.maximum(any_begin, tl.min(tl.where(sees, first_keys, _FAR), 0))
    any_end = tl.minimum(any_end, tl.max(tl.where(sees, last_keys, -1), 0) + 1)
    all_begin = tl.maximum(all_begin, tl.max(tl.where(live, first_keys, 0), 0))
    all_end = tl.minimum(all_end, tl.min(tl.where(live, last_keys, _FAR), 0) + 1)
    return any_begin, any_end, all_begin, all_end


@triton.jit
def tanh(x):
    """Within 2e-7 of it, relatively: a polynomial near 0, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    size = tl.minimum(tl.abs(x), 15.0)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.625, x + x * square * near, tl.where(x == x, far, x))


@triton.jit
def numbers(codes, part: tl.constexpr, high: tl.constexpr, type: tl.constexpr):
    """What a cache holds as numbers of a type. high: which half of each byte of int4."""
    if part.format == "float8_bits":
        # Its exponent has 8 less of a bias than that of float16.
        bits = codes.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return rounded_to(tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0), type)
    elif part.format == "int4":
        byte = codes.to(tl.int32)
        four = (byte >> 4) if high else (byte & 15)
        return rounded_to(((four ^ 8) - 8).to(tl.float32), type)
    elif part.format == "int8":
        return rounded_to(codes.to(tl.float32), type)
    else:
        return rounded_to(codes, type)


@triton.jit
def tile_at(places, rows, begin, end, columns, count: tl.constexpr, even: tl.constexpr, whole: tl.constexpr):
    """A tile of memory; zeros in rows outside begin .. end unless it is whole, and past `count` columns unless even."""
    if whole and even:
        return tl.load(places)
    elif whole:
        return tl.load(places, mask=(columns < count)[None, :], other=0.0)
    elif even:
        return tl.load(places, mask=((rows >= begin) & (rows < end))[:, None], other=0.0)
    else:
        live = ((rows >= begin) & (rows < end))[:, None] & (columns < count)[None, :]
        return tl.load(places, mask=live, other=0.0)


@triton.jit
def seen_by(own, keys, begin, end, window, form: tl.constexpr):
    """Whether rows that stand at `own` see keys, both shaped to be compared: by range, causality and window."""
    seen = (keys >= begin) & (keys < end)
    if form.has_right:
        seen = seen & (keys <= own + window[1])
    if form.has_left:
        seen = seen & (keys >= own - window[0])
    return seen


@triton.jit
def columns_of(part: tl.constexpr):
    """Which of the stored numbers the two parts hold: halves of int4 lie in one byte, what goes with them in turns."""
    first = tl.arange(0, part.width_0)
    if part.layout == "turns":
        return 2 * first, 2 * first + 1
    elif part.layout == "plain" and part.two:
        return first, part.width_0 + tl.arange(0, part.width_1)
    else:
        return first, first


@triton.jit
def product(a_0, a_1, b_0, b_1, two: tl.constexpr, precision: tl.constexpr):
    """Each row of a times each row of b, both in one or two parts."""
    found = tl.zeros([a_0.shape[0], b_0.shape[0]], tl.float32)
    found = dot(a_0, tl.trans(b_0), found, precision)
    if two:
        found = dot(a_1, tl.trans(b_1), found, precision)
    return found


@triton.jit
def adjusted(scores, own, keys, slopes, scale, softcap, form: tl.constexpr):
    """Scores with scale, cap and distances, and the tanh of the cap; those that nothing is done to stay as they are."""
    shrunk = scores
    if form.natural:
        scores = scores * scale
    if form.capped:
        shrunk = tanh(scores / softcap)
        scores = softcap * shrunk
    if slopes is not None:
        scores = scores - slopes * tl.abs(own - keys).to(tl.float32)
    return scores, shrunk


@triton.jit
def two_parts(base, along, rows, begin, end, part: tl.constexpr, type: tl.constexpr, whole: tl.constexpr):
    """Rows of heads as numbers, in the two parts that products take; of one part both are the same.

    along: how far each row lies from the base, [rows, 1]. Rows outside begin .. end are zeros, unless all are inside.
    """
    columns_0, columns_1 = columns_of(part)
    codes = tile_at(base + (along + columns_0[None, :]), rows, begin, end, columns_0, part.count, part.even_0, whole)
    first = numbers(codes, part, False, type)
    if part.format == "int4":
        return first, numbers(codes, part, True, type)
    elif part.two:
        codes = tile_at(
            base + (along + columns_1[None, :]), rows, begin, end, columns_1, part.count, part.even_1, whole
        )
        return first, numbers(codes, part, False, type)
    else:
        return first, first


@triton.jit
def mask_tile(rows, columns, stride, num_columns, live):
    """A tile of a float mask, rows, columns and live shaped to fit each other; keys before its first column get 0."""
    there = live & (columns >= 0) & (columns < num_columns)
    return tl.load(rows + columns.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)


@triton.jit
def store_parts(base, along, numbers_0, numbers_1, live, part: tl.constexpr):
    """Rows of heads, from their two parts."""
    columns_0, columns_1 = columns_of(part)
    type: tl.constexpr = base.dtype.element_ty
    place, live = along + columns_0[None, :], live[:, None]
    tl.store(base + place, rounded_to(numbers_0, type), mask=live & (columns_0 < part.count)[None, :])
    if part.two:
        place = along + columns_1[None, :]
        tl.store(base + place, rounded_to(numbers_1, type), mask=live & (columns_1 < part.count)[None, :])
