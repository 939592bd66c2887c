"""MLA decode on Hopper: 64 rows a tile, two key blocks an iteration, half of the output in each of two warpgroups.

    out = softmax(scale * q c^T) c[:, :512]         q [64 rows, 576], c [keys, 576] in pages, read once for both

Wins where the heads of a request fill the tensor cores (64 and more rows); with fewer it is bound by reading latents.
An output tile of 64 x 512 float32 takes half of the register file, so a second one to alternate with has no room. Left
holds columns 0..255 and right 256..511; both need the weights of both blocks, each computes one of them:

    left    scores 0, softmax 0 -> m0, out += P0 V0 | rescale by m1, P0 -> shared | out += P1 V1 | next scores 0
    right   scores 1, wait m0, softmax 1 -> m1, P1 -> shared | out += P1 V1 | out += P0 V0 | next scores 1
    loader  64 x 64 tiles by TMA, a barrier each; a half of a block is loaded again as soon as its last reader is done

P0 and P1 lie where the rotated tile of their block was: nobody reads it after the scores. Source: DeepSeek-AI 2025,
"FlashMLA" (the schedule it calls seesaw). Error: weights and latents in 16 bits, sums in float32. Not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.kernels.gluon.boxes import boxes
from headrace.kernels.gluon.mla_merge import merge
from headrace.kernels.gluon.mla_plan import plan_work
from headrace.kernels.gluon.unknown import unknown_zero
from headrace.kernels.triton.launch import num_multiprocessors, on_device_of
from headrace.kernels.triton.variants import Variant

LATENT_DIM, KEY_DIM = 512, 576
ROWS = gl.constexpr(64)  # of a tile: heads and query tokens, packed
BLOCK = gl.constexpr(64)  # keys
UNIT = gl.constexpr(128)  # keys of an iteration: two blocks
HALF = gl.constexpr(256)  # output columns of a warpgroup

# Parts of a block, and of the queries: columns 0..255, 256..511 and the rotated 64.
LEFT, RIGHT, ROTATED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# Barriers. Full ones are armed with the bytes of a part; each half of a block is freed by one arrival, that of the
# warpgroup which reads it last. The name says the half, and the block of the iteration.
FULL = gl.constexpr(0)  # + 3 * block + part
FREE_LEFT_0 = gl.constexpr(6)  # by left, after P0 V0
FREE_RIGHT_0 = gl.constexpr(7)  # by right, after P0 V0; with the rotated part, where P0 was
FREE_RIGHT_1 = gl.constexpr(8)  # by right, after P1 V1
FREE_LEFT_1 = gl.constexpr(9)  # by left, after P1 V1; with the rotated part, where P1 was
QUERY_FULL = gl.constexpr(10)
QUERY_FREE = gl.constexpr(11)  # two arrivals, one of each warpgroup
MAXIMUM_0 = gl.constexpr(12)  # left wrote its maxima; at the end of a segment its sums
MAXIMUM_1 = gl.constexpr(13)
WEIGHTS_0 = gl.constexpr(14)
WEIGHTS_1 = gl.constexpr(15)
BARRIERS = gl.constexpr(16)
HALF_BYTES = gl.constexpr(64 * 256 * 2)
TILE_BYTES = gl.constexpr(64 * 64 * 2)

LOWEST = gl.constexpr(-1e30)  # maximum of rows that saw nothing yet: finite, so that differences are numbers
LN_2 = gl.constexpr(math.log(2))

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
PAGED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))  # with the page in front
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
STRIPES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _segment(item, lists, sizes):
    """Of this program's part of an item: request, first row, rows, first token, key length, first and last unit."""
    items, bounds, _, key_lens, query_starts = lists
    heads, tokens, most_keys, _, _, _ = sizes
    at = bounds + 2 * gl.program_id(1)
    request = gl.load(items + 2 * item)
    first_row = (gl.load(items + 2 * item + 1) + gl.program_id(0)) * ROWS
    start = gl.minimum(gl.maximum(gl.load(query_starts + request), 0), tokens)
    stop = gl.minimum(gl.maximum(gl.load(query_starts + request + 1), start), tokens)
    keys = gl.minimum(gl.maximum(gl.load(key_lens + request), 0), most_keys)
    begin = gl.where(item == gl.load(at), gl.load(at + 1), 0)
    end = gl.where(item == gl.load(at + 2), gl.load(at + 3), gl.cdiv(keys, UNIT))
    return request, first_row, (stop - start) * heads, start, stop - start, keys, begin, end


@gluon.jit
def _interval(bounds):
    """First and last item (exclusive) of this program's worker."""
    at = bounds + 2 * gl.program_id(1)
    return gl.load(at), gl.load(at + 2) + gl.where(gl.load(at + 3) > 0, 1, 0)


@gluon.jit
def _tile(half, number: gl.constexpr):
    return half._reinterpret(half.dtype, [4, 64, 64], SWIZZLED).index(number)


@gluon.jit
def _visible(first_row, query_len, keys, sizes, TOP_LEFT: gl.constexpr):
    """Keys that each row sees, and the fewest that one does."""
    heads, _, _, right, _, _ = sizes
    before = 0 if TOP_LEFT else keys - query_len
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    return gl.minimum(rows // heads + before + right, keys), gl.minimum(first_row // heads + before + right, keys)


@gluon.jit
def _masked(scores, base, visible, fewest):
    if base + BLOCK > fewest:
        columns = base + gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
        scores = gl.where(columns[None, :] < visible[:, None], scores, float("-inf"))
    return scores


@gluon.jit
def _zero_beyond(left, right, num_keys):
    """Zeros where a block's keys end: no weight hides a NaN."""
    rows = gl.arange(0, BLOCK, gl.SliceLayout(1, STRIPES))
    for t in gl.static_range(4):
        tile = _tile(left, t)
        values = tile.load(STRIPES)
        tile.store(gl.where(rows[:, None] < num_keys, values, 0.0).to(left.dtype))
        tile = _tile(right, t)
        values = tile.load(STRIPES)
        tile.store(gl.where(rows[:, None] < num_keys, values, 0.0).to(left.dtype))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _part(parts, number: gl.constexpr, block):
    """A part of a block, or of the queries."""
    if number == LEFT:
        part = parts[0].index(block)
    elif number == RIGHT:
        part = parts[1].index(block)
    else:
        part = parts[2].index(block)
    return part


@gluon.jit
def _score(scores, query, keys, barriers, phase, zero, part: gl.constexpr, block: gl.constexpr, use_acc: gl.constexpr):
    """Plus the products with one part of a block's columns, when it has arrived."""
    mbarrier.wait(barriers[FULL + 3 * block + part], phase)
    columns = _part(keys, part, block + zero).permute((1, 0))
    return warpgroup_mma(_part(query, part, zero), columns, scores, use_acc=use_acc, is_async=True)


@gluon.jit
def _scores(query, keys, barriers, phase, block: gl.constexpr):
    """Query times a block's keys, each part as it arrives, the one that is free first in front."""
    zero = unknown_zero()
    scores = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    scores = _score(scores, query, keys, barriers, phase, zero, block, block, False)
    scores = _score(scores, query, keys, barriers, phase, zero, 1 - block, block, True)
    scores = _score(scores, query, keys, barriers, phase, zero, ROTATED, block, True)
    return warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def _scores_behind(output, query, keys, barriers, phase, freed: gl.constexpr, block: gl.constexpr):
    """The same behind a product that is under way: it is complete with the first part, and what it read is free."""
    zero = unknown_zero()
    scores = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    scores = _score(scores, query, keys, barriers, phase, zero, block, block, False)
    output = warpgroup_mma_wait(1, deps=[output])
    mbarrier.arrive(barriers[freed], count=1)
    scores = _score(scores, query, keys, barriers, phase, zero, 1 - block, block, True)
    scores = _score(scores, query, keys, barriers, phase, zero, ROTATED, block, True)
    return warpgroup_mma_wait(0, deps=[scores]), output


@gluon.jit
def _scaled(output, factors):
    """A product that is complete, its rows multiplied."""
    return output * gl.convert_layout(factors, gl.SliceLayout(1, OUTPUT))[:, None]


@gluon.jit
def _store_part(output, logarithm, slot, partial_out, partial_lse, COLUMN: gl.constexpr):
    """Half of the columns of a partial result, float32, and the log of its sum."""
    at = slot.to(gl.int64) * ROWS
    rows = at + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    columns = COLUMN + gl.arange(0, HALF, gl.SliceLayout(0, OUTPUT))
    gl.store(partial_out + rows[:, None] * (2 * HALF) + columns[None, :], output)
    if COLUMN == 0:
        gl.store(partial_lse + at + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)), logarithm)


@gluon.jit
def _store_rows(output, logarithm, segment, out, lse, sizes, COLUMN: gl.constexpr):
    """Half of the columns of a tile's result."""
    first_row, num_rows, start = segment
    heads, _, _, _, out_token, out_head = sizes
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    columns = COLUMN + gl.arange(0, HALF, gl.SliceLayout(0, OUTPUT))
    place = (start + rows // heads).to(gl.int64) * out_token + (rows % heads) * out_head
    value = output.to(out.dtype.element_ty)
    gl.store(out + place[:, None] + columns[None, :], value, mask=(rows < num_rows)[:, None])
    if COLUMN == 0:
        places = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        gl.store(lse + start.to(gl.int64) * heads + places, logarithm, mask=places < num_rows)


@gluon.jit
def _finish(output, largest, total, segment, results, sizes, slot, partial, COLUMN: gl.constexpr):
    """Divides by the sums, and writes the tile, or this worker's part of it."""
    out, lse, partial_out, partial_lse = results
    output = _scaled(output, gl.where(total > 0, 1.0 / total, 0.0))
    logarithm = gl.where(total > 0, (largest + gl.log2(total)) * LN_2, float("-inf"))
    if partial:
        _store_part(output, logarithm, slot, partial_out, partial_lse, COLUMN)
    else:
        _store_rows(output, logarithm, segment, out, lse, sizes, COLUMN)


@gluon.jit
def _slot(item, bounds):
    """Where this worker's part of an item is kept: each worker has room for its first item and for its last."""
    first = gl.load(bounds + 2 * gl.program_id(1))
    return (2 * gl.program_id(1) + gl.where(item == first, 0, 1)) * gl.num_programs(0) + gl.program_id(0)


@gluon.jit
def _left_unit(scores, output, largest, total, unit, seen, shared, done, notice, scale):
    """An iteration of left: weights of block 0, both blocks' products with its columns; the last is under way."""
    _, keys_in, notes, barriers = shared
    left, right, rotated = keys_in
    visible, fewest, keys = seen
    zero = unknown_zero()
    scores = _masked(scores, unit * UNIT, visible, fewest)
    maximum = gl.maximum(largest, gl.max(scores, 1) * scale)
    notes.index(0).store(maximum)
    mbarrier.arrive(barriers[MAXIMUM_0], count=1)
    if unit * UNIT + BLOCK > keys:
        _zero_beyond(left.index(0), right.index(0), keys - unit * UNIT)
    weights = gl.exp2(scores * scale - maximum[:, None])
    factor = gl.exp2(largest - maximum)
    total = total * factor + gl.sum(weights, 1)
    operand = gl.convert_layout(weights.to(left.dtype), gl.DotOperandLayout(0, OUTPUT, 2))
    output = warpgroup_mma(operand, left.index(zero), _scaled(output, factor), is_async=True)
    mbarrier.wait(barriers[MAXIMUM_1], notice & 1)
    largest = notes.index(1).load(gl.SliceLayout(1, SCORES))
    factor = gl.exp2(maximum - largest)
    rotated.index(0).store((weights * factor[:, None]).to(left.dtype))
    fence_async_shared()
    mbarrier.arrive(barriers[WEIGHTS_0], count=1)
    output, operand = warpgroup_mma_wait(0, deps=[output, operand])
    mbarrier.arrive(barriers[FREE_LEFT_0], count=1)
    output = _scaled(output, factor)
    mbarrier.wait(barriers[WEIGHTS_1], done & 1)
    output = warpgroup_mma(rotated.index(1 + zero), left.index(1 + zero), output, is_async=True)
    return output, largest, total * factor


@gluon.jit
def _right_unit(scores, output, largest, total, unit, seen, shared, done, notice, scale):
    """An iteration of right: weights of block 1, both blocks' products with its columns; the last is under way."""
    _, keys_in, notes, barriers = shared
    left, right, rotated = keys_in
    visible, fewest, keys = seen
    zero = unknown_zero()
    base = unit * UNIT + BLOCK
    scores = _masked(scores, base, visible, fewest)
    maximum = gl.max(scores, 1) * scale
    mbarrier.wait(barriers[MAXIMUM_0], notice & 1)
    maximum = gl.maximum(maximum, notes.index(0).load(gl.SliceLayout(1, SCORES)))
    notes.index(1).store(maximum)
    mbarrier.arrive(barriers[MAXIMUM_1], count=1)
    if base + BLOCK > keys:
        _zero_beyond(left.index(1), right.index(1), keys - base)
    weights = gl.exp2(scores * scale - maximum[:, None])
    rotated.index(1).store(weights.to(left.dtype))
    fence_async_shared()
    mbarrier.arrive(barriers[WEIGHTS_1], count=1)
    factor = gl.exp2(largest - maximum)
    total = total * factor + gl.sum(weights, 1)
    output = _scaled(output, factor)
    output = warpgroup_mma(rotated.index(1 + zero), right.index(1 + zero), output, is_async=True)
    mbarrier.wait(barriers[WEIGHTS_0], done & 1)
    output = warpgroup_mma(rotated.index(zero), right.index(zero), output, is_async=True)
    return output, maximum, total


@gluon.jit
def _left(shared, lists, sizes, results, scale, TOP_LEFT: gl.constexpr):
    """Scores and weights of the even blocks, output columns 0..255 of all."""
    query, keys_in, notes, barriers = shared
    gdc_wait()
    done = gl.to_tensor(0)
    notice = gl.to_tensor(0)
    first_item, last_item = _interval(lists[1])
    for item in range(first_item, last_item):
        request, first_row, num_rows, start, query_len, keys, begin, end = _segment(item, lists, sizes)
        if first_row < num_rows:
            visible, fewest = _visible(first_row, query_len, keys, sizes, TOP_LEFT)
            seen = (visible, fewest, keys)
            largest = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
            output = gl.zeros([ROWS, HALF], gl.float32, OUTPUT)
            mbarrier.wait(barriers[QUERY_FULL], (notice - done) & 1)
            if begin < end:
                scores = _scores(query, keys_in, barriers, done & 1, 0)
                for unit in range(begin, end - 1):
                    product, largest, total = _left_unit(
                        scores, output, largest, total, unit, seen, shared, done, notice, scale
                    )
                    done += 1
                    notice += 1
                    scores, output = _scores_behind(product, query, keys_in, barriers, done & 1, FREE_LEFT_1, 0)
                product, largest, total = _left_unit(
                    scores, output, largest, total, end - 1, seen, shared, done, notice, scale
                )
                done += 1
                notice += 1
                output = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(barriers[FREE_LEFT_1], count=1)
            mbarrier.arrive(barriers[QUERY_FREE], count=1)
            notes.index(0).store(total)
            mbarrier.arrive(barriers[MAXIMUM_0], count=1)
            mbarrier.wait(barriers[MAXIMUM_1], notice & 1)
            total += notes.index(1).load(gl.SliceLayout(1, SCORES))
            notice += 1
            partial = (begin > 0) | (end < gl.cdiv(keys, UNIT))
            segment = (first_row, num_rows, start)
            _finish(output, largest, total, segment, results, sizes, _slot(item, lists[1]), partial, 0)


@gluon.jit
def _right(shared, lists, sizes, results, scale, TOP_LEFT: gl.constexpr):
    """Scores and weights of the odd blocks, output columns 256..511 of all."""
    query, keys_in, notes, barriers = shared
    gdc_wait()
    done = gl.to_tensor(0)
    notice = gl.to_tensor(0)
    first_item, last_item = _interval(lists[1])
    for item in range(first_item, last_item):
        request, first_row, num_rows, start, query_len, keys, begin, end = _segment(item, lists, sizes)
        if first_row < num_rows:
            visible, fewest = _visible(first_row, query_len, keys, sizes, TOP_LEFT)
            seen = (visible, fewest, keys)
            largest = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
            output = gl.zeros([ROWS, HALF], gl.float32, OUTPUT)
            mbarrier.wait(barriers[QUERY_FULL], (notice - done) & 1)
            if begin < end:
                scores = _scores(query, keys_in, barriers, done & 1, 1)
                for unit in range(begin, end - 1):
                    product, largest, total = _right_unit(
                        scores, output, largest, total, unit, seen, shared, done, notice, scale
                    )
                    product = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[product]))
                    mbarrier.arrive(barriers[FREE_RIGHT_1], count=1)
                    done += 1
                    notice += 1
                    scores, output = _scores_behind(product, query, keys_in, barriers, done & 1, FREE_RIGHT_0, 1)
                product, largest, total = _right_unit(
                    scores, output, largest, total, end - 1, seen, shared, done, notice, scale
                )
                done += 1
                notice += 1
                output = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(barriers[FREE_RIGHT_1], count=1)
                mbarrier.arrive(barriers[FREE_RIGHT_0], count=1)
            mbarrier.arrive(barriers[QUERY_FREE], count=1)
            mbarrier.wait(barriers[MAXIMUM_0], notice & 1)
            other = notes.index(0).load(gl.SliceLayout(1, SCORES))
            notes.index(1).store(total)
            mbarrier.arrive(barriers[MAXIMUM_1], count=1)
            notice += 1
            partial = (begin > 0) | (end < gl.cdiv(keys, UNIT))
            segment = (first_row, num_rows, start)
            _finish(output, largest, total + other, segment, results, sizes, _slot(item, lists[1]), partial, 256)


@gluon.jit
def _page(block, request, keys, lists, pages, page_size, table_stride):
    """A block's page, and where in it; behind the last key a page that does not exist: TMA fills in zeros."""
    key = block * BLOCK
    at = lists[2] + request.to(gl.int64) * table_stride + key // page_size
    return gl.load(at, mask=key < keys, other=pages), key % page_size


@gluon.jit
def _fetch_query(rows, row, query, bar):
    """A tile of queries, all on one barrier."""
    for t in gl.static_range(4):
        tma.async_copy_global_to_shared(rows, [row, 64 * t], bar, _tile(query[0].index(0), t))
        tma.async_copy_global_to_shared(rows, [row, HALF + 64 * t], bar, _tile(query[1].index(0), t))
    tma.async_copy_global_to_shared(rows, [row, 2 * HALF], bar, query[2].index(0))


@gluon.jit
def _fetch(latents, page, row, keys_in, barriers, part: gl.constexpr, block: gl.constexpr):
    """A part of a block, as tiles of 64 columns."""
    bar = barriers[FULL + 3 * block + part]
    place = _part(keys_in, part, block)
    if part == ROTATED:
        mbarrier.expect(bar, TILE_BYTES)
        box = place._reinterpret(place.dtype, [1, BLOCK, 64], PAGED)
        tma.async_copy_global_to_shared(latents, [page, row, 2 * HALF], bar, box)
    else:
        mbarrier.expect(bar, HALF_BYTES)
        for t in gl.static_range(4):
            box = _tile(place, t)._reinterpret(place.dtype, [1, BLOCK, 64], PAGED)
            tma.async_copy_global_to_shared(latents, [page, row, HALF * part + 64 * t], bar, box)


@gluon.jit
def _load(shared, lists, sizes, rows, latents, pages, page_size, table_stride):
    """Parts of queries and keys, in the order in which their places become free."""
    query, keys_in, _, barriers = shared
    heads = sizes[0]
    gdc_wait()
    done = gl.to_tensor(0)
    segments = gl.to_tensor(0)
    first_item, last_item = _interval(lists[1])
    for item in range(first_item, last_item):
        request, first_row, num_rows, start, query_len, keys, begin, end = _segment(item, lists, sizes)
        if first_row < num_rows:
            mbarrier.wait(barriers[QUERY_FREE], (segments & 1) ^ 1)
            bar = barriers[QUERY_FULL]
            mbarrier.expect(bar, 2 * HALF_BYTES + TILE_BYTES)
            row = start * heads + first_row
            _fetch_query(rows, row, query, bar)
            for unit in range(begin, end):
                free = (done & 1) ^ 1
                page_0, row_0 = _page(2 * unit, request, keys, lists, pages, page_size, table_stride)
                page_1, row_1 = _page(2 * unit + 1, request, keys, lists, pages, page_size, table_stride)
                mbarrier.wait(barriers[FREE_LEFT_0], free)
                _fetch(latents, page_0, row_0, keys_in, barriers, LEFT, 0)
                mbarrier.wait(barriers[FREE_RIGHT_1], free)
                _fetch(latents, page_1, row_1, keys_in, barriers, RIGHT, 1)
                mbarrier.wait(barriers[FREE_RIGHT_0], free)
                _fetch(latents, page_0, row_0, keys_in, barriers, RIGHT, 0)
                _fetch(latents, page_0, row_0, keys_in, barriers, ROTATED, 0)
                mbarrier.wait(barriers[FREE_LEFT_1], free)
                _fetch(latents, page_1, row_1, keys_in, barriers, LEFT, 1)
                _fetch(latents, page_1, row_1, keys_in, barriers, ROTATED, 1)
                done += 1
            segments += 1
    gdc_launch_dependents()


@gluon.jit
def _barrier(count: gl.constexpr):
    """In memory of its own: the compiler puts a barrier of the whole warpgroup between two uses of one allocation."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=count)
    return bar


# Sizes that change from call to call: taken as they are, or 1, multiples of 16 and others would each be compiled.
_CHANGING = ("heads", "tokens", "pages", "most_keys", "table_stride", "right_bound")


@gluon.jit(do_not_specialize=_CHANGING)
def _mla_kernel(
    rows,  # TMA: queries [tokens * heads, 576], boxes of 64 x 64
    latents,  # TMA: [pages, page_size, 576], boxes of 1 x 64 x 64
    out,
    lse,
    partial_out,
    partial_lse,
    items,
    bounds,
    page_table,
    key_lens,
    query_starts,
    scale,
    heads,
    tokens,
    pages,
    page_size,
    most_keys,
    table_stride,
    right_bound,  # keys seen from a row's own on, itself included; very many: all
    out_token,
    out_head,
    TOP_LEFT: gl.constexpr,
):
    dtype: gl.constexpr = rows.dtype
    query_left = gl.allocate_shared_memory(dtype, [1, ROWS, HALF], SWIZZLED)
    query_right = gl.allocate_shared_memory(dtype, [1, ROWS, HALF], SWIZZLED)
    query_rotated = gl.allocate_shared_memory(dtype, [1, ROWS, 64], SWIZZLED)
    left = gl.allocate_shared_memory(dtype, [2, BLOCK, HALF], SWIZZLED)
    right = gl.allocate_shared_memory(dtype, [2, BLOCK, HALF], SWIZZLED)
    rotated = gl.allocate_shared_memory(dtype, [2, BLOCK, 64], SWIZZLED)
    notes = gl.allocate_shared_memory(gl.float32, [2, ROWS], PLAIN)
    barriers = (_barrier(1),)
    for b in gl.static_range(1, BARRIERS):
        barriers += (_barrier(2 if b == QUERY_FREE else 1),)  # type: ignore[assignment]
    fence_async_shared()
    query = (query_left, query_right, query_rotated)
    shared = (query, (left, right, rotated), notes, barriers)
    lists = (items, bounds, page_table, key_lens, query_starts)
    sizes = (heads, tokens, most_keys, right_bound, out_token, out_head)
    results = (out, lse, partial_out, partial_lse)
    gl.warp_specialize(
        [
            (_left, (shared, lists, sizes, results, scale, TOP_LEFT)),
            (_right, (shared, lists, sizes, results, scale, TOP_LEFT)),
            (_load, (shared, lists, sizes, rows, latents, pages, page_size, table_stride)),
        ],
        [4, 1],
        [240, 24],
    )


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"]: three launches, work list, attention, merge."""
    query, key = _rows_of(arrays["query"]), arrays["key"][:, :, 0]
    tokens, heads = query.shape[:2]
    max_pages = arrays["page_table"].shape[1]
    if tokens == 0:
        return
    if 0 in key.shape or max_pages == 0:
        arrays["out"].zero_()
        arrays["lse"].fill_(float("-inf"))
        return
    together = tiles_together(len(arrays["key_lens"]), tokens, heads)
    division = {
        "workers": max(num_multiprocessors(query) // together, 1),
        "tiles_together": together,
        "most_keys": max_pages * key.shape[1],
    }
    given = {**arrays, "query": query}
    items, bounds, _ = plan_work(given, **division)
    slots = 2 * division["workers"] * together * ROWS.value
    partial = (query.new_empty(slots, LATENT_DIM, dtype=torch.float32), query.new_empty(slots, dtype=torch.float32))
    _launch(given, key, partial, (items, bounds), options, (together, division["workers"]))
    merge(given, partial, (items, bounds), **division)


def _launch(
    arrays: Mapping[str, Any],
    key: torch.Tensor,
    partial: tuple[torch.Tensor, torch.Tensor],
    lists: tuple[torch.Tensor, torch.Tensor],
    options: Mapping[str, Any],
    grid: tuple[int, int],
) -> None:
    query, out = arrays["query"], arrays["out"]
    tokens, heads = query.shape[:2]
    row_stride = query.stride(1) if heads > 1 else query.stride(0)
    with on_device_of(query):
        _mla_kernel[grid](
            TensorDescriptor(query, [tokens * heads, KEY_DIM], [row_stride, 1], [64, 64], SWIZZLED.value),
            boxes("latent_pages", key, [1, 64, 64], PAGED.value),
            out,
            arrays["lse"],
            *partial,
            *lists,
            arrays["page_table"],
            arrays["key_lens"],
            arrays["query_starts"],
            options["scale"] / math.log(2),
            heads,
            tokens,
            *key.shape[:2],
            arrays["page_table"].shape[1] * key.shape[1],
            arrays["page_table"].stride(0),
            EVERY_KEY if options["window_right"] < 0 else min(options["window_right"] + 1, EVERY_KEY),
            out.stride(0),
            out.stride(1),
            TOP_LEFT=bool(options["top_left"]),
            num_warps=4,
            launch_pdl=True,
        )


EVERY_KEY = 1 << 30


def tiles_together(requests: int, tokens: int, heads: int) -> int:
    """Row tiles that read the same keys at the same time: those of a request if all have as many tokens, up to four."""
    each = -(-tokens // max(requests, 1)) * heads
    return min(max(-(-each // ROWS.value), 1), 4)


def _rows_of(query: torch.Tensor) -> torch.Tensor:
    """The query as rows at one distance, (token, head) after (token, head), which TMA can address; else a copy."""
    tokens, heads = query.shape[:2]
    even = heads == 1 or tokens == 1 or query.stride(0) == heads * query.stride(1)
    row_stride = query.stride(1) if heads > 1 else query.stride(0)
    fits = even and query.stride(2) == 1 and row_stride % 8 == 0 and query.data_ptr() % 16 == 0
    return query if fits else query.contiguous()


_POINTERS = {
    **dict.fromkeys(("lse", "partial_out", "partial_lse"), "*fp32"),
    **dict.fromkeys(("items", "bounds", "page_table", "key_lens", "query_starts"), "*i32"),
}
_INTEGERS = (*_CHANGING, "page_size", "out_token", "out_head")


def variants() -> list[Variant]:
    """Both types, for Hopper alone."""
    told = {
        "sm_90": ("wgmma.mma_async", "cp.async.bulk.tensor.3d", "mbarrier.try_wait", "setmaxnreg", "griddepcontrol")
    }
    types: dict[str, str] = {**_POINTERS, **dict.fromkeys(_INTEGERS, "i32"), "scale": "fp32"}
    return [
        Variant(
            name=f"{dtype}",
            kernel=_mla_kernel,
            types={
                **types,
                "out": f"*{dtype}",
                "rows": f"tensordesc<{dtype}[64, 64],{SWIZZLED.value!r}>",
                "latents": f"tensordesc<{dtype}[1, 64, 64],{PAGED.value!r}>",
            },
            constants={"TOP_LEFT": False},
            chips=("sm_90",),
            aligned=("out_token", "out_head", "page_size"),
            instructions=told,
            overlapping=True,
        )
        for dtype in ("bf16", "fp16")
    ]
