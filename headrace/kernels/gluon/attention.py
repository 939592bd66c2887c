"""Attention forward on Hopper: 128 query rows a program, a loading warp, two warpgroups that take turns.

    out = softmax(scale * q k^T) v      dense [batch, tokens, heads, dim] or ragged; dims 64, 128, 192 with 128, and 256

Wins at prefill, where the tensor cores bind. Each warpgroup has 64 rows, their output and scores in registers; keys and
values come in tiles of 128 by TMA, two places each. In turns: while one warpgroup's products run, the other has its
softmax, and within a warpgroup the scores of the next tile are under way while the weights of this one are multiplied:

    loader      q, k0, k1, v0, k2, v1, ... each place as soon as both warpgroups are done with it
    group g     wait for its turn | scores j+1 = q k, output += weights_j v | the other's turn
                wait for the scores | softmax j+1 | wait for the output | rescale it

Keys are walked from the last that a row sees to the first: tiles at the right border are masked, those in between are
not, those at a window's left border are again. Few tokens: the heads of a KV head are rows of one tile. Dense programs
stay: tiles of rows are dealt out longest first, forth and back. Ragged: a program for each tile that there may be.
Source: Shah et al. 2024, "FlashAttention-3". Error: weights in 16 bits, sums in float32. Not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headrace.kernels.gluon.attention_form import Form, form_of, form_with, row_tiles
from headrace.kernels.gluon.attention_weights import adjusted, masked, softmax
from headrace.kernels.gluon.attention_work import TILE_ROWS, extent_of, keys_of_tile, tile_of
from headrace.kernels.gluon.boxes import boxes
from headrace.kernels.gluon.unknown import unknown_zero
from headrace.kernels.triton.attention_call import packed_vector
from headrace.kernels.triton.launch import num_multiprocessors, on_device_of
from headrace.kernels.triton.variants import Variant

ROWS = gl.constexpr(64)  # of a warpgroup
STAGES = gl.constexpr(2)
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)  # the warpgroups

# Barriers, pairs of them where there is one for each stage or warpgroup. Full ones are armed with bytes; free ones have
# two arrivals, of both warpgroups.
KEY_FULL, KEY_FREE = gl.constexpr(0), gl.constexpr(1)
VALUE_FULL, VALUE_FREE = gl.constexpr(2), gl.constexpr(3)
QUERY_FULL, QUERY_FREE = gl.constexpr(4), gl.constexpr(5)
TURN = gl.constexpr(6)  # of a warpgroup: it may issue products; one arrival, of the other
CLEANED = gl.constexpr(7)  # both have zeroed their half of the values behind the last key

LOWEST = gl.constexpr(-1e30)  # maximum of rows that saw nothing yet: finite, so that differences are numbers
LN_2 = gl.constexpr(math.log(2))

SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
STRIDED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))  # with batch and head as dimensions of one
STRIPES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _zero_beyond(values, num_keys, g: gl.constexpr, barriers, cleaned, form: gl.constexpr):
    """Zeros where the keys of a tile end, each warpgroup in its half: no weight hides a NaN."""
    DOWN: gl.constexpr = form.keys // 64  # pieces of 64 x 64 below each other
    pieces = values._reinterpret(values.dtype, [DOWN * form.value_dim // 64, 64, 64], SWIZZLED)
    rows = g * (form.keys - 64) + gl.arange(0, 64, gl.SliceLayout(1, STRIPES))
    for n in gl.static_range(DOWN * form.value_dim // 128):
        piece = pieces.index(2 * n + g)
        piece.store(gl.where(rows[:, None] < num_keys, piece.load(STRIPES), 0.0).to(values.dtype))
    fence_async_shared()
    mbarrier.arrive(barriers[CLEANED].index(0), count=1)
    mbarrier.wait(barriers[CLEANED].index(0), cleaned & 1)


@gluon.jit
def _operand(weights, dtype: gl.constexpr, OUTPUT: gl.constexpr):
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def _scores(query, keys, stage, g: gl.constexpr, form: gl.constexpr):
    """Query times the keys of a place, under way."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.keys, 16])
    PARTS: gl.constexpr = form.head_dim // form.part
    KEYS: gl.constexpr = form.keys
    scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    for n in gl.static_range(PARTS):
        columns = keys.index(stage * PARTS + n).permute((1, 0))
        scores = warpgroup_mma(query.index(g * PARTS + n), columns, scores, use_acc=n > 0, is_async=True)
    return scores


@gluon.jit
def _first(query, keys, barriers, used, g: gl.constexpr, form: gl.constexpr):
    """Scores of a row tile's first tile of keys, waited for."""
    stage = used % STAGES
    mbarrier.wait(barriers[KEY_FULL].index(stage), (used // STAGES) & 1)
    scores = _scores(query, keys, stage, g, form)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(barriers[KEY_FREE].index(stage), count=1)
    return scores


@gluon.jit
def _step(shared, state, tile, rows, used, turns, scales, g: gl.constexpr, MASKED: gl.constexpr, form: gl.constexpr):
    """One tile of keys: its scores, while the weights of the tile before are multiplied with their values."""
    query, keys, values, barriers = shared
    output, operand, largest, total = state
    keys_seen, first_row, num_keys, slopes = rows
    OUTPUT: gl.constexpr = output.type.layout
    stage = used % STAGES
    before = (used - 1) % STAGES
    mbarrier.wait(barriers[KEY_FULL].index(stage), (used // STAGES) & 1)
    mbarrier.wait(barriers[TURN].index(g), turns & 1)
    scores = _scores(query, keys, stage, g, form)
    output = warpgroup_mma(operand, values.index(before), output, is_async=True)
    mbarrier.arrive(barriers[TURN].index(1 - g), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(barriers[KEY_FREE].index(stage), count=1)
    scores = adjusted(scores, tile, keys_seen, first_row, slopes, scales[1], form)
    if MASKED:
        scores = masked(scores, tile, keys_seen, first_row, num_keys, form)
    weights, largest, total, factor = softmax(scores, largest, total, scales[0])
    # NOTE: not only for the values: without a loop in between, ptxas puts the wait for the output before the softmax.
    mbarrier.wait(barriers[VALUE_FULL].index(stage), (used // STAGES) & 1)
    output, operand = warpgroup_mma_wait(0, deps=[output, operand])
    mbarrier.arrive(barriers[VALUE_FREE].index(before), count=1)
    output = output * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    return output, _operand(weights, values.dtype, OUTPUT), largest, total


@gluon.jit
def _row_slopes(slopes, request, head, first_row, stride, scales, form: gl.constexpr):
    """What each row's scores lose for a key farther away, as `adjusted` takes it."""
    if form.sloped:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.keys, 16])
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        found = gl.load(slopes + request * stride + head + rows % form.packed) * (1.0 / (scales[0] * LN_2))
    else:
        found = 0.0
    return found


@gluon.jit
def _sink(sinks, largest, head, first_row, form: gl.constexpr):
    """The weight of each row's sink."""
    if form.has_sinks:
        rows = first_row + gl.arange(0, ROWS, largest.type.layout)
        found = gl.exp2(gl.load(sinks + head + rows % form.packed) / LN_2 - largest)
    else:
        found = 0.0
    return found


@gluon.jit
def _finish(output, largest, total, place, results, strides, sizes, OUTPUT: gl.constexpr, form: gl.constexpr):
    """Writes the rows of a tile: those of the request alone, so nothing is copied by TMA."""
    batch, query_begin, num_queries, head, first_row = place
    out, lse, sinks = results
    out_batch, out_row, out_head, _ = strides
    zero = unknown_zero()
    divisor = total + _sink(sinks, largest, head, first_row, form)
    output = output * gl.convert_layout(gl.where(total > 0, 1.0 / divisor, 0.0), gl.SliceLayout(1, OUTPUT))[:, None]
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    VALUE: gl.constexpr = form.value_dim
    columns = gl.arange(0, VALUE, gl.SliceLayout(0, OUTPUT))
    at = out + batch.to(gl.int64) * (out_batch + zero) + head.to(gl.int64) * (out_head + zero)
    at = at + (query_begin + rows // form.packed).to(gl.int64)[:, None] * (out_row + zero)
    if form.packed > 1:
        at = at + (rows % form.packed).to(gl.int64)[:, None] * (out_head + zero)
    gl.store(at + columns[None, :], output.to(out.dtype.element_ty), mask=(rows // form.packed < num_queries)[:, None])
    rows = first_row + gl.arange(0, ROWS, largest.type.layout)
    logarithm = gl.where(total > 0, (largest + gl.log2(total)) * LN_2, float("-inf"))
    at = (
        (batch.to(gl.int64) * (sizes[3] + zero) + query_begin + rows // form.packed) * sizes[9]
        + head
        + rows % form.packed
    )
    gl.store(lse + at, logarithm, mask=rows // form.packed < num_queries)


@gluon.jit
def _group(shared, results, lists, slopes, strides, sizes, row_turns, scales, g: gl.constexpr, form: gl.constexpr):
    """One warpgroup: 64 of a tile's 128 rows."""
    query, keys, values, barriers = shared
    VALUE: gl.constexpr = form.value_dim
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.keys, 16]))
    dtype: gl.constexpr = query.dtype
    used = gl.to_tensor(0)
    turns = gl.to_tensor(0)
    cleaned = gl.to_tensor(0)
    queries = gl.to_tensor(0)
    for turn in range(row_turns):
        request, head, first_row = tile_of(turn, lists, sizes, form)
        batch, query_begin, num_queries, key_begin, num_keys = extent_of(request, lists, sizes, form)
        if (first_row >= 0) & (first_row < num_queries * form.packed):
            keys_seen, begin, end, whole_begin, whole_end = keys_of_tile(first_row, num_queries, num_keys, sizes, form)
            row = first_row + g * ROWS
            largest = gl.full([ROWS], LOWEST, gl.float32, SCORE_ROWS)
            total = gl.zeros([ROWS], gl.float32, SCORE_ROWS)
            output = gl.zeros([ROWS, VALUE], gl.float32, OUTPUT)
            if begin < end:
                row_slopes = _row_slopes(slopes, request, head, row, strides[3], scales, form)
                rows = (keys_seen, row, num_keys, row_slopes)
                mbarrier.wait(barriers[QUERY_FULL].index(0), queries & 1)
                scores = _first(query, keys, barriers, used, g, form)
                scores = adjusted(scores, end - 1, keys_seen, row, row_slopes, scales[1], form)
                scores = masked(scores, end - 1, keys_seen, row, num_keys, form)
                weights, largest, total, _ = softmax(scores, largest, total, scales[0])
                operand = _operand(weights, dtype, OUTPUT)
                stage = used % STAGES
                mbarrier.wait(barriers[VALUE_FULL].index(stage), (used // STAGES) & 1)
                if form.has_lens:
                    beyond = num_keys - (end - 1) * form.keys
                    if beyond < form.keys:
                        _zero_beyond(values.index(stage), beyond, g, barriers, cleaned, form)
                        cleaned += 1
                used += 1
                whole_end = gl.minimum(gl.maximum(whole_end, begin), end - 1)
                for tile in range(end - 1 - whole_end):
                    state = (output, operand, largest, total)
                    output, operand, largest, total = _step(
                        shared, state, end - 2 - tile, rows, used, turns, scales, g, True, form
                    )
                    used += 1
                    turns += 1
                whole_begin = gl.minimum(gl.maximum(whole_begin, begin), whole_end)
                for tile in range(whole_end - whole_begin):
                    state = (output, operand, largest, total)
                    output, operand, largest, total = _step(
                        shared, state, whole_end - 1 - tile, rows, used, turns, scales, g, False, form
                    )
                    used += 1
                    turns += 1
                if form.has_left:
                    for tile in range(whole_begin - begin):
                        state = (output, operand, largest, total)
                        output, operand, largest, total = _step(
                            shared, state, whole_begin - 1 - tile, rows, used, turns, scales, g, True, form
                        )
                        used += 1
                        turns += 1
                mbarrier.arrive(barriers[QUERY_FREE].index(0), count=1)
                queries += 1
                before = (used - 1) % STAGES
                output = warpgroup_mma(operand, values.index(before), output, is_async=True)
                output, operand = warpgroup_mma_wait(0, deps=[output, operand])
                mbarrier.arrive(barriers[VALUE_FREE].index(before), count=1)
            place = (batch, query_begin, num_queries, head, row)
            _finish(output, largest, total, place, results, strides, sizes, OUTPUT, form)


@gluon.jit
def _fetch(
    tensor, places, barriers, used, at, FREE: gl.constexpr, FULL: gl.constexpr, DIM: gl.constexpr, PART: gl.constexpr
):
    """A tile of keys or values, when its place is free."""
    batch, row, head = at
    KEYS: gl.constexpr = tensor.block_type.shape[1]
    stage = used % STAGES
    mbarrier.wait(barriers[FREE].index(stage), ((used // STAGES) & 1) ^ 1)
    bar = barriers[FULL].index(stage)
    mbarrier.expect(bar, KEYS * DIM * 2)
    for n in gl.static_range(DIM // PART):
        box = places.index(stage * (DIM // PART) + n)._reinterpret(places.dtype, [1, KEYS, 1, PART], STRIDED)
        tma.async_copy_global_to_shared(tensor, [batch, row, head, n * PART], bar, box)


@gluon.jit
def _fetch_rows(tensor, query, barriers, rounds, at, form: gl.constexpr):
    """The rows of a tile, when both warpgroups are done with those before."""
    batch, query_begin, head, first_row = at
    PARTS: gl.constexpr = form.head_dim // form.part
    bar = barriers[QUERY_FULL].index(0)
    mbarrier.wait(barriers[QUERY_FREE].index(0), (rounds & 1) ^ 1)
    mbarrier.expect(bar, TILE_ROWS * form.head_dim * 2)
    for n in gl.static_range(2 * PARTS):
        box = query.index(n)._reinterpret(query.dtype, [1, ROWS // form.packed, form.packed, form.part], STRIDED)
        row = query_begin + (first_row + n // PARTS * ROWS) // form.packed
        tma.async_copy_global_to_shared(tensor, [batch, row, head, n % PARTS * form.part], bar, box)


@gluon.jit
def _load(shared, queries, keys_in, values_in, lists, sizes, row_turns, form: gl.constexpr):
    """Rows, keys and values, in the order in which they are used."""
    query, keys, values, barriers = shared
    HEAD: gl.constexpr = form.head_dim
    VALUE: gl.constexpr = form.value_dim
    used = gl.to_tensor(0)
    rounds = gl.to_tensor(0)
    for turn in range(row_turns):
        request, head, first_row = tile_of(turn, lists, sizes, form)
        batch, query_begin, num_queries, key_begin, num_keys = extent_of(request, lists, sizes, form)
        if (first_row >= 0) & (first_row < num_queries * form.packed):
            _, begin, end, _, _ = keys_of_tile(first_row, num_queries, num_keys, sizes, form)
            kv_head = head // sizes[6]
            if begin < end:
                _fetch_rows(queries, query, barriers, rounds, (batch, query_begin, head, first_row), form)
                rounds += 1
                row = key_begin + (end - 1) * form.keys
                _fetch(keys_in, keys, barriers, used, (batch, row, kv_head), KEY_FREE, KEY_FULL, HEAD, form.part)
                for tile in range(end - begin):
                    row = key_begin + (end - 2 - tile) * form.keys
                    if begin + tile + 1 < end:
                        at = (batch, row, kv_head)
                        _fetch(keys_in, keys, barriers, used + 1, at, KEY_FREE, KEY_FULL, HEAD, form.part)
                    at = (batch, row + form.keys, kv_head)
                    _fetch(values_in, values, barriers, used, at, VALUE_FREE, VALUE_FULL, VALUE, VALUE)
                    used += 1


@gluon.jit
def _pair(count: gl.constexpr):
    """Two barriers, in memory of their own: between uses of one allocation the compiler puts a barrier of all warps."""
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=count)
    return bars


# Sizes that change from call to call: taken as they are, or 1, multiples of 16 and others would each be compiled.
_CHANGING = (
    *("blocks", "together", "group", "num_queries", "num_keys", "row_tiles", "row_turns", "right_bound"),
    *("left_bound", "requests", "heads", "slope_stride"),
)


@gluon.jit(do_not_specialize=_CHANGING)
def _attention_kernel(
    queries,  # TMA: [batch, queries, heads, dim], boxes of 1 x 64 / packed x packed x part; ragged: a batch of one
    keys_in,  # TMA: [batch, keys, KV heads, dim], boxes of 1 x keys x 1 x part
    values_in,
    out,
    lse,
    query_starts,
    key_starts,
    key_lens,
    sinks,
    alibi_slopes,
    scale,  # of scores, in powers of two; with a cap that of tanh
    inner,  # with a cap: of the products, before tanh
    blocks,  # of heads that lie in a tile
    together,  # blocks of a row tile: of all the batch; ragged: of one request
    heads,
    group,  # heads of a KV head
    requests,
    num_queries,
    num_keys,
    row_tiles,
    row_turns,  # tiles of rows that a program takes
    right_bound,  # keys seen from a row's own on, itself included; very many: all
    left_bound,  # keys seen before a row's own
    slope_stride,
    out_batch,
    out_row,
    out_head,
    form: gl.constexpr,
):
    dtype: gl.constexpr = queries.dtype
    PARTS: gl.constexpr = form.head_dim // form.part
    query = gl.allocate_shared_memory(dtype, [2 * PARTS, ROWS, form.part], SWIZZLED)
    keys = gl.allocate_shared_memory(dtype, [STAGES * PARTS, form.keys, form.part], SWIZZLED)
    values = gl.allocate_shared_memory(dtype, [STAGES, form.keys, form.value_dim], SWIZZLED)
    full, free = _pair(1), _pair(2)
    value_full, value_free = _pair(1), _pair(2)
    query_full, query_free = _pair(1), _pair(2)
    barriers = (full, free, value_full, value_free, query_full, query_free, _pair(1), _pair(2))
    fence_async_shared()
    mbarrier.arrive(barriers[TURN].index(0), count=1)
    shared = (query, keys, values, barriers)
    sizes = (blocks, together, row_tiles, num_queries, num_keys, right_bound, group, requests, left_bound, heads)
    strides = (out_batch, out_row, out_head, slope_stride)
    lists, results, scales = (query_starts, key_starts, key_lens), (out, lse, sinks), (scale, inner)
    gl.warp_specialize(
        [
            (_group, (shared, results, lists, alibi_slopes, strides, sizes, row_turns, scales, FIRST, form)),
            (_group, (shared, results, lists, alibi_slopes, strides, sizes, row_turns, scales, SECOND, form)),
            (_load, (shared, queries, keys_in, values_in, lists, sizes, row_turns, form)),
        ],
        [4, 1],
        [240, 24],
    )


EVERY_KEY = 1 << 30
_VECTORS = ("query_starts", "key_starts", "key_lens", "sinks", "alibi_slopes")


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"] of a dense or ragged call, in one launch."""
    query, key, out = arrays["query"], arrays["key"], arrays["out"]
    if 0 in query.shape or ("query_starts" in arrays and len(arrays["query_starts"]) == 1):
        return
    if 0 in key.shape:
        out.zero_()
        arrays["lse"].fill_(float("-inf"))
        return
    form = form_of(arrays, options)
    sizes = _sizes(form, arrays, options)
    programs = sizes["row_tiles"] * sizes["together"]
    if not form.ragged:
        programs = min(programs, num_multiprocessors(query))
    vectors = {name: packed_vector(arrays.get(name)) for name in _VECTORS}
    slopes = vectors["alibi_slopes"]
    with on_device_of(query):
        _attention_kernel[programs,](
            *_boxes(form, arrays),
            out,
            arrays["lse"],
            **vectors,
            **_scales(options),
            **sizes,
            row_turns=-(-sizes["row_tiles"] * sizes["together"] // programs),
            slope_stride=slopes.stride(0) if slopes is not None and slopes.dim() == 2 and len(slopes) > 1 else 0,
            **dict(zip(("out_batch", "out_row", "out_head"), (0, 0, *out.stride())[-4:-1], strict=True)),
            form=form,
            num_warps=4,
        )


def _boxes(form: Form, arrays: Mapping[str, Any]) -> list[Any]:
    """Queries, keys and values as TMA takes them."""
    shapes = _box_shapes(form)
    given = ((name, arrays[name][None] if form.ragged else arrays[name]) for name in shapes)
    return [boxes(name, tensor, shapes[name], STRIDED.value) for name, tensor in given]


def _box_shapes(form: Form) -> dict[str, list[int]]:
    return {
        "query": [1, ROWS.value // form.packed, form.packed, form.part],
        "key": [1, form.keys, 1, form.part],
        "value": [1, form.keys, 1, form.value_dim],
    }


def _sizes(form: Form, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, int]:
    query, key = arrays["query"], arrays["key"]
    heads, blocks = query.shape[-2], query.shape[-2] // form.packed
    requests = len(arrays["query_starts"]) - 1 if form.ragged else query.shape[0]
    return {
        "blocks": blocks,
        "together": blocks if form.ragged else requests * blocks,
        "heads": heads,
        "group": heads // key.shape[-2],
        "requests": requests,
        "num_queries": query.shape[-3],
        "num_keys": key.shape[-3],
        "row_tiles": row_tiles(form, query.shape, requests),
        "right_bound": EVERY_KEY if options["window_right"] < 0 else min(options["window_right"] + 1, EVERY_KEY),
        "left_bound": min(max(options["window_left"], 0), EVERY_KEY),
    }


def _scales(options: Mapping[str, Any]) -> dict[str, float]:
    """What scores are multiplied with for a softmax of powers of two, and products before a cap."""
    cap = options["softcap"]
    return {"scale": (cap or options["scale"]) / math.log(2), "inner": options["scale"] / cap if cap else 1.0}


def variants() -> list[Variant]:
    """Both types and sizes of head with the plain masks, one type of the rest, for Hopper alone."""
    plain = [
        _variant(dtype, form_with(dim, has_lens=lens))
        for dim in (64, 128)
        for dtype in ("bf16", "fp16")
        for lens in (False, True)
    ]
    ragged = {"ragged": True, "has_lens": True}
    others = [
        form_with(128, **ragged),
        form_with(128, **ragged, packed=8),
        form_with(128, has_left=True),
        form_with(128, **ragged, packed=4, has_left=True),
        form_with(64, **ragged, packed=8, has_left=True, has_sinks=True),
        form_with(128, capped=True),
        form_with(128, **ragged, packed=2, has_left=True, capped=True, has_sinks=True, sloped=True),
        form_with(192, packed=1),
        form_with(192, **ragged),
        form_with(256),
        form_with(256, **ragged, packed=2, has_left=True, capped=True),
    ]
    return plain + [_variant("bf16", form) for form in others]


_TOLD = {"sm_90": ("wgmma.mma_async", "cp.async.bulk.tensor.4d", "mbarrier.try_wait", "setmaxnreg")}


def _variant(dtype: str, form: Form) -> Variant:
    names = {"query": "queries", "key": "keys_in", "value": "values_in"}
    types = {names[name]: f"tensordesc<{dtype}{box},{STRIDED.value!r}>" for name, box in _box_shapes(form).items()}
    types |= {"out": f"*{dtype}", "lse": "*fp32", "scale": "fp32", "inner": "fp32"}
    types |= dict.fromkeys((*_CHANGING, "out_batch", "out_row", "out_head"), "i32")
    lists = {"query_starts": form.ragged, "key_starts": form.ragged, "key_lens": form.has_lens}
    there = {name: "*i32" for name, given in lists.items() if given}
    there |= {name: "*fp32" for name, given in (("sinks", form.has_sinks), ("alibi_slopes", form.sloped)) if given}
    absent = dict.fromkeys({*lists, "sinks", "alibi_slopes"} - set(there))
    return Variant(
        name=f"{dtype} {form.words()}",
        kernel=_attention_kernel,
        types=types | there,
        constants={"form": form, **absent},
        chips=("sm_90",),
        aligned=("out_batch", "out_row", "out_head"),
        instructions=_TOLD,
        overlapping=True,
        # Two numbers that never change, read outside of the loops.
        spills={"sm_90": 8 if form.head_dim == 256 and form.capped else 0},
    )
