"""embedding(ids [tokens], table [vocab, dim]) -> [tokens, dim]; select_rows(x, rows [outputs]) -> [outputs, dim]

    embedding:   y[t] = table[ids[t]]        select_rows: y[i] = x[rows[i]]

The table is a packed weight of any format, so that a model whose head is its embedding keeps one copy, or an array of
floats.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, dtype_name, empty_like, numpy_dtype, shape_of
from headrace.kernels.device_weight import DeviceWeight
from headrace.ops import gpu_rows
from headrace.ops.late import late
from headrace.ops.per_isa import per_isa
from headrace.ops.per_numpy import numpy_kernel
from headrace.ops.select import Kernel, Reason, Request, Traffic, choose, placed

DTYPES = ("float32", "float16", "bfloat16")


def embedding(ids: Any, table: Any, *, out: Any = None, kernel: str | None = None) -> Any:
    """Rows of the table as float32, bit for bit what the format defines.

    ids: [tokens] int32; table: a packed weight, or [vocab, dim] of floats; out: [tokens, dim] float32. Raises
    ArgumentError for an id outside the table; a GPU, which is not waited for, writes NaN in its place.
    """
    _check_indices(ids, "ids")
    if isinstance(table, DeviceWeight):
        return _on_device(ids, table, out)
    packed = not hasattr(table, "dtype")
    if not packed:
        check_same_device({"ids": ids, "table": table})
    asked = placed(request(shape_of(ids, "ids"), tuple(table.shape), "packed" if packed else dtype_name(table)), ids)
    chosen = choose(kernels(), asked, kernel)
    out = empty_like(ids, (shape_of(ids, "ids")[0], table.shape[1]), "float32") if out is None else out
    chosen.run(ids, table, out)
    return out


def _on_device(ids: Any, table: DeviceWeight, out: Any) -> Any:
    from headrace.kernels.triton.weight import dequantize

    check_same_device({"ids": ids, "table": table.codes} | ({} if out is None else {"out": out}))
    found = ids.clamp(0, table.shape[0] - 1)
    rows = dequantize(table, found.long()).masked_fill((found != ids)[:, None], float("nan"))
    return rows if out is None else out.copy_(rows)


def select_rows(x: Any, rows: Any, *, out: Any = None, kernel: str | None = None) -> Any:
    """Copies of the rows of x [tokens, dim] float32 whose numbers are in rows [outputs] int32.

    Raises ArgumentError for a number outside x; a GPU, which is not waited for, writes NaN in its place.
    """
    _check_indices(rows, "rows")
    check_same_device({"x": x, "rows": rows})
    shape = shape_of(x, "x")
    chosen = choose(selecting_kernels(), placed(request(shape_of(rows, "rows"), shape, dtype_name(x)), x), kernel)
    out = empty_like(rows, (shape_of(rows, "rows")[0], shape[1]), "float32") if out is None else out
    chosen.run(rows, x, out)
    return out


def reference(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The formula."""
    return table[ids].astype(np.float64)


def request(ids: tuple[int, ...], table: tuple[int, ...], dtype: str) -> Request:
    """The request of either: each row is read and written once. dtype: of the table, or "packed"."""
    if len(table) != 2 or dtype not in (*DTYPES, "packed"):
        raise ArgumentError(f"table: expected [vocab, dim] of {', '.join(DTYPES)}, got {dtype} {list(table)}")
    width = 1 if dtype == "packed" else numpy_dtype(dtype).itemsize
    traffic = Traffic(ids[0] * table[1] * (width + 4), math.prod(ids))
    return Request("embedding", {"ids": ids, "table": table}, {"table": dtype}, traffic)


def _check_indices(indices: Any, name: str) -> None:
    if len(shape_of(indices, name)) != 1 or dtype_name(indices) != "int32":
        raise ArgumentError(f"{name}: expected int32 [n], got {dtype_name(indices)} {list(shape_of(indices, name))}")


def _why_not_array(request: Request) -> list[Reason]:
    if request.dtypes["table"] == "packed":
        return []
    return [Reason("table", request.dtypes["table"], "a packed weight", "headrace.ops.linear.pack(raw, format, shape)")]


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of embedding: arrays on a GPU, packed weights on the CPU, arrays there."""
    native = per_isa(late("headrace.kernels.cpu.embedding"), ("portable",), _why_not_array)
    return *gpu_rows.row_kernels(), *native, numpy_kernel("numpy_embedding", "headrace.kernels.numpy.embedding")


@functools.cache
def selecting_kernels() -> tuple[Kernel, ...]:
    """The kernels of select_rows."""
    return *gpu_rows.row_kernels(), *per_isa(late("headrace.kernels.cpu.embedding", "run_rows"), ("portable",))
