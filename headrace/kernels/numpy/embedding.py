"""Rows of an unpacked table with NumPy.

Wins on the CPU, where it is the only one that takes such a table. Bound: memory, on one thread. Error: none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.numpy.views import numpy_view


def run(ids: Any, table: Any, out: Any) -> None:
    """Rows of the table [vocab, dim] by numbers int32 [n]. ArgumentError for a number outside."""
    numbers, rows = numpy_view(ids, "ids"), numpy_view(table, "table")
    outside = np.flatnonzero((numbers < 0) | (numbers >= len(rows)))
    if outside.size:
        raise ArgumentError(f"ids: expected 0 to {len(rows) - 1}, got {numbers[outside[0]]}")
    numpy_view(out, "out")[...] = rows[numbers]
