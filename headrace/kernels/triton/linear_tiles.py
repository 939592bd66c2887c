"""The steps of the linear kernel: codes become numbers in registers, scales are fetched, x is read, sums are made.

Layouts and their words are those of kernels/device_weight.py.
"""

# mypy: ignore-errors
# Tuples that grow while a kernel is compiled have no type that could be written down.

from __future__ import annotations

import triton
import triton.language as tl

from headrace.kernels.device_weight import WeightLayout
from headrace.kernels.triton.launch import INTERPRETED, dot

SUPER = tl.constexpr(256)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def looked_up(codes):
    """The numbers that the codes of the iq4 formats stand for: bytes of four words, 128 more than each. A table in
    memory would be fetched into shared memory by a pipeline, number by number."""
    low = tl.where((codes & 4) != 0, 0x766A5D4F, 0x3F2D1801)
    high = tl.where((codes & 4) != 0, 0xF1D9C5B5, 0xA6998D81)
    word = tl.where((codes & 8) != 0, high.to(tl.uint32), low.to(tl.uint32))
    return ((word >> (8 * (codes & 3)).to(tl.uint32)) & 255).to(tl.float32) - 128


@triton.constexpr_function
def high_bit(part, low, high):
    """As kernels/device_weight.py has it."""
    return WeightLayout("integer", low, high).high_bit(part)


@triton.jit
def code_values(words, high, nothing, PART: tl.constexpr, VALUES: tl.constexpr, LOW: tl.constexpr,
                HIGH: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """What part PART of these words stands for before scales, exact in float32.

    An integer becomes a float without a conversion: its bits go where the exponent makes them the lowest of a number
    above 2^k, and 2^k is subtracted, with the offset. Codes in the lower half of a word need no shift at all.
    nothing: a zero the compiler does not know to be one: an operation on three operands takes but one constant.
    """
    SHIFT: tl.constexpr = PART % 4 * 8 + PART // 4 * LOW
    MASK: tl.constexpr = (1 << LOW) - 1
    if VALUES == "iq4":
        return looked_up((words >> SHIFT) & MASK)
    elif VALUES == "fp8":
        bits = words >> SHIFT
        # The exponent is that of e4m3 less 120, subnormal numbers included.
        return (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        AT: tl.constexpr = SHIFT % 16
        if SHIFT >= 16:
            words = words >> (16 + nothing)
        codes = (words & (MASK << AT)) | (((150 - AT) << 23) + nothing)
        if HIGH != 0:
            UPPER: tl.constexpr = ((1 << HIGH) - 1) << (AT + LOW)
            LEFT: tl.constexpr = AT + LOW - high_bit(PART, LOW, HIGH)
            codes |= (high << LEFT if LEFT >= 0 else high >> (0 - LEFT)) & UPPER
        return codes.to(tl.float32, bitcast=True) - ((1 << (23 - AT)) * 1.0 + OFFSET)


@triton.jit
def group_scales(scales, minimums, groups, groups_high, rows, group, inside, row_groups,
                 GROUP: tl.constexpr, SCALES: tl.constexpr, MINIMUMS: tl.constexpr, SCALE_ROWS: tl.constexpr,
                 MASKED: tl.constexpr):  # fmt: skip
    """scale and minimum, float32, so that a weight is scale * value + minimum.

    rows: int64, and group, its number in the row: of shapes that meet; row_groups: groups of a whole row.
    """
    mask = inside if MASKED else None
    other = 0 if MASKED else None
    if SCALES == "group":
        above = (rows // SCALE_ROWS) * row_groups
        scale = tl.load(scales + above + group, mask, other).to(tl.float32)
        minimum = scale * 0
        if MINIMUMS == "added":
            minimum = tl.load(minimums + above + group, mask, other).to(tl.float32)
        elif MINIMUMS == "zero":
            minimum = -scale * tl.load(minimums + above + group, mask, other).to(tl.float32)
        return scale, minimum
    else:
        PER_SUPER: tl.constexpr = SUPER // GROUP
        above = rows * (row_groups // PER_SUPER)
        scale = tl.load(scales + above + group // PER_SUPER, mask, other).to(tl.float32)
        minimum = scale * 0
        own = groups + rows * row_groups
        if SCALES == "byte":
            scale *= tl.load(own + group, mask, other).to(tl.int8, bitcast=True).to(tl.float32)
        elif SCALES == "nibbles":
            both = tl.load(own + group, mask, other).to(tl.int32)
            scale *= (both & 15).to(tl.float32)
            minimum = -tl.load(minimums + above + group // PER_SUPER, mask, other).to(tl.float32)
            minimum *= (both >> 4).to(tl.float32)
        elif SCALES == "six":
            low = tl.load(groups + rows * (row_groups // 2) + group // 2, mask, other).to(tl.int32)
            upper = tl.load(groups_high + rows * (row_groups // 4) + group // 4, mask, other).to(tl.int32)
            six = ((low >> (4 * (group % 2))) & 15) | (((upper >> (2 * (group % 4))) & 3) << 4)
            scale *= (six - 32).to(tl.float32)
        else:
            both = tl.load(own + group, mask, other).to(tl.int32)
            upper = tl.load(groups_high + rows * (row_groups // 2) + group // 2, mask, other).to(tl.int32)
            upper = upper >> (4 * (group % 2))
            scale *= ((both & 15) | ((upper & 3) << 4)).to(tl.float32)
            minimum = -tl.load(minimums + above + group // PER_SUPER, mask, other).to(tl.float32)
            minimum *= ((both >> 4) | (((upper >> 2) & 3) << 4)).to(tl.float32)
        return scale, minimum


@triton.jit
def input_values(x, norm, left, MORE: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr):
    """x, float32, times the norm's weight where there is one, and x itself; 0 beyond the columns.

    x and norm: of columns MORE before those meant, so that parts differ by a constant; left: columns from there on.
    """
    mask = left > MORE if MASKED else None
    other = 0 if MASKED else None
    own = tl.load(x + MORE, mask, other).to(tl.float32)
    if not NORM:
        return own, own
    else:
        return own * tl.load(norm + MORE, mask, other), own


@triton.jit
def words_in_spans(word, WORDS: tl.constexpr, LENGTH: tl.constexpr):
    """The span of a word, and the column of its first part. Unsigned: a signed division is five operations."""
    number = word.to(tl.uint32)
    return (number // WORDS).to(tl.int32), (number // WORDS * LENGTH + number % WORDS).to(tl.int32)


@triton.jit
def group_of(span, TOGETHER_NUMBER: tl.constexpr, LENGTH: tl.constexpr, GROUP: tl.constexpr):
    """The group of the parts of that number in a span; a group may be several spans."""
    if GROUP >= LENGTH:
        return (span.to(tl.uint32) // (GROUP // LENGTH)).to(tl.int32)
    else:
        return span * (LENGTH // GROUP) + TOGETHER_NUMBER


@triton.jit
def operand_of(values, OPERAND: tl.constexpr):
    """The values as tensor cores take them. NOTE: to bfloat16 the interpreter would cut digits off, not round."""
    if _INTERPRETED and tl.bfloat16 == OPERAND:
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return values.to(OPERAND)


@triton.jit
def row_of(tokens, number):
    """The number of a tile's row in x, int64; behind the last row the last. tokens: the tile's first, and the last."""
    return tl.minimum(tokens[0] + number, tokens[1]).to(tl.int64)


@triton.jit
def few_rows(x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, groups_high, rows,
             row_chunks, row_groups, first, last,
             VALUES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WORDS: tl.constexpr, OFFSET: tl.constexpr,
             GROUP: tl.constexpr, SCALES: tl.constexpr, MINIMUMS: tl.constexpr, SCALE_ROWS: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr,
             MASKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sums [BM, BN] over steps first to last, and of squares of x [BM]: multiply-add, everything in float32.

    A thread holds chunks of 16 bytes of a few rows; each x it loads serves all of them. Scales meet sums over a chunk
    of all parts of a group, not single codes. Tiles are [chunks, rows, chunk]: of dimensions that are equally far from
    contiguous the compiler gives a warp's threads the first, and neighbours shall read neighbouring chunks.
    """
    PARTS: tl.constexpr = 32 // LOW if LOW else 1
    HIGH_TYPE: tl.constexpr = tl.uint16 if HIGH * PARTS == 16 else tl.uint8
    TOGETHER: tl.constexpr = PARTS if GROUP == 0 or GROUP >= WORDS * PARTS else GROUP // WORDS
    sums, squares = (), ()
    for _ in tl.static_range(BM):
        sums += (tl.zeros([CHUNKS, BN], tl.float32),)
        squares += (tl.zeros([CHUNKS, 1], tl.float32),)
    lanes = tl.arange(0, CHUNK)
    nothing = tl.minimum(row_chunks, 0).to(tl.uint32)
    row_start = (rows * row_chunks * CHUNK)[None, :, None]
    for step in tl.range(first, last, num_stages=STAGES):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        inside = chunk < row_chunks
        place = (chunk[:, None] * CHUNK + lanes[None, :])[:, None, :]
        mask = inside[:, None, None] if MASKED else None
        other = 0 if MASKED else None
        words = tl.load(codes + row_start + place, mask, other, eviction_policy="evict_first")
        upper = words
        if LOW != 0:
            words = words.to(tl.uint32, bitcast=True)
        if HIGH != 0:
            upper = tl.load(high + row_start + place, mask, other, eviction_policy="evict_first")
            upper = upper.to(HIGH_TYPE, bitcast=True).to(tl.uint32)
        start, span = chunk * CHUNK, chunk
        if LOW != 0:
            span, start = words_in_spans(chunk * CHUNK, WORDS, WORDS * PARTS)
        column = start[:, None, None] + lanes[None, None, :]
        for together in tl.static_range(PARTS // TOGETHER):
            if GROUP != 0:
                group = group_of(span, together, WORDS * PARTS, GROUP)
                scale, minimum = group_scales(
                    scales, minimums, groups, groups_high, rows[None, :], group[:, None], inside[:, None], row_groups,
                    GROUP, SCALES, MINIMUMS, SCALE_ROWS, MASKED,
                )  # fmt: skip
            made, more = (), ()
            for token in tl.static_range(BM):
                products = tl.zeros([CHUNKS, BN, CHUNK], tl.float32)
                inputs, square = tl.zeros([CHUNKS, 1], tl.float32), squares[token]
                own_row = x + row_of(tokens, token) * x_stride + column
                for part in tl.static_range(together * TOGETHER, together * TOGETHER + TOGETHER):
                    scaled, own = input_values(own_row, norm + column, num_cols - column, part * WORDS, NORM, MASKED)
                    if LOW != 0:
                        products += scaled * code_values(words, upper, nothing, part, VALUES, LOW, HIGH, OFFSET)
                    else:
                        products = words.to(tl.float32) * scaled
                    if MINIMUMS != "none":
                        inputs += tl.sum(scaled, 2)
                    if NORM:
                        square += tl.sum(own * own, 2)
                added = tl.sum(products, 2)
                if GROUP != 0:
                    added *= scale
                if MINIMUMS != "none":
                    added += minimum * inputs
                made += (sums[token] + added,)
                more += (square,)
            sums, squares = made, more
    number = tl.arange(0, BM)
    tile, square = tl.zeros([BM, BN], tl.float32), tl.zeros([BM], tl.float32)
    for token in tl.static_range(BM):
        tile = tl.where(number[:, None] == token, tl.sum(sums[token], 0)[None, :], tile)
        square = tl.where(number == token, tl.sum(tl.sum(squares[token], 1), 0), square)
    return tile, square


@triton.jit
def over_words(values, BN: tl.constexpr, SPANS: tl.constexpr, TILE_WORDS: tl.constexpr):
    """[BN, SPANS] -> [BN, TILE_WORDS]: the value of a span for each of its words."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BN, SPANS, TILE_WORDS // SPANS)), (BN, TILE_WORDS))


@triton.jit
def many_rows(x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, groups_high, rows,
              row_chunks, row_groups, first, last,
              VALUES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WORDS: tl.constexpr, OFFSET: tl.constexpr,
              GROUP: tl.constexpr, SCALES: tl.constexpr, MINIMUMS: tl.constexpr, SCALE_ROWS: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr,
              MASKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The same over tensor cores: weights become OPERAND with their scales, a part at a time, and meet x in it."""
    PARTS: tl.constexpr = 32 // LOW if LOW else 1
    HIGH_TYPE: tl.constexpr = tl.uint16 if HIGH * PARTS == 16 else tl.uint8
    TOGETHER: tl.constexpr = PARTS if GROUP == 0 or GROUP >= WORDS * PARTS else GROUP // WORDS
    SPANS: tl.constexpr = CHUNKS * CHUNK // WORDS if CHUNKS * CHUNK > WORDS and WORDS else 1
    own_rows = x + (row_of(tokens, tl.arange(0, BM)) * x_stride)[:, None]
    row_start = (rows * row_chunks * CHUNK)[:, None]
    tile, square = tl.zeros([BM, BN], tl.float32), tl.zeros([BM], tl.float32)
    for step in range(first, last):
        word = step * (CHUNKS * CHUNK) + tl.arange(0, CHUNKS * CHUNK)
        inside = (word < row_chunks * CHUNK)[None, :]
        mask = inside if MASKED else None
        other = 0 if MASKED else None
        words = tl.load(codes + row_start + word[None, :], mask, other, eviction_policy="evict_first")
        upper = words
        if LOW != 0:
            words = words.to(tl.uint32, bitcast=True)
        if HIGH != 0:
            upper = tl.load(high + row_start + word[None, :], mask, other, eviction_policy="evict_first")
            upper = upper.to(HIGH_TYPE, bitcast=True).to(tl.uint32)
        start = word
        if LOW != 0:
            start = words_in_spans(word, WORDS, WORDS * PARTS)[1]
            spans = (step * (CHUNKS * CHUNK)) // WORDS + tl.arange(0, SPANS)
        for together in tl.static_range(PARTS // TOGETHER):
            if GROUP != 0:
                group = group_of(spans, together, WORDS * PARTS, GROUP)
                scale, minimum = group_scales(
                    scales, minimums, groups, groups_high, rows[:, None], group[None, :],
                    (spans * WORDS < row_chunks * CHUNK)[None, :], row_groups,
                    GROUP, SCALES, MINIMUMS, SCALE_ROWS, MASKED,
                )  # fmt: skip
                scale = over_words(scale, BN, SPANS, CHUNKS * CHUNK)
                if MINIMUMS != "none":
                    minimum = over_words(minimum, BN, SPANS, CHUNKS * CHUNK)
            for part in tl.static_range(together * TOGETHER, together * TOGETHER + TOGETHER):
                column = start[None, :]
                scaled, own = input_values(
                    own_rows + column, norm + column, num_cols - column, part * WORDS, NORM, MASKED
                )
                values = code_values(words, upper, 0, part, VALUES, LOW, HIGH, OFFSET) if LOW != 0 else words
                if GROUP != 0:
                    values = values * scale
                if MINIMUMS != "none":
                    values = values + minimum
                tile = dot(operand_of(scaled, OPERAND), tl.trans(operand_of(values, OPERAND)), tile, PRECISION)
                if NORM:
                    square += tl.sum(own * own, 1)
    return tile, square
