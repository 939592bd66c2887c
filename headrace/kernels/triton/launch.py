"""What every Triton kernel starts from: where it runs, and products that mean the same everywhere.

A kernel runs on the GPU that holds its arrays. With TRITON_INTERPRET=1 in the environment when it is first imported it
runs in Triton's interpreter instead, element by element in NumPy, on arrays of the CPU: that is how its arithmetic is
tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import cache, interpreter

from headrace.gpu_machine import arch_of_gpu
from headrace.kernels.chips import chip_like
from headrace.kernels.triton import compiler_key

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


def _indexed(patch: Callable[..., None]) -> Callable[..., None]:
    """Scalars of the interpreter as bounds of loops: they are arrays of one element, which NumPy 2.4 takes no more."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


# What a function that names all of Triton's language looks like to the interpreter.
_LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def _once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """The language is made the interpreter's once for a launch, and not again for each function that is called."""
    active: list[Any] = []

    def patched(_: Any) -> Any:
        if not active:
            scope = patch(_LANGUAGE)
            restore = scope.restore

            def undo() -> None:
                active.clear()
                restore()

            scope.restore = undo
            active.append(scope)
        return active[0]

    return patched


def _add_to_described(builder: Any, kind: Any, described: Any, values: Any, indices: Any) -> None:
    """What a tensor descriptor's atomic_add does, which the interpreter lacks."""
    places, there = described.materialize_pointers(indices)
    there = interpreter.TensorHandle(there, tl.int1)
    ir = triton._C.libtriton.ir
    builder.create_atomic_rmw(ir.ATOMIC_OP.FADD, places, values, there, ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU)


if INTERPRETED:
    interpreter.InterpreterBuilder.create_descriptor_reduce = _add_to_described
    interpreter._patch_lang_tensor = _indexed(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once(interpreter._patch_lang)
else:
    compiler_key.remember(cache)


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """acc + a b, summed in float32. precision, of float32 operands: "ieee", "tf32x3" (of their accuracy) or "tf32".

    NOTE: the interpreter would multiply the bit patterns of bfloat16.
    """
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=precision)
    return tl.dot(a, b, acc)


def on_device_of(tensor: torch.Tensor) -> Any:
    """The context in which kernels on this tensor are launched: its GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def chip_of(tensor: torch.Tensor, interpreted: str = "sm_90") -> str:
    """The chip whose tiles the tensor's device takes (chips.py); `interpreted` in the interpreter."""
    return chip_like(arch_of_gpu(tensor.get_device())) if tensor.is_cuda else interpreted


def num_multiprocessors(tensor: torch.Tensor) -> int:
    """Of the tensor's GPU; in the interpreter a few, so that work is divided there as well."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 6


def strides_of(array: torch.Tensor | None, *dimensions: int) -> list[int]:
    """In elements; 0 along dimensions of one, which stand for all, and of what is not there."""
    if array is None:
        return [0] * len(dimensions)
    return [0 if array.shape[d] == 1 else array.stride(d) for d in dimensions]


def named_strides(arrays: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """A launch's strides by the words of the kernel: {"key_page key_row": "key"} are the first two of "key"."""
    found: dict[str, int] = {}
    for words, name in names.items():
        split = words.split()
        found |= zip(split, strides_of(arrays.get(name), *range(len(split))), strict=True)
    return found
