"""Multi-head latent attention over a paged latent cache: one KV head, whose values are the beginning of its keys.

    query [tokens, heads, latent + rope], latent_pages [pages, page_size, latent + rope],
    page_table [requests, max_pages], sequence_lens [requests], query_starts [requests + 1]
        -> out [tokens, heads, value_dim], lse [tokens, heads]

    c_j = the cached row of key j: its latent, then its rotated part         value_dim: of the latent, usually all of it
    out = softmax_j(scale * q c_j) c_j[:value_dim]                            options as in paged_attention

This is the absorbed form: the projections from the latent to keys and values stand in the query and behind the output,
so that a cached row is read once for all heads, and once for scores and values. `absorb_query`, `expand_value` and the
form that expands the latent instead are in latent_projection.py, which has the formulas.

DeepSeek-AI 2024, "DeepSeek-V2"; 2025, "FlashMLA".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer, Fixed, dtype_name, is_torch, shape_of
from headrace.ops import attention_paged as paged
from headrace.ops.attention_checks import check_rank, check_shape, logical_dim
from headrace.ops.attention_options import AttentionResult, Window
from headrace.ops.attention_request import Call, kernels_of, outputs
from headrace.ops.cascade import launch_shared
from headrace.ops.select import Kernel
from headrace.ops.sparse import selected
from headrace.ops.tracked import needs_torch

__all__ = ["kernels", "mla_attention", "prepared", "reference"]


def kernels() -> tuple[Kernel, ...]:
    """Its own, then all others of attention: the CPU's read a cached row once as well."""
    return kernels_of("mla_attention")


def mla_attention(
    query: Any,
    latent_pages: Any,
    page_table: Any,
    sequence_lens: Any,
    *,
    query_starts: Any,
    value_dim: int,
    scale: float,
    query_rope: Any = None,
    latent_scales: Any = None,
    causal: bool = True,
    align: str = "bottom_right",
    window: Window = (None, None),
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    mask: Any = None,
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
    """Each token's mixture of the latents it sees, and the log of the sum of its weights.

    query: [tokens, heads, latent + rope], or [tokens, heads, latent] with query_rope [tokens, heads, rope], which are
    then joined by a copy. latent_pages: any type that paged_attention takes; quantized with latent_scales float32
    [pages, page_size] or [pages, 1], for keys and values both. scale: (nope_dim + rope_dim) ** -0.5 of the heads before
    they were absorbed, which the latent does not tell. Any number of heads, any latent and rope. Tables, options and
    what is raised: paged_attention.
    """
    given = {
        "query": query,
        "latent_pages": latent_pages,
        "page_table": page_table,
        "sequence_lens": sequence_lens,
        "query_starts": query_starts,
        "scale": scale,
        "latent_scales": latent_scales,
        "causal": causal,
        "align": align,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "mask": mask,
        "indices": indices,
        "page_indices": page_indices,
        "precision": precision,
        "deterministic": deterministic,
    }
    own: dict[str, Any] = {"value_dim": value_dim, "query_rope": query_rope}
    cascade = cascade if indices is None and page_indices is None else False
    if needs_torch(query, query_rope, latent_pages, sinks, mask, alibi_slopes, latent_scales):
        from headrace.ops import torch_latent

        choice: dict[str, Any] = {"cascade": cascade, "out_dtype": out_dtype, "kernel": kernel, "require": require}
        return torch_latent.mla_attention(given, out=out, **own, **choice)
    call = prepared(**given, **own)
    return launch_shared(call, outputs(call, out, out_dtype), cascade=cascade, kernel=kernel, require=require)


def prepared(
    query: Any,
    latent_pages: Any,
    page_table: Any,
    sequence_lens: Any,
    *,
    value_dim: int,
    query_rope: Any = None,
    latent_scales: Any = None,
    indices: Any = None,
    page_indices: Any = None,
    **given: Any,
) -> Call:
    """The checked call of `mla_attention` with these arguments; `given`: those of paged_attention."""
    pages = _viewable(latent_pages)
    shape = shape_of(pages, "latent_pages")
    check_rank("latent_pages", shape, "pages, page_size, latent + rope")
    query = joined(query, query_rope)
    _check_dims(shape_of(query, "query"), logical_dim(shape, dtype_name(pages)), value_dim, dtype_name(pages))
    if given.get("scale") is None:
        raise ArgumentError("scale: expected a number, got None", "(nope_dim + rope_dim) ** -0.5 of the heads")
    cache = as_keys_and_values(pages, latent_scales, value_dim)
    keys, values = cache.pop("key"), cache.pop("value")
    call = replace(paged.prepared(query, keys, values, page_table, sequence_lens, **given, **cache), op="mla_attention")
    return call if indices is None and page_indices is None else selected(call, indices, page_indices)


def as_keys_and_values(pages: Any, scales: Any, value_dim: int) -> dict[str, Any]:
    """The pages as those of one KV head, without a copy: the values are the beginning of the same rows."""
    codes = value_dim // 2 if dtype_name(pages) == "uint8" else value_dim
    found = {"key": pages[:, :, None, :], "value": pages[:, :, None, :codes]}
    if scales is not None:
        rows = shape_of(pages, "latent_pages")[:2]
        if shape_of(scales, "latent_scales") not in (rows, (rows[0], 1)):
            got = list(shape_of(scales, "latent_scales"))
            raise ArgumentError(f"latent_scales: expected {list(rows)} or {[rows[0], 1]}, got {got}")
        found["key_scales"] = found["value_scales"] = scales[..., None]
    return found


def joined(query: Any, query_rope: Any) -> Any:
    """The query's latent and rotated parts as one array."""
    shape = shape_of(query, "query")
    check_rank("query", shape, "tokens, heads, latent + rope" if query_rope is None else "tokens, heads, latent")
    if query_rope is None:
        return query
    check_shape("query_rope", query_rope, (*shape[:2], "rope"))
    if is_torch(query):
        import torch

        return torch.cat([query, query_rope], dim=-1)
    if isinstance(query, Buffer):
        raise ArgumentError("query_rope: expected None in a program", "record both parts into one buffer")
    return np.concatenate([np.asarray(query), np.asarray(query_rope)], axis=-1)


def _viewable(pages: Any) -> Any:
    """The same memory as an array that can be sliced without a copy."""
    if isinstance(pages, Buffer):
        raise ArgumentError("latent_pages: expected memory that outlives a step, got a buffer of a program", "Fixed")
    if isinstance(pages, Fixed):
        return pages.numpy()
    shape_of(pages, "latent_pages")
    return pages if isinstance(pages, np.ndarray) or is_torch(pages) else np.from_dlpack(pages)


def _check_dims(query_shape: tuple[int, ...], key_dim: int, value_dim: int, dtype: str) -> None:
    if query_shape[2] != key_dim:
        raise ArgumentError(f"query: expected [tokens, heads, {key_dim}] as of latent_pages, got {list(query_shape)}")
    if isinstance(value_dim, bool) or not isinstance(value_dim, int) or not 1 <= value_dim <= key_dim:
        raise ArgumentError(f"value_dim: expected a whole number from 1 to {key_dim}, got {value_dim!r}")
    if dtype == "uint8" and value_dim % 2:
        raise ArgumentError(f"value_dim: expected an even number, int4 holds two in a byte, got {value_dim}")


def reference(
    query: np.ndarray,
    latent_pages: np.ndarray,
    page_table: np.ndarray,
    sequence_lens: np.ndarray,
    *,
    query_starts: np.ndarray,
    value_dim: int,
    scale: float,
    query_rope: np.ndarray | None = None,
    latent_scales: np.ndarray | None = None,
    **options: Any,
) -> AttentionResult:
    """The formula in float64, request by request; `options` are those of paged_attention's reference."""
    cache = as_keys_and_values(latent_pages, latent_scales, value_dim)
    return paged.reference(
        joined(query, query_rope),
        cache["key"],
        cache["value"],
        page_table,
        sequence_lens,
        query_starts=query_starts,
        scale=scale,
        key_scales=cache.get("key_scales"),
        value_scales=cache.get("value_scales"),
        **options,
    )
