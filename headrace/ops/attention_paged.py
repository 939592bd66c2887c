"""Attention over a paged KV cache, a ragged batch of prefill, append and decode in one call.

    query [tokens, heads, head_dim], key_pages [pages, page_size, kv_heads, head_dim], value_pages [.., value_dim],
    page_table [requests, max_pages], sequence_lens [requests], query_starts [requests + 1]
        -> out [tokens, heads, value_dim], lse [tokens, heads]

    Request r owns tokens query_starts[r] .. query_starts[r + 1] and keys 0 .. sequence_lens[r], its new ones included;
    key j lies in page page_table[r, j // page_size] at j % page_size. Its i-th token from the end sees the keys up to
    the i-th from the end (causal, aligned at the bottom right), and with a window only `left` before that one:

    out = softmax_j(cap(scale * q k_j) - slope * |own - j| + mask_j) v_j          attention_formula.py has every detail

Query head h reads KV head h // (heads / kv_heads). A token that sees no key gets zeros. Entries of the page table
past a sequence's end, and memory past its last token, may hold anything.

Dao 2022-2024, "FlashAttention" 1-3 and "Flash-Decoding"; Kwon et al. 2023, "PagedAttention".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import dtype_name, shape_of
from headrace.ops import attention_checks as checks
from headrace.ops.attention_dense import rows_of, slopes_of
from headrace.ops.attention_formula import Mix, attend, decoded
from headrace.ops.attention_options import AttentionResult, Window, checked_options
from headrace.ops.attention_request import Call, Extent, kernels, outputs, split_arguments
from headrace.ops.cascade import launch_shared
from headrace.ops.sparse import selected
from headrace.ops.tracked import needs_torch

__all__ = ["gather", "kernels", "paged_attention", "prepared", "reference"]


def paged_attention(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    page_table: Any,
    sequence_lens: Any,
    *,
    query_starts: Any,
    causal: bool = True,
    align: str = "bottom_right",
    window: Window = (None, None),
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    mask: Any = None,
    scale: float | None = None,
    key_scales: Any = None,
    value_scales: Any = None,
    indices: Any = None,
    page_indices: Any = None,
    cascade: bool | str = "auto",
    out_dtype: str | None = None,
    out: Any = None,
    precision: str = "auto",
    deterministic: bool = False,
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> AttentionResult:
    """Each token's mixture of the values it sees, and the log of the sum of its weights.

    query: float32, float16, bfloat16 or float64; pages: those, or float8_e4m3fn, int8 or int4 (uint8, two codes a byte)
    with float32 scales [pages, page_size, kv_heads] or [pages, 1, kv_heads]; pages may be strided. Table, lengths and
    starts: int32, read when the kernel runs. mask: bool (True: seen) or a float added to the scores, [tokens or 1,
    columns] or [heads or 1, tokens or 1, columns]; its last column is each request's last key, keys before its first
    are seen as without it, so that a tree of draft tokens needs a square. sinks: float32 [heads]; alibi_slopes: float32
    [heads] or [requests, heads]. out: in out_dtype, by default the query's type; written in place when given.
    indices: int32 [tokens, k], the keys a token may see, by their place in its sequence, -1 for none; page_indices: the
    same by pages (sparse.py). cascade: whether equal beginnings of the page table are computed once; "auto": where that
    is predicted to pay, never in a program and never with deterministic=True (cascade.py).
    Other options: attention_options.py; kernel and require: select.py.
    Raises ArgumentError for shapes, lengths, starts and pages that do not fit (nothing outside the arrays is read),
    KernelError when no kernel, or not the one asked for, can run.
    """
    given = {
        "query": query,
        "key_pages": key_pages,
        "value_pages": value_pages,
        "page_table": page_table,
        "sequence_lens": sequence_lens,
        "query_starts": query_starts,
        "causal": causal,
        "align": align,
        "window": window,
        "softcap": softcap,
        "scale": scale,
        "precision": precision,
        "deterministic": deterministic,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "mask": mask,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "indices": indices,
        "page_indices": page_indices,
    }
    cascade = cascade if indices is None and page_indices is None else False
    if needs_torch(query, key_pages, value_pages, sinks, mask, alibi_slopes, key_scales, value_scales):
        from headrace.ops import torch_paged

        choice: dict[str, Any] = {"cascade": cascade, "out_dtype": out_dtype, "kernel": kernel, "require": require}
        return torch_paged.paged_attention(given, out=out, **choice)
    call = prepared(**given)
    return launch_shared(call, outputs(call, out, out_dtype), cascade=cascade, kernel=kernel, require=require)


def prepared(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    page_table: Any,
    sequence_lens: Any,
    *,
    indices: Any = None,
    page_indices: Any = None,
    **given: Any,
) -> Call:
    """The checked call of `paged_attention` with these arguments, those after sequence_lens by name."""
    shape, requests = shape_of(query, "query"), checks.length_of("sequence_lens", sequence_lens)
    checks.check_rank("query", shape, "tokens, heads, head_dim")
    checks.check_rank("key_pages", shape_of(key_pages, "key_pages"), "pages, page_size, kv_heads, head_dim")
    checks.check_rank("value_pages", shape_of(value_pages, "value_pages"), "pages, page_size, kv_heads, value_dim")
    checks.check_int32("page_table", page_table, (requests, "max_pages"))
    checks.check_int32("query_starts", given.get("query_starts"), (requests + 1,))
    named = {
        "query": query,
        "key": key_pages,
        "value": value_pages,
        "page_table": page_table,
        "key_lens": sequence_lens,
    }
    arrays, options = split_arguments(named | {"causal": True} | given, max(shape[2], 1))
    checks.check_heads(arrays, "_pages")
    checks.check_scales(arrays, "_pages")
    extent = _extent(arrays)
    arrays |= checks.per_head_values(arrays, requests)
    if "mask" in arrays:
        arrays["mask"] = checks.ranked_mask(arrays["mask"], (extent.heads, extent.queries))
    call = Call("paged_attention", arrays, extent, options)
    return call if indices is None and page_indices is None else selected(call, indices, page_indices)


def _extent(given: Mapping[str, Any]) -> Extent:
    """Sizes; of keys as many as the lengths say, or, where they are not known yet, as the table has room for."""
    tokens, heads, head_dim = shape_of(given["query"], "query")
    pages, page_size, kv_heads, _ = shape_of(given["key"], "key_pages")
    if page_size < 1:
        raise ArgumentError("key_pages: expected a page_size of at least 1, got 0")
    requests, max_pages = shape_of(given["page_table"], "page_table")
    value_dim = checks.logical_dim(shape_of(given["value"], "value_pages"), dtype_name(given["value"]))
    keys, lens = requests * max_pages * page_size, given["key_lens"]
    if isinstance(lens, np.ndarray):
        keys = min(max(int(lens.sum()), 0), keys)
    return Extent(requests, tokens, keys, heads, kv_heads, head_dim, value_dim)


def reference(
    query: np.ndarray,
    key_pages: np.ndarray,
    value_pages: np.ndarray,
    page_table: np.ndarray,
    sequence_lens: np.ndarray,
    *,
    query_starts: np.ndarray,
    key_scales: np.ndarray | None = None,
    value_scales: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    causal: bool = True,
    mix: Mix | None = None,
    **options: Any,
) -> AttentionResult:
    """The formula in float64, request by request; `options` are those of attention_options.py."""
    checked = checked_options(query.shape[-1], causal=causal, **options)
    value_dim = checks.logical_dim(value_pages.shape, str(value_pages.dtype))
    out, lse = np.zeros((*query.shape[:2], value_dim)), np.zeros(query.shape[:2])
    for r, (ends, num_keys) in enumerate(zip(itertools.pairwise(query_starts), sequence_lens, strict=True)):
        own = slice(*ends)
        out[own], lse[own] = attend(
            query[own],
            gather(key_pages, page_table[r], num_keys, key_scales),
            gather(value_pages, page_table[r], num_keys, value_scales),
            options=checked,
            mask=None if mask is None else rows_of(mask, own),
            sinks=sinks,
            alibi_slopes=slopes_of(alibi_slopes, r),
            mix=mix,
        )
    return AttentionResult(out, lse)


def gather(pages: np.ndarray, page_ids: np.ndarray, num_keys: int, scales: np.ndarray | None = None) -> np.ndarray:
    """The first num_keys tokens of a sequence as numbers, [num_keys, kv_heads, dim]."""
    used = page_ids[: -(-num_keys // pages.shape[1])]
    if scales is not None:
        scales = np.broadcast_to(scales[used], (len(used), *pages.shape[1:3]))
    numbers = decoded(pages[used], scales)
    return numbers.reshape(-1, *numbers.shape[2:])[:num_keys]
