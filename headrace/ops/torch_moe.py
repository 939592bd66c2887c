"""Experts and their choice as operators of torch: one node each when compiled, gradients of the choice's weights.

    w_k = c s_k / sum_j s_j  (or c s_k)     s = softmax(l) or sigmoid(l), of the chosen
    d_s = c (d_w - sum_j d_w_j s_j / S) / S     S = sum_j s_j
    d_l = s (d_s - sum_j d_s_j s_j)  of softmax, over all experts     d_l = d_s s (1 - s)  of sigmoid

Which experts are chosen has no gradient, nor has the bias that only chooses. The experts themselves are for inference:
a gradient through them is refused by name. Autocast leaves both as they are: experts of 16 bits take x in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.ops import moe
from headrace.ops.moe import Routing
from headrace.ops.torch_autograd import new_operator
from headrace.ops.torch_operands import joined_names, refuse_tangents, split_names, tensor_of

_REQUIRED = ("x", "gate", "up", "down", "experts", "weights")
_TENSORS = (*_REQUIRED, "gate_scales", "up_scales", "down_scales", "residual")
_ROUTE = (
    "(Tensor logits, Tensor? bias, *, int top_k, str scores, bool normalize, float scale, int num_groups, "
    "int? top_groups, str? kernel_name) -> (Tensor, Tensor)"
)


def route(logits: Any, bias: Any, *, kernel: str | None, **options: Any) -> Routing:
    """`headrace.ops.route` of tensors that torch must see."""
    refuse_tangents(("logits", "bias"), {"logits": logits, "bias": bias})
    operator = torch.ops.headrace.route.default
    weights, experts = operator(logits, tensor_of("bias", bias), **options, kernel_name=kernel)
    return Routing(experts, weights)


def _route(logits: Tensor, bias: Tensor | None, *, kernel_name: str | None, **options: Any) -> tuple[Tensor, Tensor]:
    found = moe.routed(logits, bias=bias, kernel=kernel_name, **options)
    return found.weights, found.experts


def _fake_route(logits: Tensor, bias: Tensor | None, *, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
    torch._check(logits.dim() == 2, lambda: "logits: expected [tokens, experts]")
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _keep(ctx: Any, inputs: Any, keyword_only_inputs: Mapping[str, Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_weights: Tensor, _: Any) -> tuple[Tensor, None]:
    logits, experts = ctx.saved_tensors
    index, wide = experts.long(), logits.float()
    softmax = ctx.options["scores"] == "softmax"
    scores = wide.softmax(-1) if softmax else wide.sigmoid()
    chosen, d_chosen = scores.gather(1, index), ctx.options["scale"] * d_weights
    if ctx.options["normalize"]:
        total = chosen.sum(1, keepdim=True)
        total = torch.where(total > 0, total, 1)
        d_chosen = (d_chosen - (d_chosen * chosen).sum(1, keepdim=True) / total) / total
    d_scores = torch.zeros_like(scores).scatter(1, index, d_chosen)
    if softmax:
        d_logits = scores * (d_scores - (d_chosen * chosen).sum(1, keepdim=True))
    else:
        d_logits = d_scores * scores * (1 - scores)
    return d_logits.to(logits.dtype), None


new_operator("route", _route, _ROUTE, _fake_route).register_autograd(_gradients, setup_context=_keep)


# Experts


def mixture_of_experts(
    given: Mapping[str, Any], *, out: Any, kernel: str | None, require: Sequence[str], **options: Any
) -> Any:
    """`headrace.ops.mixture_of_experts` of tensors that torch must see; `given`: its arrays."""
    _refuse_gradients(given)
    if out is not None:
        options["out_dtype"] = str(out.dtype).removeprefix("torch.")
    tensors = [tensor_of(name, given.get(name)) for name in _TENSORS]
    operator = torch.ops.headrace.mixture_of_experts.default
    found = operator(*tensors, **options, kernel_name=kernel, require=joined_names(require))
    return found if out is None else out.copy_(found)


def _refuse_gradients(given: Mapping[str, Any]) -> None:
    refuse_tangents(list(given), given)
    if not torch.is_grad_enabled():
        return
    for name, array in given.items():
        if getattr(array, "requires_grad", False):
            told = f"routing.{name}" if name in ("experts", "weights") else name
            text = f"{told}: mixture_of_experts has no gradient; detach it, or train with torch's own products"
            raise NotImplementedError(text)


def _schema() -> str:
    tensors = [f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in _TENSORS]
    options = "str activation, str precision, bool deterministic, str? out_dtype, str? kernel_name, str require"
    return f"({', '.join(tensors)}, *, {options}) -> Tensor"


def _mixed(*tensors: Any, kernel_name: str | None, require: str, **options: Any) -> Tensor:
    given = {name: tensor for name, tensor in zip(_TENSORS, tensors, strict=True) if tensor is not None}
    found: Tensor = moe.mixed(given, kernel=kernel_name, require=split_names(require), **options)
    return found


def _fake_mixed(*tensors: Any, out_dtype: str | None, **options: Any) -> Tensor:
    given = dict(zip(_TENSORS, tensors, strict=True))
    x, gate, up, down = (given[name] for name in _REQUIRED[:4])
    ranks = (x.dim(), gate.dim(), up.dim(), down.dim())
    torch._check(ranks == (2, 3, 3, 3), lambda: f"x, gate, up, down: expected 2, 3, 3, 3 dimensions, got {ranks}")
    torch._check(gate.shape[2] == x.shape[1], lambda: "gate: expected [experts, ffn_dim, dim] with x's dim")
    torch._check(gate.shape == up.shape, lambda: "up: expected a shape as of gate")
    torch._check(down.shape[1] == x.shape[1], lambda: "down: expected [experts, dim, ffn_dim] with x's dim")
    torch._check(down.shape[2] == gate.shape[1], lambda: "down: expected [experts, dim, ffn_dim] with gate's ffn_dim")
    for name in ("experts", "weights"):
        torch._check(given[name].shape[0] == x.shape[0], lambda: "routing: expected [tokens, top_k] with x's tokens")
    dtype = x.dtype if out_dtype is None else getattr(torch, out_dtype)
    return x.new_empty(x.shape, dtype=dtype)


new_operator("mixture_of_experts", _mixed, _schema(), _fake_mixed)
