"""The arguments of attention as torch's operators take them.

    tensors    positional, in the order of a `Signature`: those that must be given, then those that may be None
    options    by name, of plain types: a window as two numbers, a list of names as one text

Where torch does not compile, options are checked before they go in, so that mistakes are ArgumentErrors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from headrace.errors import ArgumentError
from headrace.ops.attention_options import AttentionResult, checked_options

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPTIONS = (
    "bool causal, str align, SymInt? window_left, SymInt? window_right, float? softcap, float? scale, "
    "str precision, bool deterministic"
)
# What a backward pass does not need. NOTE: torch's compiler hands an operator's options to functions of its own, one of
# which has an argument `kernel`: an option of that name would not compile.
CHOICE = "str? out_dtype, str? kernel_name, str require"
CHOICE_NAMES = ("out_dtype", "kernel_name", "require", "cascade")
_PLAIN_OPTIONS = ("causal", "align", "softcap", "scale", "precision", "deterministic")
_WITHOUT_GRADIENT = ("mask", "alibi_slopes", "key_scales", "value_scales", "latent_scales")


@dataclass(frozen=True)
class Signature:
    """The arguments of an attention's operator, and which of its tensors have gradients."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    differentiable: tuple[str, ...]
    options: str = OPTIONS
    choice: str = CHOICE

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    @property
    def backward(self) -> Signature:
        """The arguments of the operator that computes the gradients of `differentiable`, in that order."""
        return Signature(("d_out", "out", "lse", *self.required), ("d_lse", *self.optional), (), self.options, "")

    def schema(self, returns: int) -> str:
        tensors = [f"Tensor {name}" for name in self.required] + [f"Tensor? {name}" for name in self.optional]
        options = ", ".join(filter(None, [self.options, self.choice]))
        return f"({', '.join(tensors)}, *, {options}) -> ({', '.join(['Tensor'] * returns)})"

    def named(self, tensors: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.tensors, tensors, strict=True))


def call(operator: Any, signature: Signature, given: Mapping[str, Any], *, out: Any, **rest: Any) -> AttentionResult:
    """The operator with the arguments of an op: its arrays and options, and the `rest` of its own."""
    refuse_gradients(signature.tensors, given, out)
    given = _cast(given)
    tensors = [tensor_of(name, given[name]) for name in signature.tensors]
    result = AttentionResult(*operator(*tensors, **_options(given), **rest))
    if out is None:
        return result
    out.copy_(result.out)
    return AttentionResult(out, result.lse)


def tensor_of(name: str, array: Any) -> Tensor | None:
    """The array as a tensor, without a copy."""
    if array is None or isinstance(array, Tensor):
        return array
    try:
        return torch.as_tensor(array)
    except (RuntimeError, TypeError) as error:
        got = type(array).__name__
        raise ArgumentError(f"{name}: expected a tensor, as query is one that torch must see, got {got}") from error


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: given[name] for name in (*_PLAIN_OPTIONS, "window")}
    if not torch.compiler.is_compiling():
        checked = vars(checked_options(1, **options))
        options = {name: None if option is None else checked[name] for name, option in options.items()}
    left, right = options.pop("window")
    return options | {"window_left": left, "window_right": right}


def unpacked(options: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's options as the op takes them."""
    found = {name: options[name] for name in _PLAIN_OPTIONS}
    return found | {"window": (options["window_left"], options["window_right"])}


def joined_names(require: Sequence[str]) -> str:
    return require if isinstance(require, str) else ",".join(require)


def split_names(require: str) -> tuple[str, ...]:
    return tuple(require.split(",")) if require else ()


# Autocast


def _cast(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Under autocast what torch's own attention does: query, key and value in its type, unless float64 or quantized.

    Pages stay as they are: a copy of a cache would cost more than it saves.
    """
    first = given["query"]
    kind = first.device.type if isinstance(first, Tensor) else "cpu"
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)
    return {**given, **{name: _narrowed(given[name], dtype) for name in ("query", "key", "value") if name in given}}


def _narrowed(array: Any, dtype: torch.dtype) -> Any:
    return array.to(dtype) if isinstance(array, Tensor) and array.dtype in FLOATS[:3] else array


# Gradients that would be lost


def refuse_gradients(names: Sequence[str], given: Mapping[str, Any], out: Any = None) -> None:
    """NotImplementedError for a gradient that nobody computes."""
    refuse_tangents(names, given)
    if not torch.is_grad_enabled():
        return
    tracked = [name for name in names if getattr(given[name], "requires_grad", False)]
    refuse_needed(tracked)
    if tracked and out is not None:
        raise NotImplementedError(f"out: cannot be given where {tracked[0]} requires a gradient; leave it out")
    if tracked and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        text = f"torch.func: headrace's operators do not pass on the gradient of {tracked[0]}"
        raise NotImplementedError(f"{text}; use torch.autograd.grad")


def refuse_tangents(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """NotImplementedError where forward-mode differentiation would lose a tangent."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name in names:
        if isinstance(given[name], Tensor) and forward_ad.unpack_dual(given[name]).tangent is not None:
            text = f"forward mode: headrace's operators do not pass on the tangent of {name}"
            raise NotImplementedError(f"{text}; use torch.autograd.grad")


def refuse_needed(names: Sequence[str]) -> None:
    """NotImplementedError where one of the tensors whose gradients are needed has none."""
    for name in names:
        if name in _WITHOUT_GRADIENT:
            raise NotImplementedError(
                f"{name}: attention has no gradient for it; detach it, or if it is learned use "
                "torch.nn.functional.scaled_dot_product_attention"
            )
