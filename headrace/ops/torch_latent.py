"""Latent attention over its paged cache as an operator of torch, with gradients of the queries and of the latents.

The backward pass gathers the latents of each request and is that of attention with one KV head, whose values are the
beginning of its keys: a cached row gets the gradients of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.ops import attention_latent, torch_operands
from headrace.ops.attention_options import AttentionResult
from headrace.ops.torch_attention import decoded, empty_result, gradients_of
from headrace.ops.torch_autograd import Gradients, new_attention
from headrace.ops.torch_gather import gathered
from headrace.ops.torch_operands import FLOATS, OPTIONS, Signature
from headrace.ops.torch_paged import PAGED_CHOICE, check_tables, launched, refuse_listed

LATENT = Signature(
    ("query", "latent_pages", "page_table", "sequence_lens", "query_starts"),
    ("sinks", "alibi_slopes", "mask", "latent_scales", "indices", "page_indices"),
    ("query", "latent_pages", "sinks"),
    options=f"{OPTIONS}, SymInt value_dim",
    choice=PAGED_CHOICE,
)


def mla_attention(
    given: Mapping[str, Any],
    *,
    value_dim: int,
    query_rope: Any,
    out: Any,
    out_dtype: str | None,
    cascade: bool | str,
    kernel: str | None,
    require: Sequence[str],
) -> AttentionResult:
    """`headrace.ops.mla_attention` of tensors that torch must see; `given`: its arrays and other options."""
    refuse_listed(LATENT, given)
    given = {**given, "query": _joined(given["query"], query_rope)}
    choice = {"out_dtype": out_dtype, "cascade": str(cascade), "kernel_name": kernel, "value_dim": value_dim}
    choice["require"] = torch_operands.joined_names(require)
    return torch_operands.call(torch.ops.headrace.mla_attention.default, LATENT, given, out=out, **choice)


def _joined(query: Tensor, query_rope: Any) -> Any:
    # Sizes that are symbols must not be made numbers.
    if query_rope is not None and torch.compiler.is_compiling():
        return torch.cat([query, query_rope], dim=-1)
    return attention_latent.joined(query, query_rope)


def _attend(*tensors: Any, out_dtype: str | None, value_dim: int, **options: Any) -> tuple[Tensor, Tensor]:
    named = LATENT.named(tensors)
    call = attention_latent.prepared(**named, value_dim=value_dim, **torch_operands.unpacked(options))
    return launched(call, options, out_dtype)


def _fake(*tensors: Any, out_dtype: str | None, value_dim: int, **options: Any) -> tuple[Tensor, Tensor]:
    given = LATENT.named(tensors)
    query, pages = given["query"], given["latent_pages"]
    dim = pages.shape[-1] * (2 if pages.dtype == torch.uint8 else 1)
    ranks = (query.dim(), pages.dim())
    torch._check(ranks == (3, 3), lambda: f"query, latent_pages: expected 3 dimensions each, got {ranks}")
    torch._check(query.shape[-1] == dim, lambda: f"query: expected latent_pages' {dim} numbers, got {query.shape[-1]}")
    check_tables(given)
    return empty_result(query, pages, out_dtype, value_dim)


def _gradients(given: dict[str, Any]) -> Gradients:
    pages, scales, value_dim = given["latent_pages"], given["latent_scales"], given["value_dim"]
    keys = gathered(given["page_table"], given["sequence_lens"], pages)
    rows = keys.rows(pages)[:, None]
    per_key = None if scales is None else keys.rows(scales)[:, None]
    apart = ("latent_pages", "latent_scales", "page_table", "sequence_lens", "value_dim", "indices", "page_indices")
    ragged = {name: given[name] for name in given if name not in apart}
    ragged |= {"key": decoded(rows, per_key), "key_starts": keys.key_starts, "key_lens": keys.key_lens}
    ragged |= {"value": ragged["key"][..., :value_dim], "key_scales": None, "value_scales": None}
    found = gradients_of(ragged)
    if pages.dtype not in FLOATS:
        return {**found, "latent_pages": None}
    sums: Any = found["key"]
    sums = sums.to(torch.promote_types(pages.dtype, torch.float32))
    sums[..., :value_dim] += found["value"]
    return {**found, "latent_pages": keys.into_pages(sums[:, 0], pages)}


new_attention("mla_attention", LATENT, attend=_attend, fake=_fake, gradients=_gradients)
