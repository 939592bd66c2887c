"""Attention forward on Hopper: 128 query rows a program, a loading warp, two warpgroups that take turns.

    out = softmax(scale * q k^T) v         dense [batch, tokens, heads, dim], dim 64 or 128, any group of heads

Wins at prefill, where the tensor cores bind. Each warpgroup has 64 rows, their output and scores in registers; keys and
values come in tiles of 128 by TMA, two places each. In turns: while one warpgroup's products run, the other has its
softmax, and within a warpgroup the scores of the next tile are under way while the weights of this one are multiplied:

    loader      q, k0, k1, v0, k2, v1, ... each place as soon as both warpgroups are done with it
    group g     wait for its turn | scores j+1 = q k, output += weights_j v | the other's turn
                wait for the scores | softmax j+1 | wait for the output | rescale it

Tiles at the border (diagonal, key length) come first and are masked, the others last. Programs stay: tiles of rows are
dealt out longest first, forth and back, so that each program has as much as the others. Source: Shah et al. 2024,
"FlashAttention-3". Error: weights in 16 bits, sums in float32. Not measured yet.
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

from headrace.kernels.gluon.boxes import boxes
from headrace.kernels.gluon.unknown import unknown_zero
from headrace.kernels.triton.launch import num_multiprocessors, on_device_of
from headrace.kernels.triton.variants import Variant

ROWS = gl.constexpr(64)  # of a warpgroup
TILE_ROWS = gl.constexpr(128)  # of both
KEYS = gl.constexpr(128)  # of a tile
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

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
STRIDED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))  # with batch and head as dimensions of one
STRIPES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _tile_of(turn, sizes):
    """The tile of rows this program takes at its turn, forth and back: batch, head, first row; longest first."""
    zero = unknown_zero()
    heads, together, row_tiles = sizes[0] + zero, sizes[1] + zero, sizes[2]
    step = gl.num_programs(0)
    place = gl.where((turn & 1) == 0, gl.program_id(0), step - 1 - gl.program_id(0))
    number = turn * step + place
    row = row_tiles - 1 - number // together
    return (number % together) // heads, number % heads, row * TILE_ROWS


@gluon.jit
def _key_tiles(b, first_row, key_lens, sizes, TOP_LEFT: gl.constexpr, HAS_LENS: gl.constexpr):
    """Keys that count, keys that row 0 would see if there were enough, tiles that any row sees, those all rows see."""
    _, _, _, num_queries, num_keys, right, _ = sizes
    num_queries += unknown_zero()
    keys = num_keys
    if HAS_LENS:
        keys = gl.minimum(gl.maximum(gl.load(key_lens + b), 0), num_keys)
    own = right if TOP_LEFT else right + keys - num_queries
    last = gl.minimum(first_row + TILE_ROWS - 1, num_queries - 1)
    seen = gl.maximum(gl.minimum(own + last, keys), 0)
    whole = gl.maximum(gl.minimum(own + first_row, keys), 0) // KEYS
    return keys, own, gl.cdiv(seen, KEYS), whole


@gluon.jit
def _zero_beyond(values, num_keys, g: gl.constexpr, barriers, cleaned, DIM: gl.constexpr):
    """Zeros where the keys of a tile end, each warpgroup in its half: no weight hides a NaN."""
    half = values._reinterpret(values.dtype, [2 * DIM // 64, 64, 64], SWIZZLED)
    rows = g * 64 + gl.arange(0, 64, gl.SliceLayout(1, STRIPES))
    for t in gl.static_range(DIM // 64):
        part = half.index(2 * t + g)
        part.store(gl.where(rows[:, None] < num_keys, part.load(STRIPES), 0.0).to(values.dtype))
    fence_async_shared()
    mbarrier.arrive(barriers[CLEANED].index(0), count=1)
    mbarrier.wait(barriers[CLEANED].index(0), cleaned & 1)


@gluon.jit
def _masked(scores, tile, own, first_row, keys):
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    columns = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    return gl.where(columns[None, :] < gl.minimum(rows + own, keys)[:, None], scores, float("-inf"))


@gluon.jit
def _softmax(scores, largest, total, scale):
    """Weights of a tile, the rows' new maxima and sums, and the factor for what was summed before."""
    maximum = gl.maximum(largest, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - maximum[:, None])
    factor = gl.exp2(largest - maximum)
    return weights, maximum, total * factor + gl.sum(weights, 1), factor


@gluon.jit
def _operand(weights, dtype: gl.constexpr, OUTPUT: gl.constexpr):
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def _first(query, keys, barriers, used):
    """Scores of a row tile's first tile of keys, waited for."""
    stage = used % STAGES
    mbarrier.wait(barriers[KEY_FULL].index(stage), (used // STAGES) & 1)
    scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(barriers[KEY_FREE].index(stage), count=1)
    return scores


@gluon.jit
def _step(query, keys, values, barriers, state, mask, used, turns, g: gl.constexpr, MASKED: gl.constexpr, scale):
    """One tile of keys: its scores, while the weights of the tile before are multiplied with their values."""
    output, operand, largest, total = state
    tile, own, first_row, num_keys = mask
    OUTPUT: gl.constexpr = output.type.layout
    stage = used % STAGES
    before = (used - 1) % STAGES
    mbarrier.wait(barriers[KEY_FULL].index(stage), (used // STAGES) & 1)
    mbarrier.wait(barriers[TURN].index(g), turns & 1)
    scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    output = warpgroup_mma(operand, values.index(before), output, is_async=True)
    mbarrier.arrive(barriers[TURN].index(1 - g), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(barriers[KEY_FREE].index(stage), count=1)
    if MASKED:
        scores = _masked(scores, tile, own, first_row, num_keys)
    weights, largest, total, factor = _softmax(scores, largest, total, scale)
    # NOTE: not only for the values: without a loop in between, ptxas puts the wait for the output before the softmax.
    mbarrier.wait(barriers[VALUE_FULL].index(stage), (used // STAGES) & 1)
    output, operand = warpgroup_mma_wait(0, deps=[output, operand])
    mbarrier.arrive(barriers[VALUE_FREE].index(before), count=1)
    output = output * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    return output, _operand(weights, values.dtype, OUTPUT), largest, total


@gluon.jit
def _finish(output, largest, total, at, out, lse, strides, sizes, OUTPUT: gl.constexpr, DIM: gl.constexpr):
    """Writes the rows of a tile."""
    b, head, first_row = at
    out_batch, out_row, out_head = strides
    heads, _, _, num_queries, _, _, _ = sizes
    zero = unknown_zero()
    output = output * gl.convert_layout(gl.where(total > 0, 1.0 / total, 0.0), gl.SliceLayout(1, OUTPUT))[:, None]
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    columns = gl.arange(0, DIM, gl.SliceLayout(0, OUTPUT))
    place = out + b.to(gl.int64) * (out_batch + zero) + head.to(gl.int64) * (out_head + zero)
    place = place + rows.to(gl.int64)[:, None] * (out_row + zero) + columns[None, :]
    gl.store(place, output.to(out.dtype.element_ty), mask=(rows < num_queries)[:, None])
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    logarithm = gl.where(total > 0, (largest + gl.log2(total)) * LN_2, float("-inf"))
    place = lse + (b.to(gl.int64) * num_queries + rows) * heads + head
    gl.store(place, logarithm, mask=rows < num_queries)


@gluon.jit
def _group(
    shared,
    out,
    lse,
    key_lens,
    strides,
    sizes,
    row_turns,
    scale,
    g: gl.constexpr,
    DIM: gl.constexpr,
    TOP_LEFT: gl.constexpr,
    HAS_LENS: gl.constexpr,
):
    """One warpgroup: 64 of a tile's 128 rows."""
    query, keys, values, barriers = shared
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    dtype: gl.constexpr = query.dtype
    used = gl.to_tensor(0)
    turns = gl.to_tensor(0)
    cleaned = gl.to_tensor(0)
    queries = gl.to_tensor(0)
    for turn in range(row_turns):
        b, head, first_row = _tile_of(turn, sizes)
        if first_row >= 0:
            num_keys, own, tiles, whole = _key_tiles(b, first_row, key_lens, sizes, TOP_LEFT, HAS_LENS)
            row = first_row + g * ROWS
            largest = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
            output = gl.zeros([ROWS, DIM], gl.float32, OUTPUT)
            if tiles > 0:
                mbarrier.wait(barriers[QUERY_FULL].index(0), queries & 1)
                mine = query.index(g)
                scores = _first(mine, keys, barriers, used)
                scores = _masked(scores, tiles - 1, own, row, num_keys)
                weights, largest, total, _ = _softmax(scores, largest, total, scale)
                operand = _operand(weights, dtype, OUTPUT)
                stage = used % STAGES
                mbarrier.wait(barriers[VALUE_FULL].index(stage), (used // STAGES) & 1)
                if HAS_LENS:
                    beyond = num_keys - (tiles - 1) * KEYS
                    if beyond < KEYS:
                        _zero_beyond(values.index(stage), beyond, g, barriers, cleaned, DIM)
                        cleaned += 1
                used += 1
                for j in range(1, tiles - gl.minimum(whole, tiles - 1)):
                    state = (output, operand, largest, total)
                    mask = (tiles - 1 - j, own, row, num_keys)
                    output, operand, largest, total = _step(
                        mine, keys, values, barriers, state, mask, used, turns, g, True, scale
                    )
                    used += 1
                    turns += 1
                for j in range(tiles - gl.minimum(whole, tiles - 1), tiles):
                    state = (output, operand, largest, total)
                    mask = (tiles - 1 - j, own, row, num_keys)
                    output, operand, largest, total = _step(
                        mine, keys, values, barriers, state, mask, used, turns, g, False, scale
                    )
                    used += 1
                    turns += 1
                mbarrier.arrive(barriers[QUERY_FREE].index(0), count=1)
                queries += 1
                before = (used - 1) % STAGES
                output = warpgroup_mma(operand, values.index(before), output, is_async=True)
                output, operand = warpgroup_mma_wait(0, deps=[output, operand])
                mbarrier.arrive(barriers[VALUE_FREE].index(before), count=1)
            _finish(output, largest, total, (b, head, row), out, lse, strides, sizes, OUTPUT, DIM)


@gluon.jit
def _fetch(tensor, tiles, barriers, used, place, FREE: gl.constexpr, FULL: gl.constexpr, DIM: gl.constexpr):
    """A tile of keys or values, when its place is free."""
    b, row, head = place
    stage = used % STAGES
    mbarrier.wait(barriers[FREE].index(stage), ((used // STAGES) & 1) ^ 1)
    bar = barriers[FULL].index(stage)
    mbarrier.expect(bar, KEYS * DIM * 2)
    box = tiles.index(stage)._reinterpret(tiles.dtype, [1, KEYS, 1, DIM], STRIDED)
    tma.async_copy_global_to_shared(tensor, [b, row, head, 0], bar, box)


@gluon.jit
def _load(
    shared,
    queries,
    keys_in,
    values_in,
    key_lens,
    sizes,
    row_turns,
    DIM: gl.constexpr,
    TOP_LEFT: gl.constexpr,
    HAS_LENS: gl.constexpr,
):
    """Rows, keys and values, in the order in which they are used."""
    query, keys, values, barriers = shared
    group = sizes[6]
    used = gl.to_tensor(0)
    rounds = gl.to_tensor(0)
    for turn in range(row_turns):
        b, head, first_row = _tile_of(turn, sizes)
        if first_row >= 0:
            num_keys, own, tiles, whole = _key_tiles(b, first_row, key_lens, sizes, TOP_LEFT, HAS_LENS)
            if tiles > 0:
                mbarrier.wait(barriers[QUERY_FREE].index(0), (rounds & 1) ^ 1)
                mbarrier.expect(barriers[QUERY_FULL].index(0), TILE_ROWS * DIM * 2)
                for g in gl.static_range(2):
                    box = query.index(g)._reinterpret(query.dtype, [1, ROWS, 1, DIM], STRIDED)
                    bar = barriers[QUERY_FULL].index(0)
                    tma.async_copy_global_to_shared(queries, [b, first_row + g * ROWS, head, 0], bar, box)
                rounds += 1
                place = (b, (tiles - 1) * KEYS, head // group)
                _fetch(keys_in, keys, barriers, used, place, KEY_FREE, KEY_FULL, DIM)
                for j in range(tiles):
                    if j + 1 < tiles:
                        place = (b, (tiles - 2 - j) * KEYS, head // group)
                        _fetch(keys_in, keys, barriers, used + 1, place, KEY_FREE, KEY_FULL, DIM)
                    place = (b, (tiles - 1 - j) * KEYS, head // group)
                    _fetch(values_in, values, barriers, used, place, VALUE_FREE, VALUE_FULL, DIM)
                    used += 1


@gluon.jit
def _pair(count: gl.constexpr):
    """Two barriers, in memory of their own: between uses of one allocation the compiler puts a barrier of all warps."""
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=count)
    return bars


# Sizes that change from call to call: taken as they are, or 1, multiples of 16 and others would each be compiled.
_CHANGING = ("heads", "together", "group", "num_queries", "num_keys", "row_tiles", "row_turns", "right_bound")


@gluon.jit(do_not_specialize=_CHANGING)
def _attention_kernel(
    queries,  # TMA: [batch, queries, heads, dim], boxes of 1 x 64 x 1 x dim
    keys_in,  # TMA: [batch, keys, KV heads, dim], boxes of 1 x 128 x 1 x dim
    values_in,
    out,
    lse,
    key_lens,
    scale,
    heads,
    together,  # batch * heads
    group,  # heads of a KV head
    num_queries,
    num_keys,
    row_tiles,
    row_turns,  # tiles of rows that a program takes
    right_bound,  # keys seen from a row's own on, itself included; very many: all
    out_batch,
    out_row,
    out_head,
    DIM: gl.constexpr,
    TOP_LEFT: gl.constexpr,
    HAS_LENS: gl.constexpr,
):
    dtype: gl.constexpr = queries.dtype
    query = gl.allocate_shared_memory(dtype, [2, ROWS, DIM], SWIZZLED)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], SWIZZLED)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], SWIZZLED)
    full, free = _pair(1), _pair(2)
    value_full, value_free = _pair(1), _pair(2)
    query_full, query_free = _pair(1), _pair(2)
    barriers = (full, free, value_full, value_free, query_full, query_free, _pair(1), _pair(2))
    fence_async_shared()
    mbarrier.arrive(barriers[TURN].index(0), count=1)
    shared = (query, keys, values, barriers)
    sizes = (heads, together, row_tiles, num_queries, num_keys, right_bound, group)
    strides = (out_batch, out_row, out_head)
    gl.warp_specialize(
        [
            (_group, (shared, out, lse, key_lens, strides, sizes, row_turns, scale, FIRST, DIM, TOP_LEFT, HAS_LENS)),
            (_group, (shared, out, lse, key_lens, strides, sizes, row_turns, scale, SECOND, DIM, TOP_LEFT, HAS_LENS)),
            (_load, (shared, queries, keys_in, values_in, key_lens, sizes, row_turns, DIM, TOP_LEFT, HAS_LENS)),
        ],
        [4, 1],
        [240, 24],
    )


EVERY_KEY = 1 << 30


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"] of a dense call, in one launch."""
    query, key, out = arrays["query"], arrays["key"], arrays["out"]
    batch, num_queries, heads, dim = query.shape
    if 0 in query.shape:
        return
    if key.shape[1] == 0:
        out.zero_()
        arrays["lse"].fill_(float("-inf"))
        return
    row_tiles = -(-num_queries // TILE_ROWS.value)
    programs = min(row_tiles * batch * heads, num_multiprocessors(query))
    rows, tile = [1, ROWS.value, 1, dim], [1, KEYS.value, 1, dim]
    with on_device_of(query):
        _attention_kernel[programs,](
            boxes("query", query, rows, STRIDED.value),
            boxes("key", key, tile, STRIDED.value),
            boxes("value", arrays["value"], tile, STRIDED.value),
            out,
            arrays["lse"],
            arrays.get("key_lens"),
            options["scale"] / math.log(2),
            heads,
            batch * heads,
            heads // key.shape[2],
            num_queries,
            key.shape[1],
            row_tiles,
            -(-row_tiles * batch * heads // programs),
            EVERY_KEY if options["window_right"] < 0 else min(options["window_right"] + 1, EVERY_KEY),
            *out.stride()[:3],
            DIM=dim,
            TOP_LEFT=bool(options["top_left"]),
            HAS_LENS="key_lens" in arrays,
            num_warps=4,
        )


def variants() -> list[Variant]:
    """Both types and sizes of head, with and without lengths, for Hopper alone."""
    told = {"sm_90": ("wgmma.mma_async", "cp.async.bulk.tensor.4d", "mbarrier.try_wait", "setmaxnreg")}
    return [
        _variant(dtype, dim, lens, told) for dim in (64, 128) for dtype in ("bf16", "fp16") for lens in (False, True)
    ]


_INTEGERS = (*_CHANGING, "out_batch", "out_row", "out_head")


def _variant(dtype: str, dim: int, has_lens: bool, told: Mapping[str, tuple[str, ...]]) -> Variant:
    boxes = {name: [1, rows, 1, dim] for name, rows in (("queries", 64), ("keys_in", 128), ("values_in", 128))}
    types = {name: f"tensordesc<{dtype}{box},{STRIDED.value!r}>" for name, box in boxes.items()}
    types |= {"out": f"*{dtype}", "lse": "*fp32", "scale": "fp32", **dict.fromkeys(_INTEGERS, "i32")}
    constants: dict[str, Any] = {"DIM": dim, "TOP_LEFT": False, "HAS_LENS": has_lens}
    return Variant(
        name=f"{dtype} d{dim}{' lens' if has_lens else ''}",
        kernel=_attention_kernel,
        types={**types, **({"key_lens": "*i32"} if has_lens else {})},
        constants=constants if has_lens else {**constants, "key_lens": None},
        chips=("sm_90",),
        aligned=("out_batch", "out_row", "out_head"),
        instructions=told,
        overlapping=True,
    )
