"""rms_norm on the CPU: one pass for the squares, one for the product, 16 lanes across a row (native: norm.h).

Wins always: it is the only one. Bound: the row is read twice, the second time from L1.
Error: one float32 rounding per element beyond that of the sum, which is kept in 32 partial sums.
A residual is added to with NumPy before.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.arrays import empty_like
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of
from headrace.kernels.numpy.norm import add_to


def run(level: str, x: Any, weight: Any, eps: float, out: Any, out_dtype: str, residual: Any = None) -> Any:
    x = x if residual is None else add_to(residual, x)
    out = empty_like(x, x.shape, out_dtype) if out is None else out
    native.rms_norm(runner_of(x), level, as_tensor(out, "out"), as_tensor(x, "x"), as_tensor(weight, "weight"), eps)
    return out
