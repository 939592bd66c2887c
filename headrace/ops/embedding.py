"""embedding(ids [tokens], table [vocab, dim]) -> [tokens, dim]; select_rows(x, rows [outputs]) -> [outputs, dim]

    embedding:   y[t] = table[ids[t]]        select_rows: y[i] = x[rows[i]]

The table is a packed weight of any format, so that a model whose head is its embedding keeps one copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, dtype_name, empty_like, shape_of
from headrace.kernels.device_weight import DeviceWeight

if TYPE_CHECKING:
    from headrace.kernels.cpu.linear import PackedWeight


def embedding(ids: Any, table: PackedWeight | DeviceWeight, *, out: Any = None) -> Any:
    """Rows of the table as float32, bit for bit what the format defines.

    ids: [tokens] int32; out: [tokens, dim] float32. Raises ArgumentError for an id outside the table; on a GPU, where
    nobody waits for the ids, such a row is NaN.
    """
    _check_indices(ids, "ids")
    if isinstance(table, DeviceWeight):
        return _on_device(ids, table, out)
    from headrace.kernels.cpu import _native as native
    from headrace.kernels.cpu.arrays import as_tensor, runner_of

    if out is None:
        out = empty_like(ids, (shape_of(ids, "ids")[0], table.shape[1]), "float32")
    native.embedding(runner_of(ids, out), as_tensor(out, "out"), as_tensor(ids, "ids"), table)
    return out


def _on_device(ids: Any, table: DeviceWeight, out: Any) -> Any:
    from headrace.kernels.triton.weight import dequantize

    check_same_device({"ids": ids, "table": table.codes} | ({} if out is None else {"out": out}))
    found = ids.clamp(0, table.shape[0] - 1)
    rows = dequantize(table, found.long()).masked_fill((found != ids)[:, None], float("nan"))
    return rows if out is None else out.copy_(rows)


def select_rows(x: Any, rows: Any, *, out: Any = None) -> Any:
    """Copies of the rows of x [tokens, dim] float32 whose numbers are in rows [outputs] int32.

    Raises ArgumentError for a number outside x.
    """
    from headrace.kernels.cpu import _native as native
    from headrace.kernels.cpu.arrays import as_tensor, runner_of

    _check_indices(rows, "rows")
    if out is None:
        out = empty_like(rows, (shape_of(rows, "rows")[0], shape_of(x, "x")[1]), "float32")
    native.select_rows(runner_of(x, rows, out), as_tensor(out, "out"), as_tensor(x, "x"), as_tensor(rows, "rows"))
    return out


def reference(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The formula."""
    return table[ids].astype(np.float64)


def _check_indices(indices: Any, name: str) -> None:
    if len(shape_of(indices, name)) != 1 or dtype_name(indices) != "int32":
        raise ArgumentError(f"{name}: expected int32 [n], got {dtype_name(indices)} {list(shape_of(indices, name))}")
