"""Arrays of any library on the CPU as NumPy's, on the same memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer, Fixed, dtype_name, is_torch

_VIEWS = {"bfloat16": "int16", "float8_e4m3fn": "uint8"}


def numpy_view(array: Any, name: str) -> np.ndarray:
    """The array's memory as NumPy sees it; what is written there is written to the array."""
    if isinstance(array, Buffer):
        raise ArgumentError(f"{name}: expected an array, got a buffer of a program, which native kernels alone take")
    if isinstance(array, Fixed):
        return array.numpy()
    if not is_torch(array):
        return np.asarray(array)
    kind = dtype_name(array)
    if kind not in _VIEWS:
        return array.detach().numpy()
    import torch

    return array.detach().view(getattr(torch, _VIEWS[kind])).numpy().view(getattr(ml_dtypes, kind))
