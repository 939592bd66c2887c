"""Rows of a table by their numbers on a GPU: embedding of floats, and select_rows.

Wins always there. Bound: rows * dim * (width in + width out) bytes.
Schedule: a program copies 1024 columns of one row; rows outside the table become NaN, as the host is not asked.
Error: none, or the rounding to a narrower output.
Speed: not measured yet (`headrace bench gpu`); below some 8 MB the launch is all of it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.rows import packed
from headrace.kernels.triton.variants import Variant

COLUMNS = 1024


@triton.jit
def take_rows(table, numbers, out, table_stride, out_stride, num_table_rows, dim, COLUMNS: tl.constexpr):
    """Some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    number = tl.load(numbers + row).to(tl.int64)
    inside = (number >= 0) & (number < num_table_rows)
    values = tl.load(table + number * table_stride + columns, mask=inside & (columns < dim), other=float("nan"))
    tl.store(out + row * out_stride + columns, values.to(tl.float32).to(out.dtype.element_ty), mask=columns < dim)


def run(numbers: Any, table: Any, out: Any) -> None:
    """Rows of the table [rows, dim] by numbers int32 [n]."""
    ids, source = packed(numbers, "ids", dtype="int32"), packed(table, "table")
    shape = (len(ids), source.shape[1])
    target = packed(out, "out", shape)
    if target.numel():
        with on_device_of(source):
            take_rows[(shape[0], triton.cdiv(shape[1], COLUMNS))](
                source, ids, target, source.stride(0), target.stride(0), source.shape[0], shape[1],
                COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip


def variants() -> list[Variant]:
    """Tables of bfloat16 and float32."""
    return [_variant(dtype) for dtype in ("bf16", "fp32")]


def _variant(dtype: str) -> Variant:
    types = {"table": f"*{dtype}", "numbers": "*i32", "out": "*fp32"}
    types |= dict.fromkeys(("table_stride", "out_stride", "num_table_rows", "dim"), "i32")
    aligned = ("table_stride", "out_stride", "dim")
    return Variant(f"{dtype} table", take_rows, types, {"COLUMNS": COLUMNS}, 4, aligned=aligned)
