"""Operators of torch with their fake kernels and gradients: torch.ops.headrace.<name> and its <name>_backward.

An attention's backward pass is an operator too: torch.compile sees one node, and its own gradient is refused by name.
What has no gradient there (no sinks, quantized keys) comes back from it as an empty tensor: operators return no None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.ops import torch_operands as operands
from headrace.ops.torch_operands import CHOICE_NAMES, FLOATS, Signature

Gradients = Mapping[str, Tensor | None]


def new_operator(
    name: str, compute: Callable[..., Any], schema: str, fake: Callable[..., Any], *, mutates: Sequence[str] = ()
) -> Any:
    """Makes torch.ops.headrace.<name>, which vmap does not map."""
    made = torch.library.custom_op(f"headrace::{name}", compute, mutates_args=mutates, schema=schema)
    made.register_fake(fake)
    made.register_vmap(_refuse_vmap)
    return made


def new_attention(
    name: str,
    signature: Signature,
    *,
    attend: Callable[..., tuple[Tensor, Tensor]],
    fake: Callable[..., tuple[Tensor, Tensor]],
    gradients: Callable[[dict[str, Any]], Gradients],
) -> None:
    """Makes an attention's operator and that of its backward pass. `gradients`: of the arguments by name."""

    def backward(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        given = signature.backward.named(tensors)
        found = gradients({**given, **options, "d_out": packed(given["d_out"]), "d_lse": packed(given["d_lse"])})
        return tuple(_or_nothing(found[name], given["lse"]) for name in signature.differentiable)

    def fake_backward(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        given = signature.backward.named(tensors)
        return tuple(_or_nothing(_empty_gradient(given[name]), given["lse"]) for name in signature.differentiable)

    def propagate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _propagate(ctx, signature, second, (d_out, d_lse))

    second = new_operator(
        f"{name}_backward", backward, signature.backward.schema(len(signature.differentiable)), fake_backward
    )
    second.register_autograd(_refuse_second)
    first = new_operator(name, attend, signature.schema(2), fake)
    first.register_autograd(propagate, setup_context=_keep)


def packed(array: Tensor | None) -> Tensor | None:
    """The array with its last dimension contiguous: gradients of sums are one number, seen everywhere."""
    return array if array is None or array.stride(-1) == 1 else array.contiguous()


def _or_nothing(gradient: Tensor | None, lse: Tensor) -> Tensor:
    return lse.new_empty(0) if gradient is None else gradient.contiguous()


def _empty_gradient(array: Tensor | None) -> Tensor | None:
    return array.new_empty(array.shape) if array is not None and array.dtype in FLOATS else None


def _keep(ctx: Any, inputs: Any, keyword_only_inputs: Mapping[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = {name: option for name, option in keyword_only_inputs.items() if name not in CHOICE_NAMES}
    ctx.set_materialize_grads(False)


def _propagate(
    ctx: Any, signature: Signature, operator: Any, gradients: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradient of each tensor, by those of out and lse."""
    names = [name for name, wanted in zip(signature.tensors, ctx.needs_input_grad, strict=True) if wanted]
    operands.refuse_needed(names)
    *inputs, out, lse = ctx.saved_tensors
    given, (d_out, d_lse) = signature.named(inputs), gradients
    for name in names:
        if given[name].dtype not in FLOATS:
            raise NotImplementedError(f"{name}: expected floats where it requires a gradient, got {given[name].dtype}")
    d_out = torch.zeros_like(out) if d_out is None else d_out
    others = [given[name] for name in signature.optional]
    found = operator(d_out, out, lse, *inputs[: len(signature.required)], d_lse, *others, **ctx.options)
    by_name = dict(zip(signature.differentiable, found, strict=True))
    return tuple(by_name[name] if name in names else None for name in signature.tensors)


def _refuse_second(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "double backward: the gradient of attention has no gradient of its own; "
        "torch.nn.functional.scaled_dot_product_attention has one with SDPBackend.MATH"
    )


def _refuse_vmap(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> None:
    raise NotImplementedError(
        "vmap: headrace's operators are not mapped; they have a batch dimension, [batch, tokens, heads, head_dim], "
        "and take ragged batches"
    )
