"""Top-k sparse attention of tensors on a GPU: the tables of sparse.py, made there and without waiting for it.

The steps in torch's operations, whose sizes follow from shapes alone. What sparse.py calls a mistake (a key or page
outside the sequence or the table) counts as not listed. The page in which the visible keys end counts once, however
often it is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.ops.attention_options import AttentionOptions
from headrace.ops.sparse import flattened


@dataclass(frozen=True)
class Tokens:
    """Whose each token is, int64 [tokens]: its request, and the first and the last key it sees (none: last < first)."""

    request: Tensor
    first: Tensor
    last: Tensor


def tables(
    given: Mapping[str, Any], options: AttentionOptions, tokens: int, *, name: str, listed: Tensor
) -> dict[str, Any]:
    """The arrays of a paged call with a request for each token, in place of those given."""
    own, page_size = _tokens(given, options, tokens), given["key"].shape[1]
    wide = listed.long()
    if name == "page_indices" and options.left is None:
        found = _by_page(given, own, wide)
    elif name == "page_indices":
        keys = wide[:, :, None] * page_size + torch.arange(page_size, device=wide.device)
        found = _by_token(given, own, torch.where(wide[:, :, None] < 0, -1, keys).flatten(1))
    else:
        found = _by_token(given, own, wide)
    starts = torch.arange(tokens + 1, dtype=torch.int32, device=wide.device)
    return {**found, "query_starts": starts}


def _tokens(given: Mapping[str, Any], options: AttentionOptions, tokens: int) -> Tokens:
    starts, lens = given["query_starts"].long(), given["key_lens"].long()
    token = torch.arange(tokens, device=starts.device)
    request = torch.searchsorted(starts[1:].contiguous(), token, right=True).clamp(max=max(len(lens) - 1, 0))
    own = token - starts[request]
    if options.align == "bottom_right":
        own = own + (lens - starts.diff())[request]
    last = lens[request] - 1 if options.right is None else torch.minimum(own + options.right, lens[request] - 1)
    first = torch.zeros_like(own) if options.left is None else (own - options.left).clamp(min=0)
    return Tokens(request, first, last)


def _by_token(given: Mapping[str, Any], own: Tokens, listed: Tensor) -> dict[str, Any]:
    """Keys one by one, in pages seen as pages of one key."""
    page_size = given["key"].shape[1]
    key, stride = flattened(given["key"], "key_pages")
    value, value_stride = flattened(given["value"], "value_pages")
    assert stride == value_stride  # checked where the call is made
    seen = (listed >= own.first[:, None]) & (listed <= own.last[:, None]) & (listed >= 0)
    pages, seen = _pages_of(given, own, torch.where(seen, listed // page_size, -1))
    table = _gathered(pages * stride + listed % page_size, torch.where(seen, 0, 1))
    found = {"key": key, "value": value, "page_table": table, "key_lens": seen.sum(dim=1, dtype=torch.int32)}
    for name in ("key_scales", "value_scales"):
        if given.get(name) is not None:
            found[name] = _flat_scales(given[name], page_size, stride)
    return found


def _by_page(given: Mapping[str, Any], own: Tokens, listed: Tensor) -> dict[str, Any]:
    """Whole pages, of which only the last one of a token's table is seen in part."""
    page_size = given["key"].shape[1]
    counts = (own.last[:, None] + 1 - listed * page_size).clamp(0, page_size)
    partial = (counts > 0) & (counts < page_size) & (listed >= 0)
    again = partial & (partial.cumsum(dim=1) > 1)
    pages, used = _pages_of(given, own, torch.where((counts > 0) & ~again, listed, -1))
    rank = torch.where(used, partial.long(), 2)
    lens = torch.where(used, counts, 0).sum(dim=1, dtype=torch.int32)
    return {"page_table": _gathered(pages, rank), "key_lens": lens}


def _pages_of(given: Mapping[str, Any], own: Tokens, places: Tensor) -> tuple[Tensor, Tensor]:
    """The page at each place (-1: none) of each token's own row of the page table, and whether there is one."""
    table, num_pages = given["page_table"], given["key"].shape[0]
    used = (places >= 0) & (places < table.shape[1])
    pages = table[own.request[:, None], torch.where(used, places, 0)].long()
    used = used & (pages >= 0) & (pages < num_pages)
    return torch.where(used, pages, 0), used


def _gathered(pages: Tensor, rank: Tensor) -> Tensor:
    """The pages of each row in the order of their rank, equal ones in their own; int32."""
    return torch.take_along_dim(pages, torch.argsort(rank, dim=1, stable=True), dim=1).int()


def _flat_scales(scales: Tensor, page_size: int, stride: int) -> Tensor:
    """Scales for pages of one key, `stride` of them from one page to the next."""
    pages, _, kv_heads = scales.shape
    flat = scales.new_zeros((pages, stride, kv_heads))
    flat[:, :page_size] = scales
    return flat.reshape(pages * stride, 1, kv_heads)[: max(pages - 1, 0) * stride + page_size]
