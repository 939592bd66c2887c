"""rms_norm into codes with NumPy: the formula in float32, row by row of the array at once.

Wins always on the CPU: it is the only one. Several passes over the array: some 1 GB/s.
Error: the norm's own roundings, then at most half a code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.kernels.numpy.views import numpy_view

_LARGEST = {"int8": 127, "float8_e4m3fn": 448}


def add_to(residual: Any, x: Any) -> Any:
    """The residual, to which x has been added."""
    total = numpy_view(residual, "residual")
    total[...] = total.astype(np.float32) + numpy_view(x, "x").astype(np.float32)
    return residual


def run_quantized(x: Any, weight: Any, eps: float, codes: Any, scales: Any, residual: Any = None) -> None:
    """Codes of the normalized rows [tokens, dim] and their scales [tokens]."""
    x = x if residual is None else add_to(residual, x)
    rows, out = numpy_view(x, "x").astype(np.float32), numpy_view(codes, "codes")
    mean = np.mean(rows * rows, axis=1, keepdims=True)
    y = rows * (1 / np.sqrt(mean + np.float32(eps))) * numpy_view(weight, "weight")
    largest = np.float32(_LARGEST[str(out.dtype)])
    most = np.where(np.isfinite(y).all(axis=1), np.max(np.abs(y), axis=1, initial=0) / largest, np.float32(np.nan))
    usable = most > 0
    quotients = np.where(usable[:, None], y, 0) / np.where(usable, most, 1)[:, None]
    quotients = np.clip(quotients, -largest, largest)
    out[...] = np.rint(quotients) if out.dtype == np.int8 else quotients
    numpy_view(scales, "scales")[...] = most
