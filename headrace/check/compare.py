"""Error budgets: how far a kernel may be from the float64 reference.

    error(kernel) <= 2 x (error of a straightforward low-precision computation + one rounding of the largest value)

Nobody writes a tolerance by hand: the straightforward computation, in the kernel's own input and output types, sets it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.kernels.arrays import numpy_dtype

ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An output full of NaN: what a kernel does not write stays visible."""
    return np.full(shape, np.nan, dtype=numpy_dtype(dtype))


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as `dtype` holds them."""
    return values.astype(numpy_dtype(dtype))


def budget(exact: np.ndarray, straightforward: Any, dtype: str, *, logarithms: bool = False) -> float:
    """The largest error allowed of an output of type `dtype`; infinite ones among the exact must be met exactly.

    logarithms: of sums; one rounding of the sum moves its logarithm by one rounding of 1, however small that is.
    """
    finite = np.isfinite(exact)
    if not finite.any():
        return 0.0
    error = np.max(np.abs(np.asarray(straightforward).astype(np.float64)[finite] - exact[finite]))
    return float(2 * (error + ROUNDING[dtype] * np.max(np.abs(exact[finite]), initial=float(logarithms))))


def assert_within_budget(
    got: Any, exact: np.ndarray, straightforward: Any, dtype: str, *, logarithms: bool = False
) -> None:
    """Raises AssertionError that says where the worst element is, and both numbers."""
    values = np.asarray(got).astype(np.float64)
    assert values.shape == exact.shape, f"shape {values.shape}, expected {exact.shape}"
    if exact.size == 0:
        return
    error = np.abs(np.where(values == exact, 0, values) - np.where(values == exact, 0, exact))
    allowed = budget(exact, straightforward, dtype, logarithms=logarithms)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    place = [int(i) for i in worst]
    assert error[worst] <= allowed, f"at {place}: got {values[worst]}, exact {exact[worst]}, allowed {allowed:.3g}"
