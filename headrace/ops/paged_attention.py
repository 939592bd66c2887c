"""Attention over a paged KV cache, a ragged batch of prefill, append and decode in one call.

    query [tokens, heads, head_dim], key_pages [pages, page_size, kv_heads, head_dim], value_pages [.., value_head_dim],
    page_table [requests, max_pages], sequence_lens [requests], query_starts [requests + 1]
        -> [tokens, heads, value_head_dim]

    Request r owns tokens query_starts[r] .. query_starts[r + 1] and keys 0 .. sequence_lens[r], its new ones included;
    key j lies in page page_table[r, j // page_size] at j % page_size. Its i-th token from the end sees the keys up to
    the i-th from the end (causal, aligned at the bottom right), and with a window only `left` before that one:

    out = softmax_j(softcap * tanh(scale * q k_j / softcap)) v_j          without softcap: softmax_j(scale * q k_j) v_j

    Query head h reads KV head h // (heads / kv_heads). A token that sees no key gets zeros. Entries of the page table
    past a sequence's end, and memory past its last token, may hold anything.

Dao 2022-2024, "FlashAttention" 1-3 and "Flash-Decoding"; Kwon et al. 2023, "PagedAttention".
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from headrace.errors import ArgumentError, UnsupportedError
from headrace.kernels.cpu.arrays import dtype_name, empty_like, shape_of
from headrace.ops.select import Kernel, Request, Traffic, choose

DTYPES = ("float32", "float16", "bfloat16")
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


def paged_attention(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    *,
    page_table: Any,
    sequence_lens: Any,
    query_starts: Any,
    causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    out: Any = None,
    out_dtype: str = "float32",
    kernel: str | None = None,
) -> Any:
    """Each token's mixture of the values it sees, [tokens, heads, value_head_dim] in `out_dtype`.

    query and pages: float32, float16 or bfloat16, keys and values the same, pages may be strided; tables and lengths:
    int32, read when the kernel runs. window: (left, None), keys seen before a token's own. scale: 1 / sqrt(head_dim)
    when None. out: written in place when given. Arithmetic is float32. Raises ArgumentError for shapes, lengths, starts
    and pages that do not fit (nothing outside the arrays is read), KernelError when the kernel asked for cannot run.
    """
    names = ("query", "key_pages", "value_pages", "page_table", "sequence_lens", "query_starts")
    values = (query, key_pages, value_pages, page_table, sequence_lens, query_starts)
    arrays = dict(zip(names, values, strict=True))
    shapes = {name: shape_of(array, name) for name, array in arrays.items()}
    _check_shapes(shapes)
    if not causal:
        raise UnsupportedError("causal: only causal attention over pages is done, got False")
    options = {"window_left": _window_left(window), "softcap": _positive("softcap", softcap, 0.0)}
    scale = _positive("scale", scale, shapes["query"][2] ** -0.5)
    if out is None:
        out = empty_like(query, (*shapes["query"][:2], shapes["value_pages"][3]), out_dtype)
    asked = request(
        shapes, {"query": dtype_name(query), "pages": dtype_name(key_pages), "out": dtype_name(out)}, options
    )
    run = choose(kernels(), asked, kernel).run
    return run(arrays | {"out": out}, options["window_left"], scale, options["softcap"])


def reference(
    query: np.ndarray,
    key_pages: np.ndarray,
    value_pages: np.ndarray,
    *,
    page_table: np.ndarray,
    sequence_lens: np.ndarray,
    query_starts: np.ndarray,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """The formula, request by request and head by head, in float64 (or `dtype`: the straightforward computation)."""
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // key_pages.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    out = np.zeros((num_tokens, num_heads, value_pages.shape[3]), dtype)
    for request_index, num_keys in enumerate(sequence_lens):
        begin, end = query_starts[request_index : request_index + 2]
        keys = gather(key_pages, page_table[request_index], num_keys).astype(dtype)
        values = gather(value_pages, page_table[request_index], num_keys).astype(dtype)
        seen = visible(end - begin, num_keys, window[0])
        for head in range(num_heads):
            scores = query[begin:end, head].astype(dtype) @ keys[:, head // group].T * dtype(scale)
            if softcap:
                scores = dtype(softcap) * np.tanh(scores / dtype(softcap))
            out[begin:end, head] = softmax(scores, seen) @ values[:, head // group]
    return out


def gather(pages: np.ndarray, page_ids: np.ndarray, num_keys: int) -> np.ndarray:
    """The first num_keys tokens of a sequence, [num_keys, kv_heads, dim]."""
    used = page_ids[: -(-num_keys // pages.shape[1])]
    return pages[used].reshape(-1, *pages.shape[2:])[:num_keys]


def visible(num_queries: int, num_keys: int, window_left: int | None) -> np.ndarray:
    """Which key each query sees, bool [num_queries, num_keys]."""
    own = np.arange(num_queries)[:, None] + num_keys - num_queries
    keys = np.arange(num_keys)
    return (keys <= own) & (True if window_left is None else keys >= own - window_left)


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Weights of the keys seen; a row that sees none is zero."""
    scores = np.where(seen, scores, -np.inf)
    largest = np.max(scores, axis=1, keepdims=True, initial=np.finfo(scores.dtype).min)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def request(
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, str],
    options: dict[str, Any] | None = None,
    num_keys: int | None = None,
) -> Request:
    """The request of a call. `num_keys`: of all sequences together; unknown: what the page table has room for.

    A cached byte is read once per request; each query row multiplies every key and every value.
    """
    tokens, heads, head_dim = shapes["query"]
    _, page_size, kv_heads, value_dim = shapes["value_pages"]
    requests, max_pages = shapes["page_table"]
    keys = requests * max_pages * page_size if num_keys is None else num_keys
    cached = keys * kv_heads * (head_dim + value_dim) * WIDTHS.get(dtypes["pages"], 4)
    rows = tokens * heads * (head_dim * WIDTHS.get(dtypes["query"], 4) + value_dim * WIDTHS.get(dtypes["out"], 4))
    flops = 2 * tokens * heads * (head_dim + value_dim) * (keys // requests if requests else 0)
    return Request("paged_attention", shapes, dtypes, Traffic(cached + rows, flops), options or {})


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    ranks = {"query": 3, "key_pages": 4, "value_pages": 4, "page_table": 2, "sequence_lens": 1, "query_starts": 1}
    words = {
        "query": "[tokens, heads, head_dim]",
        "key_pages": "[pages, page_size, kv_heads, head_dim]",
        "value_pages": "[pages, page_size, kv_heads, value_head_dim]",
        "page_table": "[requests, max_pages]",
        "sequence_lens": "[requests]",
        "query_starts": "[requests + 1]",
    }
    for name, rank in ranks.items():
        if len(shapes[name]) != rank:
            raise ArgumentError(f"{name}: expected {words[name]}, got {list(shapes[name])}")


def _window_left(window: tuple[int | None, int | None]) -> int:
    """Keys seen before a token's own; -1: all."""
    try:
        left, right = window
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"window: expected (left, None), got {window!r}") from error
    if right not in (None, 0):
        raise ArgumentError(
            f"window: expected (left, None), got {window!r}", "causal attention sees nothing to the right"
        )
    if left is None:
        return -1
    if isinstance(left, bool) or not isinstance(left, int) or left < 0:
        raise ArgumentError(f"window: expected (left, None) with left a whole number >= 0, got {window!r}")
    return min(left, 2**40)


def _positive(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{name}: expected a finite number > 0, got {value}")
    return float(value)


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first asked for."""
    from headrace.kernels.cpu import paged_attention
    from headrace.ops.per_isa import per_isa

    return per_isa(paged_attention.run)
