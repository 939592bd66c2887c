"""linear on a GPU for few rows of x: every byte of a weight crosses memory once, and is made a number in registers.

Computes x W^T of up to three weights of one layout in a launch, with bias, residual, rms_norm of x before, or
silu(x gate^T) * (x up^T). Wins where weights' bytes bind: up to 32 rows; the more bits a weight has, the more.

    a program has a tile of weight rows and a share of the columns (splits: a closed form of shapes and processors)
    it streams 16 bytes a thread, evicted first; x comes from the caches
    few rows against integer codes, 1-2: both as integers, linear_integers.py; else codes become exact floats by a logic
    operation and a subtraction, and few rows, 1-4 (1-2 of codes below 8 bits), are multiplied and added in float32
    more: tensor cores, 16 or 32 rows to a tile; with few rows scales meet sums, not codes
    shares of columns meet in memory: who arrives last adds them in their order, and leaves the counters at zero

Precision. Few rows: float32 throughout, whatever was asked, error that of float32 sums; but x as 16-bit integers
against integer codes, unless "exact" or on AMD. More: "exact" and, of float32 x, "auto": three tf32 products, of its
accuracy (on AMD float32 itself); 16-bit x, "auto" and "fast": weights rounded to x's type, which bf16, fp16, fp8 and
integer codes with one scale per row need not; "fast" of float32 x: bf16, or tf32 where a weight is fp16 or float32.
Sums are float32. Source: split-K with a last arriver is Stream-K's (Osama et
al. 2023); bits above 2^k instead of conversions are an old trick, FasterTransformer's among others. Bandwidth: not
measured yet; what is expected: docs/kernels/linear_gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.device_weight import CHUNK_WORDS, DeviceWeight
from headrace.kernels.triton.arrivals import arrival_counters
from headrace.kernels.triton.launch import num_multiprocessors, on_device_of
from headrace.kernels.triton.linear_integers import few_rows_integers
from headrace.kernels.triton.linear_plan import LinearPlan, operand_of, plan_of
from headrace.kernels.triton.linear_tiles import few_rows, many_rows
from headrace.kernels.triton.variants import Variant
from headrace.kernels.triton.weight import from_blocks, from_fp8, from_int4, from_int8
from headrace.kernels.triton.weight_blocks import BLOCKS, FLOATS

SLOTS = 3  # weights of one launch
_SLOT = ("codes", "high", "scales", "minimums", "groups", "upper", "bias", "out", "out_stride", "rows")


@triton.jit
def _product(x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, groups_high, rows,
             row_chunks, row_groups, first, last,
             VALUES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WORDS: tl.constexpr, OFFSET: tl.constexpr,
             GROUP: tl.constexpr, SCALES: tl.constexpr, MINIMUMS: tl.constexpr, SCALE_ROWS: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr,
             MASKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
             INTEGERS: tl.constexpr):  # fmt: skip
    """The sums of one weight's tile, and those of squares of x. Few rows of x where OPERAND is None."""
    if INTEGERS:
        tile, square = few_rows_integers(
            x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, groups_high, rows,
            row_chunks, row_groups, first, last, VALUES, LOW, HIGH, WORDS, OFFSET, GROUP, SCALES, MINIMUMS, SCALE_ROWS,
            BM, BN, CHUNKS, CHUNK, NORM, MASKED, STAGES,
        )  # fmt: skip
    elif OPERAND is None:
        tile, square = few_rows(
            x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, groups_high, rows,
            row_chunks, row_groups, first, last, VALUES, LOW, HIGH, WORDS, OFFSET, GROUP, SCALES, MINIMUMS, SCALE_ROWS,
            BM, BN, CHUNKS, CHUNK, NORM, MASKED, STAGES,
        )  # fmt: skip
    else:
        tile, square = many_rows(
            x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, groups_high, rows,
            row_chunks, row_groups, first, last, VALUES, LOW, HIGH, WORDS, OFFSET, GROUP, SCALES, MINIMUMS, SCALE_ROWS,
            BM, BN, CHUNKS, CHUNK, NORM, MASKED, OPERAND, PRECISION,
        )  # fmt: skip
    return tile, square


@triton.jit
def _merged(partial, splits, stride):
    """The sums of all shares of the columns, in the order of the columns; partial: those of the first."""
    total = tl.load(partial, cache_modifier=".cg")
    for _ in range(1, splits):
        partial += stride
        total += tl.load(partial, cache_modifier=".cg")
    return total


@triton.jit
def _store(out, out_stride, tile, upper, square, eps, num_cols, scales, up_scales, bias, residual, residual_stride,
           rows, num_rows, token, num_tokens,
           SCALES: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr):  # fmt: skip
    """What is done to finished sums [tokens, rows], and where they go."""
    inside = (token < num_tokens)[:, None] & (rows < num_rows)[None, :]
    if SCALES == "row":
        tile *= tl.load(scales + tl.minimum(rows, num_rows - 1))[None, :]
    if NORM:
        tile *= (1 / tl.sqrt_rn(square / num_cols + eps))[:, None]
    if GATED:
        if SCALES == "row":
            upper *= tl.load(up_scales + tl.minimum(rows, num_rows - 1))[None, :]
        if NORM:
            upper *= (1 / tl.sqrt_rn(square / num_cols + eps))[:, None]
        tile = tile / (1 + tl.exp(-tile)) * upper
    if BIAS:
        tile += tl.load(bias + rows, rows < num_rows, 0).to(tl.float32)[None, :]
    if RESIDUAL:
        place = token.to(tl.int64)[:, None] * residual_stride + rows[None, :]
        tile += tl.load(residual + place, inside, 0).to(tl.float32)
    place = token.to(tl.int64)[:, None] * out_stride + rows[None, :]
    tl.store(out + place, tile.to(out.dtype.element_ty), inside)


# Numbers of which no kernel of its own is compiled where they are 1 or multiples of 16.
_NUMBERS = ("num_tokens", "row_chunks", "row_groups", "splits", "steps", "rows0", "rows1", "rows2")


@triton.jit(do_not_specialize=_NUMBERS)
def _linear(x, x_stride, norm, eps, residual, residual_stride, partial, counters, num_tokens, num_cols,
            row_chunks, row_groups, splits, steps,
            codes0, high0, scales0, minimums0, groups0, upper0, bias0, out0, out_stride0, rows0,
            codes1, high1, scales1, minimums1, groups1, upper1, bias1, out1, out_stride1, rows1,
            codes2, high2, scales2, minimums2, groups2, upper2, bias2, out2, out_stride2, rows2,
            VALUES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WORDS: tl.constexpr, OFFSET: tl.constexpr,
            GROUP: tl.constexpr, SCALES: tl.constexpr, MINIMUMS: tl.constexpr, SCALE_ROWS: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
            GATED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
            SPLIT: tl.constexpr, MASKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
            STAGES: tl.constexpr, INTEGERS: tl.constexpr):  # fmt: skip
    """Program (tile of weight rows, share of columns, tile of x's rows). With GATED, weight 1 is up."""
    tile_number, split, token_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    codes, high, scales, minimums, groups, upper = codes0, high0, scales0, minimums0, groups0, upper0
    bias, out, out_stride, num_rows, number = bias0, out0, out_stride0, rows0, tile_number
    if SLOTS > 1:
        before = tl.cdiv(rows0, BN)
        if tile_number >= before:
            codes, high, scales, minimums, groups, upper = codes1, high1, scales1, minimums1, groups1, upper1
            bias, out, out_stride, num_rows, number = bias1, out1, out_stride1, rows1, tile_number - before
    if SLOTS > 2:
        before = tl.cdiv(rows0, BN) + tl.cdiv(rows1, BN)
        if tile_number >= before:
            codes, high, scales, minimums, groups, upper = codes2, high2, scales2, minimums2, groups2, upper2
            bias, out, out_stride, num_rows, number = bias2, out2, out_stride2, rows2, tile_number - before
    rows = number * BN + tl.arange(0, BN)
    # Rows behind the last are the last: no masks, and nothing of them is stored.
    read = tl.minimum(rows, num_rows - 1).to(tl.int64)
    tokens = (token_tile * BM, num_tokens - 1)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(row_chunks, CHUNKS))
    tile, square = _product(
        x, x_stride, norm, tokens, num_cols, codes, high, scales, minimums, groups, upper, read,
        row_chunks, row_groups, first, last, VALUES, LOW, HIGH, WORDS, OFFSET, GROUP, SCALES, MINIMUMS, SCALE_ROWS,
        BM, BN, CHUNKS, CHUNK, NORM, MASKED, OPERAND, PRECISION, STAGES, INTEGERS,
    )  # fmt: skip
    second = tile
    if GATED:
        second, _ = _product(
            x, x_stride, norm, tokens, num_cols, codes1, high1, scales1, minimums1, groups1, upper1, read,
            row_chunks, row_groups, first, last, VALUES, LOW, HIGH, WORDS, OFFSET, GROUP, SCALES, MINIMUMS, SCALE_ROWS,
            BM, BN, CHUNKS, CHUNK, False, MASKED, OPERAND, PRECISION, STAGES, INTEGERS,
        )  # fmt: skip
    token = token_tile * BM + tl.arange(0, BM)
    if not SPLIT:
        _store(
            out, out_stride, tile, second, square, eps, num_cols, scales, scales1, bias, residual, residual_stride,
            rows, num_rows, token, num_tokens, SCALES, GATED, NORM, BIAS, RESIDUAL,
        )  # fmt: skip
    else:
        STRIDE: tl.constexpr = (2 if GATED else 1) * BM * BN + BM
        tiles = tl.num_programs(0) * tl.num_programs(2)
        here = token_tile * tl.num_programs(0) + tile_number
        place = (tl.arange(0, BM) * BN)[:, None] + tl.arange(0, BN)[None, :]
        stride = tiles.to(tl.int64) * STRIDE
        base = partial + here.to(tl.int64) * STRIDE
        own = base + split * stride
        tl.store(own + place, tile)
        if GATED:
            tl.store(own + BM * BN + place, second)
        if NORM:
            tl.store(own + STRIDE - BM + tl.arange(0, BM), square)
        # All of the block's sums are written before its arrival is counted.
        tl.debug_barrier()
        if tl.atomic_add(counters + here, 1, sem="acq_rel") == splits - 1:
            tile = _merged(base + place, splits, stride)
            if GATED:
                second = _merged(base + BM * BN + place, splits, stride)
            if NORM:
                square = _merged(base + STRIDE - BM + tl.arange(0, BM), splits, stride)
            _store(
                out, out_stride, tile, second, square, eps, num_cols, scales, scales1, bias, residual,
                residual_stride, rows, num_rows, token, num_tokens, SCALES, GATED, NORM, BIAS, RESIDUAL,
            )  # fmt: skip
            tl.store(counters + here, 0)


@dataclass(frozen=True)
class _Part:
    """One weight of a launch, with what becomes of its sums."""

    weight: DeviceWeight
    bias: Any
    out: torch.Tensor

    @property
    def kind(self) -> tuple[Any, ...]:
        """Parts of one kind go into one launch."""
        fields = (*_fields(self.weight), self.bias, self.out)
        dtypes = tuple(None if field is None else field.dtype for field in fields)
        return (self.weight.layout, self.weight.codes.shape[1], self.weight.row_groups, *dtypes)


def run(
    x: torch.Tensor,
    weights: Sequence[DeviceWeight],
    biases: Sequence[Any],
    residual: Any,
    outs: Sequence[Any] | None,
    precision: str,
    norm: Any = None,
    eps: float = 0.0,
    *,
    tiles_alone: bool = False,
) -> list[torch.Tensor]:
    """The products of x with all weights: one launch for up to three neighbours of one layout.

    tiles_alone: over tensor cores whatever the number of rows, so that a row's bits do not depend on it.
    """
    outs = outs or [torch.empty((len(x), weight.shape[0]), dtype=torch.float32, device=x.device) for weight in weights]
    parts = [_Part(*each) for each in zip(weights, biases, outs, strict=True)]
    for together in _launches(parts):
        _launch(x, together, residual, precision, norm, eps, gated=False, tiles_alone=tiles_alone)
    return list(outs)


def run_gated(
    x: torch.Tensor,
    gate: DeviceWeight,
    up: DeviceWeight,
    out: Any,
    precision: str,
    norm: Any = None,
    eps: float = 0.0,
    *,
    tiles_alone: bool = False,
) -> torch.Tensor:
    """silu(x gate^T) * (x up^T), in one launch where both have one layout."""
    out = torch.empty((len(x), gate.shape[0]), dtype=torch.float32, device=x.device) if out is None else out
    parts = [_Part(gate, None, out), _Part(up, None, out)]
    if parts[0].kind == parts[1].kind:
        _launch(x, parts, None, precision, norm, eps, gated=True, tiles_alone=tiles_alone)
        return out
    left, right = run(x, [gate, up], [None, None], None, None, precision, norm, eps, tiles_alone=tiles_alone)
    return out.copy_(torch.nn.functional.silu(left) * right)


def run_invariant(*arguments: Any) -> list[torch.Tensor]:
    """`run` over tensor cores however few the rows of x: a row's bits depend on no other."""
    return run(*arguments, tiles_alone=True)


def run_invariant_gated(*arguments: Any) -> torch.Tensor:
    """`run_gated` in the same way."""
    return run_gated(*arguments, tiles_alone=True)


def _launches(parts: Sequence[_Part]) -> list[list[_Part]]:
    groups: list[list[_Part]] = []
    for part in parts:
        if groups and len(groups[-1]) < SLOTS and groups[-1][0].kind == part.kind:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _fields(weight: DeviceWeight) -> tuple[Any, ...]:
    return weight.codes, weight.high, weight.scales, weight.minimums, weight.groups, weight.groups_high


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan(
    x: torch.Tensor, parts: Sequence[_Part], precision: str, norm: Any, gated: bool, tiles_alone: bool
) -> LinearPlan:
    weight = parts[0].weight
    own = _name(weight.codes.dtype) if weight.layout.values == "float" else ""
    hip = bool(torch.version.hip)
    operand = operand_of(_name(x.dtype), own, weight.layout, precision, norm is not None, hip)
    rows = tuple(part.weight.shape[0] for part in parts)
    return plan_of(
        weight.layout, row_chunks(weight), rows, len(x), num_multiprocessors(x), operand,
        precision=precision, x_bytes=x.element_size(), norm=norm is not None, gated=gated, tiles_alone=tiles_alone,
        hip=hip,
    )  # fmt: skip


def row_chunks(weight: DeviceWeight) -> int:
    """Chunks of 16 bytes of a row of codes."""
    return int(weight.codes.shape[1]) // chunk_len(weight)


def chunk_len(weight: DeviceWeight) -> int:
    """Words, or numbers, of a chunk."""
    return 16 // int(weight.codes.element_size()) if weight.layout.values == "float" else CHUNK_WORDS


def _launch(
    x: torch.Tensor,
    parts: Sequence[_Part],
    residual: Any,
    precision: str,
    norm: Any,
    eps: float,
    gated: bool,
    tiles_alone: bool,
) -> None:
    if not (len(x) and parts[0].weight.shape[0]):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    plan, weight = _plan(x, parts, precision, norm, gated, tiles_alone), parts[0].weight
    token_tiles = -(-len(x) // plan.tokens)
    partial, counters = x, x
    if plan.splits > 1:
        sums = (2 if gated else 1) * plan.tokens * plan.tile.rows + plan.tokens
        size = plan.splits * plan.num_tiles * token_tiles * sums
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = arrival_counters(x, plan.num_tiles * token_tiles)
    arguments = _arguments(x, parts, residual, norm, eps, plan) | {"partial": partial, "counters": counters}
    given = {"norm": norm is not None, "bias": parts[0].bias is not None, "residual": residual is not None}
    fixed = constants(weight, plan, slots=1 if gated else len(parts), gated=gated, **given)
    with on_device_of(x):
        grid = (plan.num_tiles, plan.splits, token_tiles)
        _linear[grid](**arguments, **fixed, num_warps=plan.tile.warps, num_stages=plan.tile.stages)


def _arguments(
    x: torch.Tensor, parts: Sequence[_Part], residual: Any, norm: Any, eps: float, plan: LinearPlan
) -> dict[str, Any]:
    """The arguments of a launch by name. What is absent is x, or a weight's codes: never read."""
    weight = parts[0].weight
    found: dict[str, Any] = {"x": x, "x_stride": x.stride(0), "norm": x if norm is None else norm, "eps": eps}
    found["residual"] = x if residual is None else residual
    found["residual_stride"] = 0 if residual is None else residual.stride(0)
    found |= {"num_tokens": len(x), "num_cols": x.shape[1], "row_chunks": row_chunks(weight)}
    found |= {"row_groups": weight.row_groups, "splits": plan.splits, "steps": plan.steps}
    for slot, part in enumerate([*parts, *([parts[0]] * (SLOTS - len(parts)))]):
        fields = [part.weight.codes if field is None else field for field in (*_fields(part.weight), part.bias)]
        values = (*fields, part.out, part.out.stride(0), part.weight.shape[0])
        found |= {f"{name}{slot}": value for name, value in zip(_SLOT, values, strict=True)}
    return found


def constants(
    weight: DeviceWeight, plan: LinearPlan, *, slots: int, gated: bool, norm: bool, bias: bool, residual: bool
) -> dict[str, Any]:
    """The constants of a launch."""
    layout, chunks = weight.layout, row_chunks(weight)
    whole = chunks % plan.chunks == 0 and chunks * chunk_len(weight) * layout.parts == weight.shape[1]
    return {
        "VALUES": layout.values,
        "LOW": layout.low_bits,
        "HIGH": layout.high_bits,
        "WORDS": layout.words,
        "OFFSET": layout.offset,
        "GROUP": layout.group_len,
        "SCALES": layout.scales,
        "MINIMUMS": layout.minimums,
        "SCALE_ROWS": layout.scale_rows,
        "BM": plan.tokens,
        "BN": plan.tile.rows,
        "CHUNKS": plan.chunks,
        "CHUNK": chunk_len(weight),
        "SLOTS": slots,
        "GATED": gated,
        "NORM": norm,
        "BIAS": bias,
        "RESIDUAL": residual,
        "SPLIT": plan.splits > 1,
        "MASKED": not whole,
        "OPERAND": None if plan.operand is None else getattr(tl, plan.operand),
        "PRECISION": plan.precision,
        "STAGES": plan.tile.stages,
        "INTEGERS": plan.integers,
    }


def variants() -> list[Variant]:
    """Formats of each kind at 1 row, 2 or 4, 16 and 32, with what is fused into them."""
    x_types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    chosen = [
        ("BF16", 1, "bf16", "auto", ""),
        ("BF16", 4, "bf16", "auto", "norm gated"),
        ("BF16", 16, "bf16", "auto", "bias residual"),
        ("F32", 32, "fp32", "auto", ""),
        ("fp8", 1, "bf16", "auto", "norm"),
        ("int8", 1, "bf16", "auto", ""),
        ("int8", 32, "fp16", "auto", ""),
        ("int4", 1, "bf16", "auto", "residual"),
        ("int4", 32, "bf16", "auto", "gated"),
        ("Q4_0", 1, "fp32", "auto", "three"),
        ("Q4_K", 1, "bf16", "auto", "gated"),
        ("Q4_K", 2, "bf16", "exact", ""),
        ("Q4_K", 16, "bf16", "fast", ""),
        ("Q6_K", 2, "bf16", "auto", ""),
        ("IQ4_NL", 1, "bf16", "auto", ""),
    ]
    return [
        variant_of(name, tokens, x_types[kind], precision, fused, hip)
        for hip in (False, True)
        for name, tokens, kind, precision, fused in chosen
    ]


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}
_VARIANT_COLS = 4096
_ALIGNED = ("x_stride", "residual_stride", "num_cols", *(f"out_stride{slot}" for slot in range(SLOTS)))


def variant_of(
    name: str, tokens: int, x_dtype: torch.dtype, precision: str, fused: str = "", hip: bool = False
) -> Variant:
    """As a launch for one to three weights [4096, 4096] would be on 132 multiprocessors."""
    weight, gated = _sample(name), "gated" in fused
    count = 3 if "three" in fused else 2 if gated else 1
    out, vector = torch.empty(tokens, _VARIANT_COLS), torch.empty(_VARIANT_COLS)
    x = torch.empty(tokens, _VARIANT_COLS, dtype=x_dtype)
    given = {"bias": vector, "residual": out, "norm": vector}
    bias, residual, norm = (array if word in fused else None for word, array in given.items())
    own = "" if weight.layout.bits else _name(weight.codes.dtype)
    operand = operand_of(_name(x_dtype), own, weight.layout, precision, norm is not None, hip)
    rows = (_VARIANT_COLS,) * count
    more = {"precision": precision, "x_bytes": x.element_size(), "norm": norm is not None, "gated": gated, "hip": hip}
    plan = plan_of(weight.layout, row_chunks(weight), rows, tokens, 132, operand, **more)
    values = _arguments(x, [_Part(weight, bias, out)] * count, residual, norm, 1e-6, plan)
    values |= {"partial": out, "counters": torch.empty(1, dtype=torch.int32)}
    fixed = constants(
        weight, plan, slots=1 if gated else count, gated=gated, **{word: word in fused for word in given}
    )  # fmt: skip
    promised: tuple[str, ...] = ("cp.async.cg.shared.global [ %", ", 0x10") if plan.tile.stages > 1 else (".v4.b32",)
    promised += ("dp2a.lo.s32.u32", "dp2a.hi.s32.u32") if plan.integers else ()
    return Variant(
        " ".join(f"{name} x{tokens} {_TYPES[x_dtype]} {fused} {'exact' * (precision == 'exact')}".split()),
        _linear,
        {argument: _type(value) for argument, value in values.items()},
        fixed,
        plan.tile.warps,
        plan.tile.stages,
        aligned=_ALIGNED,
        chips=("gfx942",) if hip else ("sm_80", "sm_90", "sm_100"),
        instructions={} if hip else dict.fromkeys(("sm_80", "sm_90", "sm_100"), promised),
    )


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _sample(name: str) -> DeviceWeight:
    """A weight of this kind. NOTE: of one row: torch would do more in threads, which a forked process has lost."""
    rows = 1
    if name == "fp8":
        return from_fp8(torch.zeros(rows, _VARIANT_COLS).to(torch.float8_e4m3fn))
    if name == "int8":
        return from_int8(torch.zeros(rows, _VARIANT_COLS, dtype=torch.int8), 1.0)
    if name == "int4":
        groups = torch.ones(rows, _VARIANT_COLS // 128, dtype=torch.float16)
        return from_int4(torch.zeros(rows, _VARIANT_COLS, dtype=torch.uint8), groups, group_len=128)
    block_len, block_bytes = BLOCKS.get(name) or (1, FLOATS[name].itemsize)
    raw = torch.zeros(rows * _VARIANT_COLS // block_len * block_bytes, dtype=torch.uint8)
    return from_blocks(raw, name, (rows, _VARIANT_COLS), "cpu")
