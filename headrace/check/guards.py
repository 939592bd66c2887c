"""Arrays of a test as tensors on a device, in guarded memory: what a kernel reads or writes beside them shows.

Before and behind each array lie as many poisoned bytes (NaN, or the largest negative integer): a number read there
spoils the result, and one written there is found by `Guarded.assert_untouched`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

GUARD = 1 << 12  # elements on each side
# Bytes of it are a NaN in every float, and a number in integers that is no index.
_POISON = {"f": 0xFF, "V": 0xFF}
_OTHER_POISON = 0x7F
_TORCH_VIEWS = {"bfloat16": "int16", "float8_e4m3fn": "uint8"}


class Guarded:
    """Tensors made of a test's arrays, each inside a guarded region of its own."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._regions: list[tuple[str, Any, int]] = []

    def tensor(self, array: np.ndarray, name: str = "array") -> Any:
        """The array's numbers and strides as a tensor on the device."""
        import torch

        memory = _memory_of(array)
        poison = _poison_of(array.dtype, memory.dtype)
        integers = np.full(len(memory) + 2 * GUARD, poison, memory.dtype)
        integers[GUARD : GUARD + len(memory)] = memory
        whole = torch.from_numpy(integers).to(self.device)
        self._regions.append((name, whole, poison))
        typed = whole.view(getattr(torch, str(array.dtype)))
        strides = [stride // array.itemsize for stride in array.strides]
        return torch.as_strided(typed, array.shape, strides, GUARD)

    def tensors(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Those among the arguments of a call that are arrays, as tensors; the others as they are."""
        return {n: self.tensor(a, n) if isinstance(a, np.ndarray) else a for n, a in arrays.items()}

    def assert_untouched(self) -> None:
        """AssertionError that names the array beside which something was written."""
        for name, whole, poison in self._regions:
            numbers = whole.cpu().numpy()
            for side, part in (("before", numbers[:GUARD]), ("behind", numbers[-GUARD:])):
                assert (part == poison).all(), f"{name}: memory {side} it was written to"


def _memory_of(array: np.ndarray) -> np.ndarray:
    """The integers from an array's first element to its last, those that strides leave out included."""
    integers = np.dtype({1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[array.itemsize])
    if array.size == 0:
        return np.zeros(0, integers)
    if any(stride < 0 for stride in array.strides):
        raise ValueError("strides: expected none below 0")
    steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    length = 1 + sum(steps) // array.itemsize
    return np.lib.stride_tricks.as_strided(array.view(integers), (length,), (array.itemsize,))


def _poison_of(dtype: np.dtype[Any], integers: np.dtype[Any]) -> Any:
    byte = _POISON.get(dtype.kind, _OTHER_POISON)
    return np.frombuffer(bytes([byte] * integers.itemsize), integers)[0]


def as_numpy(tensor: Any) -> np.ndarray:
    """A tensor's numbers as NumPy holds them, bfloat16 and float8 too."""
    name = str(tensor.dtype).removeprefix("torch.")
    host = tensor.detach().cpu()
    if name not in _TORCH_VIEWS:
        return host.numpy()
    import torch

    integers = host.contiguous().view(getattr(torch, _TORCH_VIEWS[name])).numpy()
    return integers.view(getattr(ml_dtypes, name))
