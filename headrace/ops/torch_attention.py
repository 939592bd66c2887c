"""Dense and ragged attention as operators of torch, with gradients: headrace::attention and attention_backward.

`headrace.ops.attention` calls them where torch must see what happens (tracked.py). The backward pass computes the
weights again from lse, so that what is kept for it grows with the tokens alone. Quantized keys and values have no
gradient; that of the query is computed from what they stand for, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace import ops
from headrace.ops import attention_dense, torch_operands
from headrace.ops.attention_options import AttentionResult
from headrace.ops.torch_autograd import Gradients, new_attention
from headrace.ops.torch_operands import FLOATS, Signature

ATTENTION = Signature(
    ("query", "key", "value"),
    ("sinks", "alibi_slopes", "mask", "query_starts", "key_starts", "key_lens", "key_scales", "value_scales"),
    ("query", "key", "value", "sinks"),
)


def attention(
    given: Mapping[str, Any], *, out: Any, out_dtype: str | None, kernel: str | None, require: Sequence[str]
) -> AttentionResult:
    """`headrace.ops.attention` of tensors that torch must see; `given`: its arrays and other options."""
    choice = {"out_dtype": out_dtype, "kernel_name": kernel, "require": torch_operands.joined_names(require)}
    return torch_operands.call(torch.ops.headrace.attention.default, ATTENTION, given, out=out, **choice)


def _attend(
    *tensors: Any, out_dtype: str | None, kernel_name: str | None, require: str, **options: Any
) -> tuple[Tensor, Tensor]:
    call = attention_dense.prepared(**ATTENTION.named(tensors), **torch_operands.unpacked(options))
    names = torch_operands.split_names(require)
    result = attention_dense.run(call, None, out_dtype, kernel=kernel_name, require=names)
    return result.out, result.lse


def _fake(*tensors: Any, out_dtype: str | None, **options: Any) -> tuple[Tensor, Tensor]:
    given = ATTENTION.named(tensors)
    query, key, value = (given[name] for name in ATTENTION.required)
    ranks, dense = (query.dim(), key.dim(), value.dim()), query.dim() == 4
    torch._check(ranks in ((3, 3, 3), (4, 4, 4)), lambda: f"query, key, value: expected 3 or 4 dimensions, got {ranks}")
    torch._check(not dense or key.shape[0] == query.shape[0], lambda: "key: expected a batch as of query")
    torch._check(dense or given["query_starts"] is not None, lambda: "query_starts: ragged arrays need them, got None")
    check_heads(query, key, value)
    return empty_result(query, value, out_dtype)


def check_heads(query: Tensor, key: Tensor, value: Tensor, pages: str = "") -> None:
    """What shapes tell alone, which may be symbols."""
    torch._check(_dim(key) == query.shape[-1], lambda: f"key{pages}: expected the query's head_dim {query.shape[-1]}")
    torch._check(query.shape[-2] % key.shape[-2] == 0, lambda: f"query: expected a multiple of {key.shape[-2]} heads")
    for own, wanted in zip(value.shape[:-1], key.shape[:-1], strict=True):
        torch._check(own == wanted, lambda: f"value{pages}: expected the tokens and heads of key{pages}")


def _dim(array: Tensor) -> Any:
    """Numbers in a row; a byte of int4 holds two."""
    return array.shape[-1] * (2 if array.dtype == torch.uint8 else 1)


def empty_result(query: Tensor, value: Tensor, out_dtype: str | None, value_dim: Any = None) -> tuple[Tensor, Tensor]:
    """out and lse as the kernels make them."""
    dtype = query.dtype if out_dtype is None else getattr(torch, out_dtype)
    out = query.new_empty((*query.shape[:-1], _dim(value) if value_dim is None else value_dim), dtype=dtype)
    exact = query.dtype == torch.float64
    return out, query.new_empty(query.shape[:-1], dtype=torch.float64 if exact else torch.float32)


def gradients_of(given: dict[str, Any]) -> Gradients:
    """Those of query, key, value and sinks; None of what is quantized, or not given."""
    names = [name for name in given if name not in ("window_left", "window_right")]
    arrays = {name: given[name] for name in names} | {"window": (given["window_left"], given["window_right"])}
    scales = [arrays.pop(name) for name in ("key_scales", "value_scales")]
    quantized = given["key"].dtype not in FLOATS
    for name, each in zip(("key", "value"), scales, strict=True):
        arrays[name] = decoded(given[name], each)
    found = ops.attention_backward(**arrays)
    pair = {"key": None, "value": None} if quantized else {"key": found.key, "value": found.value}
    return {"query": found.query, **pair, "sinks": found.sinks}


def decoded(codes: Tensor, scales: Tensor | None) -> Tensor:
    """Quantized keys or values as float32; floats as they are."""
    if codes.dtype in FLOATS:
        return codes
    if codes.dtype == torch.uint8:
        halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        codes = (halves.to(torch.int8) ^ 8) - 8
    numbers = codes.to(torch.float32)
    return numbers if scales is None else numbers * scales[..., None]


new_attention("attention", ATTENTION, attend=_attend, fake=_fake, gradients=gradients_of)
