"""embedding and select_rows on the CPU: rows by their numbers (native: op_embedding.cpp).

Wins always: each is the only one. Bound: memory; rows of packed weights are put together from their panels.
Error: none: the numbers are those the format defines.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of


def run(level: str, ids: Any, table: Any, out: Any) -> None:
    """Rows of a packed weight."""
    native.embedding(runner_of(ids, out), as_tensor(out, "out"), as_tensor(ids, "ids"), table)


def run_rows(level: str, rows: Any, x: Any, out: Any) -> None:
    """Rows of a float32 array."""
    native.select_rows(runner_of(x, rows, out), as_tensor(out, "out"), as_tensor(x, "x"), as_tensor(rows, "rows"))
