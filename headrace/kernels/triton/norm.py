"""rms_norm on a GPU, and rms_norm into int8 or float8 codes: a tile of rows in registers, read once.

Wins always there: the reading and writing of rows bind. Bound: rows * dim * (width in + width out) bytes, 4 FLOPs each.
Schedule:
  1. A program takes some rows whole (as many as make 2048 elements), in 16-byte loads across a row.
  2. Squares are summed in float32 across the row, in one tree whose shape follows from dim alone.
  3. The row, still in registers, is scaled, multiplied by the weight (which all rows share: L2) and written.
  4. With codes, the largest |y| of the row first gives its scale, then codes are rounded to nearest even.
  5. With a residual, x is added to it first, in its own type; the sum is written back.
  6. Rows longer than 16384 go by in blocks, twice, three times with codes; the later times come from L2.
Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; the formats are those of ops/kv_formats.py.
Error: one float32 rounding per element beyond that of the sum (a tree), then one of the output's type.
Speed: not measured yet (`headrace bench gpu`). Predicted: 85 to 90 % of the copy bandwidth from 16 MB on; below that
the launch, 2 to 4 us, is all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.arrays import empty_like
from headrace.kernels.triton.launch import INTERPRETED, on_device_of
from headrace.kernels.triton.rows import packed
from headrace.kernels.triton.variants import Variant

LONGEST_ROW = 16384  # elements that a program holds in registers: 32 each of 16 warps' threads
TILE = 2048  # elements of the rows a program takes together
BLOCK = 8192  # of a longer row at a time
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded_even(x):
    """To the nearest whole number, of two the even one, for |x| < 2^22: the sum has no bits left below 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def store_codes(places, y, mask, DTYPE: tl.constexpr):
    """Quotients of at most the largest code as codes of that type.

    NOTE: the interpreter cuts off what float8 has no bits for, so there it is rounded before: multiples of 2^-3 of the
    leading bit, and of 2^-9 below the smallest normal number.
    """
    if tl.int8 == DTYPE:
        tl.store(places, rounded_even(y).to(tl.int8), mask=mask)
    else:
        if _INTERPRETED:
            bits = y.to(tl.int32, bitcast=True)
            step = tl.maximum(((bits >> 23) & 255) - 3, 127 - 9) << 23
            unit = step.to(tl.float32, bitcast=True)
            y = rounded_even(y / unit) * unit
        tl.store(places, y.to(DTYPE), mask=mask)


@triton.jit
def rms_norm_rows(
    x, weight, residual, out, scales, num_rows, dim, eps, x_stride, residual_stride, out_stride, largest,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that fit a program. scales: where those of the codes go; None: the numbers themselves are written."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        beside = residual + rows[:, None] * residual_stride + columns[None, :]
        values = sum_of(values, tl.load(beside, mask=mask, other=0.0))
        tl.store(beside, values.to(residual.dtype.element_ty), mask=mask)
    factors = tl.load(weight + columns, mask=columns < dim, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, axis=1) / dim
    y = values * (1.0 / tl.sqrt_rn(mean + eps))[:, None] * factors[None, :]
    places = out + rows[:, None] * out_stride + columns[None, :]
    if scales is None:
        tl.store(places, y.to(out.dtype.element_ty), mask=mask)
    else:
        scale, quotients = quotients_of(y, tl.max(tl.abs(y), axis=1), largest, tl.sum(y * 0.0, axis=1))
        tl.store(scales + rows, scale, mask=rows < num_rows)
        store_codes(places, quotients, mask, out.dtype.element_ty)


@triton.jit
def sum_of(values, residual):
    """Their sum as the residual's type holds it, in float32."""
    return (values + residual.to(tl.float32)).to(residual.dtype).to(tl.float32)


@triton.jit
def quotients_of(y, most, largest, nothing):
    """A row's scale, and what its codes are rounded from. nothing: 0, or NaN where not all of the row is finite."""
    scale = tl.div_rn(most, largest) + nothing
    divisor = tl.where(scale > 0, scale, 1.0)
    quotients = tl.div_rn(tl.where((scale > 0)[:, None], y, 0.0), divisor[:, None])
    return scale, tl.where((scale > 0)[:, None], tl.clamp(quotients, -largest, largest), 0.0)


@triton.jit
def rms_norm_long_row(
    x, weight, residual, out, scales, num_rows, dim, eps, x_stride, residual_stride, out_stride, largest,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row in blocks: once for the squares, once more for the product, with codes between them for the largest."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    if residual is not None:
        residual += row * residual_stride
    squares = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        values, _, _ = load_block(x, weight, residual, start, dim, BLOCK)
        squares += values * values
    factor = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / dim + eps)
    most = tl.zeros([1, BLOCK], tl.float32)
    nothing = tl.zeros([1, BLOCK], tl.float32)
    if scales is not None:
        for start in range(0, dim, BLOCK):
            values, weights, _ = load_block(x, weight, residual, start, dim, BLOCK)
            y = values * factor[:, None] * weights
            most = tl.maximum(most, tl.abs(y))
            nothing += y * 0.0
    for start in range(0, dim, BLOCK):
        values, weights, columns = load_block(x, weight, residual, start, dim, BLOCK)
        if residual is not None:
            tl.store(residual + columns, values.to(residual.dtype.element_ty), mask=columns < dim)
        y = values * factor[:, None] * weights
        if scales is None:
            tl.store(out + columns, y.to(out.dtype.element_ty), mask=columns < dim)
        else:
            scale, quotients = quotients_of(y, tl.max(most, axis=1), largest, tl.sum(nothing, axis=1))
            tl.store(scales + row + tl.arange(0, 1), scale)
            store_codes(out + columns, quotients, columns < dim, out.dtype.element_ty)


@triton.jit
def load_block(x, weight, residual, start, dim, BLOCK: tl.constexpr):
    """A block of a row, with the residual, of the weight, and their columns, each [1, BLOCK]."""
    columns = (start + tl.arange(0, BLOCK))[None, :]
    values = tl.load(x + columns, mask=columns < dim, other=0.0).to(tl.float32)
    if residual is not None:
        values = sum_of(values, tl.load(residual + columns, mask=columns < dim, other=0.0))
    return values, tl.load(weight + columns, mask=columns < dim, other=0.0).to(tl.float32), columns


def tile_of(dim: int) -> tuple[Any, int, int, int]:
    """The kernel for rows of that length, rows and columns of a program, and its warps."""
    if dim > LONGEST_ROW:
        return rms_norm_long_row, 1, BLOCK, 8
    columns = triton.next_power_of_2(max(dim, 16))
    rows = max(1, TILE // columns)
    return rms_norm_rows, rows, columns, min(max(rows * columns // 1024, 4), 16)


def run(x: Any, weight: Any, eps: float, out: Any, out_dtype: str, residual: Any = None) -> Any:
    """Rows of x normalized, in `out` when it is given. x [tokens, dim] with any stride of rows; added to residual."""
    out = empty_like(x, x.shape, out_dtype) if out is None else out
    _launch(packed(x, "x"), weight, eps, packed(out, "out", x.shape), None, residual)
    return out


def run_quantized(x: Any, weight: Any, eps: float, codes: Any, scales: Any, residual: Any = None) -> None:
    """Codes of the normalized rows [tokens, dim] and their scales [tokens]."""
    _launch(packed(x, "x"), weight, eps, packed(codes, "codes"), packed(scales, "scales"), residual)


def _launch(x: torch.Tensor, weight: Any, eps: float, out: torch.Tensor, scales: Any, residual: Any) -> None:
    num_rows, dim = x.shape
    factors = packed(weight, "weight", (dim,), "float32")
    residual = None if residual is None else packed(residual, "residual", x.shape)
    if not num_rows:
        return
    kernel, rows, columns, num_warps = tile_of(dim)
    largest = LARGEST.get(out.dtype, 0.0) if scales is not None else 0.0
    with on_device_of(x):
        kernel[(triton.cdiv(num_rows, rows),)](
            x, factors, residual, out, scales, num_rows, dim, eps, x.stride(0),
            0 if residual is None else residual.stride(0), out.stride(0), largest,
            ROWS=rows, BLOCK=columns, num_warps=num_warps,
        )  # fmt: skip


def variants() -> list[Variant]:
    """Rows of a head, of small and large models, and longer ones than a program holds; with codes."""
    sizes = (("bf16", 128), ("bf16", 4096), ("bf16", 16384), ("bf16", 28672), ("fp32", 4096))
    plain = [_variant(dtype, dim, dtype) for dtype, dim in sizes]
    plain += [_variant("bf16", dim, "bf16", residual=True) for dim in (4096, 28672)]
    return plain + [_variant("bf16", dim, codes) for dim, codes in ((4096, "i8"), (4096, "fp8e4nv"), (28672, "i8"))]


def _variant(dtype: str, dim: int, out: str, residual: bool = False) -> Variant:
    kernel, rows, columns, num_warps = tile_of(dim)
    coded = out in ("i8", "fp8e4nv")
    types = {"x": f"*{dtype}", "weight": "*fp32", "out": f"*{out}", "num_rows": "i32", "dim": "i32", "eps": "fp32"}
    types |= {"x_stride": "i32", "out_stride": "i32", "largest": "fp32"} | ({"scales": "*fp32"} if coded else {})
    types |= {"residual": f"*{dtype}", "residual_stride": "i32"} if residual else {}
    constants = {"ROWS": rows, "BLOCK": columns} | ({} if coded else {"scales": None})
    constants |= {} if residual else {"residual": None, "residual_stride": 0}
    chips = ("sm_90", "sm_100") if out == "fp8e4nv" else ("sm_80", "sm_90", "sm_100", "gfx942")
    aligned = ("dim", "x_stride", "out_stride", *(["residual_stride"] if residual else []))
    name = f"{dtype} dim {dim}" + (f" to {out}" if coded else "") + (" and residual" if residual else "")
    return Variant(name, kernel, types, constants, num_warps, 3, chips, aligned)
