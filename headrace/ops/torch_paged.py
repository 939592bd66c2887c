"""Attention over a paged KV cache as an operator of torch, with gradients of the queries and of the pages.

The backward pass gathers the pages of each request into ragged keys and values and goes on as for those
(torch_gather.py, torch_attention.py): for those who compute log-probabilities over a cache once more
and learn from them. It takes memory for a copy of the keys in use, and for gradients as large as the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.ops import attention_paged, torch_operands
from headrace.ops.attention_options import AttentionResult
from headrace.ops.attention_request import Call, outputs
from headrace.ops.cascade import launch_shared
from headrace.ops.torch_attention import check_heads, empty_result, gradients_of
from headrace.ops.torch_autograd import Gradients, new_attention
from headrace.ops.torch_gather import gathered
from headrace.ops.torch_operands import CHOICE, Signature

PAGED_CHOICE = f"{CHOICE}, str cascade"
_CASCADES: dict[str, bool | str] = {"True": True, "False": False}
_LISTED = ("indices", "page_indices")
PAGED = Signature(
    ("query", "key_pages", "value_pages", "page_table", "sequence_lens", "query_starts"),
    ("sinks", "alibi_slopes", "mask", "key_scales", "value_scales", *_LISTED),
    ("query", "key_pages", "value_pages", "sinks"),
    choice=PAGED_CHOICE,
)


def paged_attention(
    given: Mapping[str, Any],
    *,
    out: Any,
    out_dtype: str | None,
    cascade: bool | str,
    kernel: str | None,
    require: Sequence[str],
) -> AttentionResult:
    """`headrace.ops.paged_attention` of tensors that torch must see; `given`: its arrays and other options."""
    refuse_listed(PAGED, given)
    choice = {"out_dtype": out_dtype, "cascade": str(cascade), "kernel_name": kernel}
    choice["require"] = torch_operands.joined_names(require)
    return torch_operands.call(torch.ops.headrace.paged_attention.default, PAGED, given, out=out, **choice)


def refuse_listed(signature: Signature, given: Mapping[str, Any]) -> None:
    """NotImplementedError for gradients through keys chosen by indices."""
    listed = [name for name in _LISTED if given[name] is not None]
    if listed and torch.is_grad_enabled() and any(getattr(given[n], "requires_grad", False) for n in signature.tensors):
        raise NotImplementedError(f"{listed[0]}: attention over chosen keys has no gradient; give a mask instead")


def _attend(*tensors: Any, out_dtype: str | None, **options: Any) -> tuple[Tensor, Tensor]:
    call = attention_paged.prepared(**PAGED.named(tensors), **torch_operands.unpacked(options))
    return launched(call, options, out_dtype)


def launched(call: Call, options: Mapping[str, Any], out_dtype: str | None) -> tuple[Tensor, Tensor]:
    """The results of a prepared call; sparse calls have tables of their own, where nothing is shared."""
    cascade = _CASCADES.get(options["cascade"], options["cascade"])
    names = torch_operands.split_names(options["require"])
    place = outputs(call, None, out_dtype)
    result = launch_shared(call, place, cascade=cascade, kernel=options["kernel_name"], require=names)
    return result.out, result.lse


def _fake(*tensors: Any, out_dtype: str | None, **options: Any) -> tuple[Tensor, Tensor]:
    given = PAGED.named(tensors)
    query, key, value = (given[name] for name in PAGED.required[:3])
    ranks = (query.dim(), key.dim(), value.dim())
    torch._check(ranks == (3, 4, 4), lambda: f"query, key_pages, value_pages: expected 3, 4, 4 dimensions, got {ranks}")
    check_heads(query, key, value, "_pages")
    check_tables(given)
    return empty_result(query, value, out_dtype)


def check_tables(given: Mapping[str, Any]) -> None:
    """What shapes tell of the requests."""
    table, lens, starts = (given[name] for name in ("page_table", "sequence_lens", "query_starts"))
    torch._check(table.dim() == 2, lambda: "page_table: expected [requests, max_pages]")
    torch._check(lens.shape[0] == table.shape[0], lambda: "sequence_lens: expected [requests] as of page_table")
    torch._check(starts.shape[0] == table.shape[0] + 1, lambda: "query_starts: expected [requests + 1]")


def _gradients(given: dict[str, Any]) -> Gradients:
    keys = gathered(given["page_table"], given["sequence_lens"], given["key_pages"])
    ragged = {name: given[name] for name in given if name not in (*PAGED.required[1:5], *_LISTED)}
    for name in ("key", "value"):
        scales = given[f"{name}_scales"]
        ragged[name] = keys.rows(given[f"{name}_pages"])
        ragged[f"{name}_scales"] = None if scales is None else keys.rows(scales)
    found = gradients_of(ragged | {"key_starts": keys.key_starts, "key_lens": keys.key_lens})
    pages = {f"{name}_pages": found[name] for name in ("key", "value")}
    return {
        "query": found["query"],
        **{name: None if rows is None else keys.into_pages(rows, given[name]) for name, rows in pages.items()},
        "sinks": found["sinks"],
    }


new_attention("paged_attention", PAGED, attend=_attend, fake=_fake, gradients=_gradients)
