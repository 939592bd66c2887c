"""The merge of partial attentions as an operator of torch, with gradients of all parts and of the sinks.

w_p = exp(lse_p - total), total = log(exp(lse) + exp(sink))     out = sum_p w_p out_p     lse = log sum_p exp(lse_p)

d_out_p = w_p d_out        d_lse_p = w_p (out_p - out) . d_out + exp(lse_p - lse) d_lse
d_sink  = - sum over rows of exp(sink - total) out . d_out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.ops import attention_merge, torch_operands
from headrace.ops.attention_options import AttentionResult
from headrace.ops.torch_autograd import new_operator

SCHEMA = "(Tensor[] outs, Tensor[] lses, Tensor? sinks, *, str? out_dtype, str? kernel_name) -> (Tensor, Tensor)"


def merge_attention(
    outs: Sequence[Any], lses: Sequence[Any], sinks: Any, *, out: Any, out_dtype: str | None, kernel: str | None
) -> AttentionResult:
    """`headrace.ops.merge_attention` of tensors that torch must see."""
    named = {
        f"parts[{i}].{name}": part for name, parts in (("out", outs), ("lse", lses)) for i, part in enumerate(parts)
    }
    torch_operands.refuse_gradients((*named, "sinks"), {**named, "sinks": sinks}, out)
    tensors = [torch_operands.tensor_of(name, part) for name, part in named.items()]
    if out is not None and out_dtype is None:
        out_dtype = str(out.out.dtype).removeprefix("torch.")
    merged = AttentionResult(
        *torch.ops.headrace.merge_attention.default(
            tensors[: len(outs)],
            tensors[len(outs) :],
            torch_operands.tensor_of("sinks", sinks),
            out_dtype=out_dtype,
            kernel_name=kernel,
        )
    )
    if out is None:
        return merged
    out.out.copy_(merged.out)
    out.lse.copy_(merged.lse)
    return out


def _merge(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    sinks: Tensor | None,
    *,
    out_dtype: str | None,
    kernel_name: str | None,
) -> tuple[Tensor, Tensor]:
    merged = attention_merge.merge(outs, lses, sinks=sinks, out_dtype=out_dtype, kernel=kernel_name)
    return merged.out, merged.lse


def _fake(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    sinks: Tensor | None,
    *,
    out_dtype: str | None,
    kernel_name: str | None,
) -> tuple[Tensor, Tensor]:
    for out, lse in zip(outs, lses, strict=True):
        torch._check(out.shape == outs[0].shape, lambda: "parts: expected outs of one shape")
        torch._check(out.shape[:-1] == lse.shape, lambda: "parts: expected lse [..., heads] as of out")
    # The widest, of equal ones the first.
    dtype = max((out.dtype for out in outs), key=lambda each: each.itemsize)
    dtype = dtype if out_dtype is None else getattr(torch, out_dtype)
    out = outs[0].new_empty(outs[0].shape, dtype=dtype)
    return out, out.new_empty(out.shape[:-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def _keep(ctx: Any, inputs: Any, keyword_only_inputs: Mapping[str, Any], output: tuple[Tensor, Tensor]) -> None:
    outs, lses, sinks = inputs
    ctx.save_for_backward(*outs, *lses, sinks, output[1])
    ctx.num_parts = len(outs)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    *parts, sinks, lse = ctx.saved_tensors
    outs, lses = parts[: ctx.num_parts], parts[ctx.num_parts :]
    total = _finite(lse if sinks is None else torch.logaddexp(lse, sinks))
    d_whole = d_out.to(lse.dtype)
    weights = [torch.exp(each - total)[..., None] for each in lses]
    # A part that saw no key may hold anything.
    rows = [torch.where(weight > 0, out, 0).to(lse.dtype) for weight, out in zip(weights, outs, strict=True)]
    whole = sum(weight * row for weight, row in zip(weights, rows, strict=True))
    d_outs = [(weight * d_whole).to(out.dtype) for weight, out in zip(weights, outs, strict=True)]
    d_lses = [
        (weight * (row - whole) * d_whole).sum(-1) + torch.exp(each - _finite(lse)) * d_lse
        for weight, row, each in zip(weights, rows, lses, strict=True)
    ]
    if sinks is None:
        return d_outs, d_lses, None
    d_sinks = -torch.exp(sinks - total) * (whole * d_whole).sum(-1)
    return d_outs, d_lses, d_sinks.flatten(0, -2).sum(0).to(sinks.dtype)


def _finite(lse: Tensor) -> Tensor:
    """Rows without any weight as of weight 1, whose parts then have none of it."""
    return torch.where(lse == -torch.inf, 0, lse)


new_operator("merge_attention", _merge, SCHEMA, _fake).register_autograd(_gradients, setup_context=_keep)
