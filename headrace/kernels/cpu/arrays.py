"""Arrays at the native border: anything that speaks DLPack, NumPy's bfloat16 and float8, and buffers of a program.

NumPy's bfloat16 and float8 (ml-dtypes) speak neither DLPack nor the buffer protocol: they travel as integers with their
name, and so does torch's float8; bool is uint8 to native code. That happens here and nowhere else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from headrace.errors import ArgumentError, CapacityError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native

_ADDRESSABLE_BYTES = 2**47
# What travels as another type, which has the same size.
_VIEWS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "bool": "uint8"}
_OF_ML_DTYPES = ("bfloat16", "float8_e4m3fn")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's type of that name, bfloat16 and float8_e4m3fn included."""
    return np.dtype(getattr(ml_dtypes, name) if name in _OF_ML_DTYPES else name)


@dataclass(frozen=True)
class Buffer:
    """An array of a program being recorded: it has a shape and a dtype now, and memory when the program is finished."""

    tensor: native.Tensor
    program: native.Program

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def view(self, *shape: int) -> Buffer:
        """The same memory with other inner dimensions; the rows stay."""
        return Buffer(self.tensor.view([self.tensor.shape[0], *shape]), self.program)


def program_input(array: np.ndarray, program: native.Program, rows: str) -> Buffer:
    """An array whose contents change from step to step, at a fixed address; `rows` names what its length follows."""
    tensor = as_tensor(array, rows)
    return Buffer(tensor if rows == "fixed" else tensor.follow(rows), program)


@dataclass(frozen=True)
class Fixed:
    """An array on memory of the runtime's own, in any of its types, for any program and any call."""

    tensor: native.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def numpy(self) -> np.ndarray:
        """The same memory as a NumPy array."""
        array = self.tensor.numpy()
        return array.view(numpy_dtype(self.dtype))


def zeros(shape: Sequence[int], dtype: str) -> Fixed:
    """A zeroed array on large pages, which take memory when first written. CapacityError when there is none."""
    num_bytes = math.prod(shape) * numpy_dtype(dtype).itemsize
    if num_bytes >= _ADDRESSABLE_BYTES:
        raise CapacityError(f"memory: expected less than {_ADDRESSABLE_BYTES} bytes for one array, got {num_bytes}")
    return Fixed(cpu.default_pool().buffer(dtype, "fixed", list(shape)))


def dtype_name(array: Any) -> str:
    """The element type's name as NumPy spells it ("float32", "bfloat16", ...), for any array library."""
    return _dtype_text(array.dtype)


@functools.cache
def _dtype_text(dtype: Any) -> str:
    # NumPy takes microseconds to spell a dtype.
    return str(dtype).removeprefix("torch.")


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


def is_torch(array: Any) -> bool:
    """Whether it is a torch tensor, without importing torch."""
    return type(array).__module__.partition(".")[0] == "torch"


def shape_of(array: Any, name: str) -> tuple[int, ...]:
    """The shape of an array, or an error that names the argument."""
    shape = getattr(array, "shape", None)
    if shape is None or not hasattr(array, "dtype"):
        raise ArgumentError(f"{name}: expected an array, got {type(array).__name__}", "NumPy, torch or JAX on the CPU")
    # torch.Size is a tuple too; its numbers may be symbols, which must stay what they are.
    return shape if isinstance(shape, tuple) else tuple(int(n) for n in shape)


def check_writable(array: Any, name: str) -> None:
    """ArgumentError for an array whose library promises that it does not change."""
    frozen = isinstance(array, np.ndarray) and not array.flags.writeable
    if frozen or type(array).__module__.partition(".")[0] in ("jax", "jaxlib"):
        raise ArgumentError(
            f"{name}: expected an array that can be written to, got a read-only one", "a NumPy copy of it"
        )


def empty_like(array: Any, shape: Sequence[int], dtype: str) -> Any:
    """An uninitialized array of the same library as `array`; rows of a program's buffer keep following its step."""
    if isinstance(array, Buffer):
        kind = array.tensor.rows_kind if shape[0] == array.shape[0] else "fixed"
        return Buffer(array.program.buffer(dtype, kind, list(shape)), array.program)
    if is_torch(array):
        import torch

        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    return np.empty(tuple(shape), dtype=numpy_dtype(dtype))


def runner_of(*arrays: Any) -> native.Runner:
    """The program that is recording these arrays, or the pool that runs the call at once."""
    for array in arrays:
        if isinstance(array, Buffer):
            return array.program
    return cpu.default_pool()
