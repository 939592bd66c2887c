"""Arrays at the native border: anything that speaks DLPack, NumPy's bfloat16 and float8, and buffers of a program.

NumPy's bfloat16 and float8 (ml-dtypes) speak neither DLPack nor the buffer protocol: they travel as integers with their
name, and so does torch's float8; bool is uint8 to native code. That happens here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.errors import ArgumentError, CapacityError
from headrace.kernels import cpu
from headrace.kernels.arrays import Buffer, Fixed, dtype_name, is_torch, numpy_dtype
from headrace.kernels.cpu import _native as native

_ADDRESSABLE_BYTES = 2**47
# What travels as another type, which has the same size.
_VIEWS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "bool": "uint8"}


def program_input(array: np.ndarray, program: native.Program, rows: str) -> Buffer:
    """An array whose contents change from step to step, at a fixed address; `rows` names what its length follows."""
    tensor = as_tensor(array, rows)
    return Buffer(tensor if rows == "fixed" else tensor.follow(rows), program)


def zeros(shape: Sequence[int], dtype: str) -> Fixed:
    """A zeroed array on large pages, which take memory when first written. CapacityError when there is none."""
    num_bytes = math.prod(shape) * numpy_dtype(dtype).itemsize
    if num_bytes >= _ADDRESSABLE_BYTES:
        raise CapacityError(f"memory: expected less than {_ADDRESSABLE_BYTES} bytes for one array, got {num_bytes}")
    return Fixed(cpu.default_pool().buffer(dtype, "fixed", list(shape)))


def as_tensor(array: Any, name: str) -> native.Tensor:
    """A native view of `array`, without a copy."""
    if isinstance(array, (Buffer, Fixed)):
        return array.tensor
    dtype = dtype_name(array)
    if dtype in _VIEWS:
        array = _as_integers(array, _VIEWS[dtype])
    try:
        return native.wrap(array, "uint8" if dtype == "bool" else dtype)
    except TypeError as error:
        got = f"{type(array).__name__} on {array.device}" if is_torch(array) else type(array).__name__
        raise ArgumentError(f"{name}: expected an array on the CPU, got {got}") from error


def _as_integers(array: Any, integers: str) -> Any:
    """The same memory as integers, of what DLPack may not carry."""
    if isinstance(array, np.ndarray):
        return array.view(integers)
    if is_torch(array) and integers == "uint8":
        import torch

        return array.view(torch.uint8)
    return array  # others may know how to hand it over themselves


def runner_of(*arrays: Any) -> native.Runner:
    """The program that is recording these arrays, or the pool that runs the call at once."""
    for array in arrays:
        if isinstance(array, Buffer):
            return array.program
    return cpu.default_pool()
