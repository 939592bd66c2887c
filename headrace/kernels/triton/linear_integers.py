"""Few rows of x against integer codes, both as integers: two products in one instruction, no code becomes a float.

Computes a tile of kernels/triton/linear.py. Wins where codes of 8 bits and less meet 1 to 4 rows on an NVIDIA GPU.

    a thread holds 16 bytes of each of a few weight rows: four words, whose bytes are parts of one group (a quad)
    the sixteen columns of a quad become 16-bit integers with a power of two as their scale, once for these rows
    one shift and one mask make four codes bytes; an instruction multiplies two of them by two of x's integers and adds
    codes are never made signed: the sum starts at minus offset times the sum of x's integers
    the sum of sixteen products, exact, meets x's scale times the group's; minimums meet the sum of x's integers
Source: dp2a of the PTX manual; integers per few columns as kernels/cpu has them. Bound: x is rounded to 2^-15 of the
largest of its sixteen columns at most, and not at all where it is bfloat16 and within 2^7 of it, everything else is
float32 sums: docs/kernels/linear_gpu.md. Not measured yet.
"""

# mypy: ignore-errors
# Tuples that grow while a kernel is compiled have no type that could be written down.

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.triton.launch import INTERPRETED
from headrace.kernels.triton.linear_tiles import group_of, group_scales, input_values, row_of, words_in_spans

_INTERPRETED = tl.constexpr(INTERPRETED)
_EXPONENT = tl.constexpr(0x7F800000)
# 2^23 + 2^22: what is added to it is rounded to a whole number, which the lower bits then hold.
_ROUNDS = tl.constexpr(12582912.0)
# The scale of sixteen columns that are all zero, or next to it.
_LEAST = tl.constexpr(2.0**-100)


@triton.jit
def dot_of_bytes(pair, codes, acc, UPPER: tl.constexpr):
    """acc + the pair's two 16-bit integers times bytes 0 and 1 of codes, or with UPPER 2 and 3."""
    if _INTERPRETED:
        if UPPER:
            codes = codes >> 16
        # In float64, as exact: of integers the interpreter checks each sum for overflow, in many steps.
        left = pair.to(tl.int16).to(tl.float64) * (codes & 255).to(tl.float64)
        right = (pair >> 16).to(tl.float64) * ((codes >> 8) & 255).to(tl.float64)
        return (acc.to(tl.float64) + left + right).to(tl.int32)
    elif UPPER:
        return tl.inline_asm_elementwise(
            "dp2a.hi.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [pair, codes, acc], tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [pair, codes, acc], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(a, b, c, d):
    return _larger(_larger(tl.abs(a), tl.abs(b)), _larger(tl.abs(c), tl.abs(d)))


@triton.jit
def _four(values):
    """[chunks, rows, 4] -> four of [chunks, rows]."""
    even, odd = tl.split(tl.reshape(values, (values.shape[0], values.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _pair(low, high, inverse):
    """Two numbers as the 16-bit halves of a word."""
    low = (low * inverse + _ROUNDS).to(tl.int32, bitcast=True)
    high = (high * inverse + _ROUNDS).to(tl.int32, bitcast=True)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def integers_of(a, b, c, d):
    """Columns of a quad, (four neighbours) of each of its parts -> pairs of integers of the first two parts, of the
    last two, and their scale.

    The scale is 2^(e - 14) where the largest is below 2^(e + 1), or would be rounded up to it.
    """
    most = _larger(_larger(_largest(*a), _largest(*b)), _larger(_largest(*c), _largest(*d)))
    bits = tl.maximum(most, _LEAST).to(tl.int32, bitcast=True)
    exponent = (bits + 0x100) & _EXPONENT
    # Nothing is subtracted from numbers; infinite ones, and none, make the scale none.
    scale = (exponent - (14 << 23)).to(tl.float32, bitcast=True) + (most - most)
    inverse = ((254 << 23) - exponent + (14 << 23)).to(tl.float32, bitcast=True)
    first, second = (), ()
    for lane in tl.static_range(4):
        first += (_pair(a[lane], b[lane], inverse),)
        second += (_pair(c[lane], d[lane], inverse),)
    return first, second, scale


@triton.jit
def dot_of_words(first, second, codes, acc):
    """acc + the products of a quad's sixteen columns; codes: four words."""
    for lane in tl.static_range(4):
        acc = dot_of_bytes(first[lane], codes[lane], acc, False)
        acc = dot_of_bytes(second[lane], codes[lane], acc, True)
    return acc


@triton.jit
def spread_bits(high, PARTS: tl.constexpr, HIGH: tl.constexpr):
    """The upper bits of words with a part of each quad in each byte, as high_bit of kernels/device_weight.py puts them.
    Of 8 bits those that the shifted ones spoil, 7 of each byte but the last, belong to no part there."""
    if PARTS * HIGH == 8:
        twice = high | (high << 14)
        return twice | (twice << 7)
    else:
        return high | ((high << (16 - HIGH)) & 0xFFFF0000)


@triton.jit
def quad_codes(words, spread, QUAD: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The codes of a quad, a byte each."""
    ONES: tl.constexpr = 0x01010101
    if LOW == 8:
        return words
    codes = (words >> (QUAD * LOW)) & (((1 << LOW) - 1) * ONES)
    if HIGH != 0:
        AT: tl.constexpr = QUAD * (4 if PARTS * HIGH == 8 else 2 * HIGH)
        moved = spread << (LOW - AT) if AT <= LOW else spread >> (AT - LOW)
        codes |= moved & ((((1 << HIGH) - 1) << LOW) * ONES)
    return codes


@triton.jit
def few_rows_integers(x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, groups_high, rows,
                      row_chunks, row_groups, first, last,
                      VALUES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WORDS: tl.constexpr,
                      OFFSET: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, MINIMUMS: tl.constexpr,
                      SCALE_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
                      CHUNK: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sums [BM, BN] over steps first to last, and of squares of x [BM], as few_rows of linear_tiles.py gives them."""
    PARTS: tl.constexpr = 32 // LOW
    HIGH_TYPE: tl.constexpr = tl.uint16 if HIGH * PARTS == 16 else tl.uint8
    TOGETHER: tl.constexpr = PARTS if GROUP == 0 or GROUP >= WORDS * PARTS else GROUP // WORDS
    sums, squares = (), ()
    for _ in tl.static_range(BM):
        sums += (tl.zeros([CHUNKS, BN], tl.float32),)
        squares += (tl.zeros([CHUNKS, 1, CHUNK], tl.float32),)
    lanes = tl.arange(0, CHUNK)
    row_start = (rows * row_chunks * CHUNK)[None, :, None]
    for step in tl.range(first, last, num_stages=STAGES):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        inside = chunk < row_chunks
        place = (chunk[:, None] * CHUNK + lanes[None, :])[:, None, :]
        mask = inside[:, None, None] if MASKED else None
        other = 0 if MASKED else None
        words = tl.load(codes + row_start + place, mask, other, eviction_policy="evict_first")
        words = words.to(tl.uint32, bitcast=True)
        spread = words
        if HIGH != 0:
            upper = tl.load(high + row_start + place, mask, other, eviction_policy="evict_first")
            spread = spread_bits(upper.to(HIGH_TYPE, bitcast=True).to(tl.uint32), PARTS, HIGH)
        span, start = words_in_spans(chunk * CHUNK, WORDS, WORDS * PARTS)
        column = start[:, None, None] + lanes[None, None, :]
        for quad in tl.static_range(PARTS // 4):
            if GROUP != 0 and (quad * 4) % TOGETHER == 0:
                group = group_of(span, quad * 4 // TOGETHER, WORDS * PARTS, GROUP)
                scale, minimum = group_scales(
                    scales, minimums, groups, groups_high, rows[None, :], group[:, None], inside[:, None], row_groups,
                    GROUP, SCALES, MINIMUMS, SCALE_ROWS, MASKED,
                )  # fmt: skip
            own_codes = _four(quad_codes(words, spread, quad, PARTS, LOW, HIGH))
            made, more = (), ()
            for token in tl.static_range(BM):
                own_row = x + row_of(tokens, token) * x_stride + column
                values, square = (), squares[token]
                for part in tl.static_range(quad * 4, quad * 4 + 4):
                    scaled, own = input_values(own_row, norm + column, num_cols - column, part * WORDS, NORM, MASKED)
                    values += (_four(scaled),)
                    if NORM:
                        square += own * own
                left, right, x_scale = integers_of(values[0], values[1], values[2], values[3])
                inputs = tl.zeros([CHUNKS, 1], tl.int32)
                if OFFSET != 0 or MINIMUMS != "none":
                    one = tl.full([CHUNKS, 1], 0x01010101, tl.uint32)
                    inputs = dot_of_words(left, right, (one, one, one, one), inputs)
                added = dot_of_words(left, right, own_codes, inputs * -OFFSET).to(tl.float32)
                if GROUP != 0:
                    added *= scale
                if MINIMUMS != "none":
                    added += minimum * inputs.to(tl.float32)
                made += (sums[token] + added * x_scale,)
                more += (square,)
            sums, squares = made, more
    number = tl.arange(0, BM)
    tile, square = tl.zeros([BM, BN], tl.float32), tl.zeros([BM], tl.float32)
    for token in tl.static_range(BM):
        tile = tl.where(number[:, None] == token, tl.sum(sums[token], 0)[None, :], tile)
        square = tl.where(number == token, tl.sum(tl.sum(tl.sum(squares[token], 2), 1), 0), square)
    return tile, square
