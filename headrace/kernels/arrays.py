"""Arrays of any library: their type, shape, device and like, and the arrays of native memory. Needs no native code.

An array is anything that speaks DLPack: NumPy's, torch's and JAX's on the CPU, torch's on a GPU. What hands them to
native code is kernels/cpu/arrays.py; what hands them to kernels written over torch is `as_torch`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from headrace.errors import ArgumentError
from headrace.gpu_machine import arch_of_gpu

if TYPE_CHECKING:
    from headrace.kernels.cpu import _native as native

_OF_ML_DTYPES = {"bfloat16": "int16", "float8_e4m3fn": "uint8"}  # and what their bits are taken for


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


def dtype_name(array: Any) -> str:
    """The element type's name as NumPy spells it ("float32", "bfloat16", ...), for any array library."""
    return _dtype_text(array.dtype)


@functools.cache
def _dtype_text(dtype: Any) -> str:
    # NumPy takes microseconds to spell a dtype.
    return str(dtype).removeprefix("torch.")


def is_torch(array: Any) -> bool:
    """Whether it is a torch tensor, without importing torch."""
    return type(array).__module__.partition(".")[0] == "torch"


def shape_of(array: Any, name: str) -> tuple[int, ...]:
    """The shape of an array, or an error that names the argument."""
    shape = getattr(array, "shape", None)
    if shape is None or not hasattr(array, "dtype"):
        raise ArgumentError(f"{name}: expected an array, got {type(array).__name__}", "NumPy, torch or JAX")
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
    """An uninitialized array of the library and on the device of `array`; rows of a program's buffer keep following
    its step."""
    if isinstance(array, Buffer):
        kind = array.tensor.rows_kind if shape[0] == array.shape[0] else "fixed"
        return Buffer(array.program.buffer(dtype, kind, list(shape)), array.program)
    if is_torch(array):
        import torch

        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=array.device)
    return np.empty(tuple(shape), dtype=numpy_dtype(dtype))


# Where an array lies


def device_of(array: Any) -> str:
    """The kind of device: "cpu", "cuda" (NVIDIA), "hip" (AMD), or what torch calls one of another kind."""
    if isinstance(array, np.ndarray) or not is_torch(array) or array.is_cpu:
        return "cpu"
    return _gpu_kind() if array.is_cuda else str(array.device.type)


def arch_of(array: Any) -> str:
    """The GPU generation that holds an array: "sm_90", "gfx942"; empty of other devices."""
    return arch_of_gpu(array.device.index) if device_of(array) in ("cuda", "hip") else ""


def check_same_device(arrays: Mapping[str, Any]) -> None:
    """ArgumentError that names the first array which does not lie where the first of all does, on the CPU or a GPU."""
    names = iter(arrays)
    first = next(names)
    place = _place(arrays[first])
    if place != _CPU and device_of(arrays[first]) not in ("cuda", "hip"):
        raise _misplaced(first, arrays[first], f"{_CPU} or a GPU (CUDA, ROCm)")
    for name in names:
        if _place(arrays[name]) != place:
            raise _misplaced(name, arrays[name], str(place), f"all arrays where {first} is")


_CPU = "the CPU"


def _place(array: Any) -> Any:
    """The one device, of several GPUs too."""
    if isinstance(array, np.ndarray) or not is_torch(array) or array.is_cpu:
        return _CPU
    return array.device


def _misplaced(name: str, array: Any, expected: str, hint: str | None = None) -> ArgumentError:
    got = f"{type(array).__name__} on {_place(array)}"
    return ArgumentError(f"{name}: expected an array on {expected}, got {got}", hint)


@functools.cache
def _gpu_kind() -> str:
    """Whose GPUs torch was built for: it calls both "cuda"."""
    import torch

    return "hip" if torch.version.hip else "cuda"


def as_torch(array: Any, name: str) -> Any:
    """The array as a tensor of torch, without a copy."""
    if is_torch(array):
        return array
    if isinstance(array, Buffer):
        raise ArgumentError(f"{name}: expected an array, got a buffer of a program, which only kernels of the CPU take")
    import torch

    array = array.numpy() if isinstance(array, Fixed) else array
    integers = _OF_ML_DTYPES.get(dtype_name(array))
    if isinstance(array, np.ndarray) and integers:
        return torch.from_numpy(array.view(integers)).view(getattr(torch, dtype_name(array)))
    return torch.as_tensor(array)
