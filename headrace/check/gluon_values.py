"""What a simulated kernel computes with: tensors, pointers and TMA descriptors, and the functions on them, in NumPy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

NUMPY_TYPES: dict[Any, Any] = {ml_dtypes.bfloat16: np.dtype(ml_dtypes.bfloat16)}


def raw(value: Any) -> Any:
    """A value as NumPy or Python has it."""
    return value.value if isinstance(value, Tensor) else value


def wrapped(value: Any) -> Any:
    """An argument as the kernel sees it."""
    if isinstance(value, np.ndarray):
        return Pointer(value.reshape(-1), np.int64(0))
    if value is None or isinstance(value, (bool, str, Descriptor)) or is_dataclass(value):
        return value
    return Tensor(np.float32(value) if isinstance(value, float) else np.int64(value))


class Tensor:
    """An array or a number; float16 and bfloat16 arithmetic is not for kernels, float32 stays float32."""

    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)
        self.shape = self.value.shape
        self.dtype = self.value.dtype.type
        self.type = SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Tensor:
        return Tensor(self.value.astype(NUMPY_TYPES.get(dtype, dtype)))

    def __getitem__(self, place: Any) -> Tensor:
        return Tensor(self.value[place])

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        return int(self.value)


def _binary(function: Callable[[Any, Any], Any], turned: bool = False) -> Callable[[Tensor, Any], Any]:
    def apply(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = raw(self), raw(other)
        if isinstance(b, float):
            b = np.float32(b)
        with np.errstate(all="ignore"):
            return Tensor(function(b, a) if turned else function(a, b))

    return apply


_WORDS = "add sub mul truediv floordiv mod and or xor lt le gt ge eq ne"
for _word in _WORDS.split():
    _function = getattr(operator, f"{_word}_" if _word in ("and", "or") else _word)
    setattr(Tensor, f"__{_word}__", _binary(_function))
    setattr(Tensor, f"__r{_word}__", _binary(_function, turned=True))


class Pointer:
    """Into an array given as an argument."""

    def __init__(self, memory: np.ndarray, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype.type)

    def __add__(self, distance: Any) -> Pointer:
        return Pointer(self.memory, self.offset + np.asarray(raw(distance)).astype(np.int64))

    __radd__ = __add__

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and mask, as arrays; one outside of the memory is an error."""
        chosen = np.broadcast_to(np.asarray(True if mask is None else raw(mask)), np.shape(self.offset))
        used = np.where(chosen, self.offset, 0)
        assert ((used >= 0) & (used < max(self.memory.size, 1))).all(), "a pointer outside of its array"
        return used, chosen


class Descriptor:
    """A TMA descriptor: an array and the shape of the boxes copied from it; outside of it are zeros."""

    def __init__(self, array: np.ndarray, block_shape: Sequence[int]) -> None:
        self.array, self.block_shape = array, list(block_shape)
        self.dtype = array.dtype.type
        self.block_type = SimpleNamespace(shape=self.block_shape)

    def box(self, place: Sequence[int]) -> np.ndarray:
        """The box that begins there."""
        found = np.zeros(self.block_shape, self.array.dtype)
        ends = [(max(p, 0), min(p + n, s)) for p, n, s in zip(place, self.block_shape, self.array.shape, strict=True)]
        if all(begin < end for begin, end in ends):
            to = tuple(slice(begin - p, end - p) for (begin, end), p in zip(ends, place, strict=True))
            found[to] = self.array[tuple(slice(begin, end) for begin, end in ends)]
        return found


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    used, chosen = pointer.places(mask)
    values = pointer.memory[used] if pointer.memory.size else np.zeros(np.shape(used), pointer.memory.dtype)
    found = np.where(chosen, values, raw(other))
    return Tensor(found.astype(np.int64) if pointer.memory.dtype == np.int32 else found)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    used, chosen = pointer.places(mask)
    assert raw(value).dtype == pointer.memory.dtype, f"{raw(value).dtype} into an array of {pointer.memory.dtype}"
    chosen = np.broadcast_to(chosen, np.broadcast_shapes(np.shape(used), raw(value).shape))
    pointer.memory[np.broadcast_to(used, chosen.shape)[chosen]] = np.broadcast_to(raw(value), chosen.shape)[chosen]


def _elementwise(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(*operands: Any) -> Tensor:
        given = [np.float32(raw(each)) if isinstance(raw(each), float) else raw(each) for each in operands]
        with np.errstate(all="ignore"):
            return Tensor(function(*given))

    return apply


def _full(shape: Sequence[Any], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    return Tensor(np.full([int(raw(n)) for n in shape], raw(value), dtype))


def _layout(*_: Any, **__: Any) -> None:
    return None


def _assembly(text: str, constraints: str, operands: Sequence[Any], **_: Any) -> Tensor:
    """What kernels say in the machine's own words: an unknown zero, and a division."""
    if text.startswith("mov.u32 $0, 0"):
        return Tensor(np.int64(0))
    assert text.startswith("div.approx"), f"not simulated: {text}"
    return Tensor(raw(operands[0]) / raw(operands[1]))


FUNCTIONS: dict[str, Any] = {
    "load": _load,
    "store": _store,
    "where": _elementwise(np.where),
    "minimum": _elementwise(np.minimum),
    "maximum": _elementwise(np.maximum),
    "abs": _elementwise(np.abs),
    "exp2": _elementwise(np.exp2),
    "log2": _elementwise(np.log2),
    "max": lambda value, axis: Tensor(raw(value).max(axis)),
    "sum": lambda value, axis: Tensor(raw(value).sum(axis)),
    "cdiv": lambda a, b: Tensor(-(-np.asarray(raw(a)) // np.asarray(raw(b)))),
    "arange": lambda start, end, layout=None: Tensor(np.arange(raw(start), raw(end))),
    "full": _full,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
    "to_tensor": lambda value: Tensor(value),
    "convert_layout": lambda value, layout: value,
    "static_range": lambda *ends: range(*(int(raw(end)) for end in ends)),
    "inline_asm_elementwise": _assembly,
    "int32": np.int32,
    "int64": np.int64,
    "float32": np.float32,
    "constexpr": object,
    "SliceLayout": _layout,
    "DotOperandLayout": _layout,
    "NVMMADistributedLayout": _layout,
}
