"""FlashAttention 3's functions on the CPU, in its order of arguments.

    from flash_attn_interface import flash_attn_func, flash_attn_with_kvcache                    # before
    from headrace.compat.flash_attn_interface import flash_attn_func, flash_attn_with_kvcache    # after

The options are those of `headrace.compat.flash_attn`. As in version 3 the log-sum-exp is -inf where a query sees no
key, return_attn_probs gives (out, lse), and pack_gqa, num_splits, sm_margin, scheduler_metadata are for a GPU alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headrace.compat.flash_attn.cache import Cache, NewTokens, Rotary, attend_cached
from headrace.compat.flash_attn.combine import flash_attn_combine, get_scheduler_metadata
from headrace.compat.flash_attn.flash_attn_interface import batch_of, unpacked
from headrace.compat.flash_attn.translation import (
    Attended,
    Further,
    dense,
    heads_first,
    keys_of,
    local,
    options_of,
    ragged,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """out [batch, queries, heads, value_dim] of q [batch, queries, heads, dim], k, v [batch, keys, kv_heads, dim]."""
    scales: dict[str, Any] = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    further = Further(qv=qv, **scales, attention_chunk=attention_chunk)
    options = options_of(softmax_scale, causal, window_size, softcap, deterministic=deterministic)
    return _answer(dense((q, k, v), options, further), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv [batch, tokens, 3, heads, dim], or [batch, tokens, num_heads_q + 2 kv_heads, dim]."""
    scales: dict[str, Any] = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    further = Further(**scales, attention_chunk=attention_chunk)
    options = options_of(softmax_scale, causal, window_size, softcap, deterministic=deterministic)
    return _answer(dense(unpacked(qkv, num_heads_q), options, further), return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """out [tokens, heads, value_dim] of sequences one after another: tokens cu_seqlens[i] .. cu_seqlens[i + 1].

    seqused_q, seqused_k: int32 [batch], how many of them count; out is 0 for queries that do not.
    """
    scales: dict[str, Any] = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    further = Further(qv=qv, **scales, attention_chunk=attention_chunk, seqused_q=seqused_q, seqused_k=seqused_k)
    options = options_of(softmax_scale, causal, window_size, softcap, deterministic=deterministic)
    found = ragged(q, cu_seqlens_q, keys_of(k, v, cu_seqlens_k, further), options, further)
    return _answer(found, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """out over a cache, dense or paged, to which k and v are appended first, in place; see the same of `flash_attn`."""
    scales: dict[str, Any] = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    places: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "rotary_seqlens": rotary_seqlens}
    further = Further(qv=qv, **scales, attention_chunk=attention_chunk, **places)
    options = options_of(softmax_scale, causal, window_size, softcap)
    held: dict[str, Any] = {"table": page_table, "batch_idx": cache_batch_idx, "seqlens": cache_seqlens}
    cache = Cache.of(k_cache, v_cache, batch=batch_of(q, cu_seqlens_q), **held)
    new = NewTokens.of(k, v, cu_seqlens_k_new, cache_seqlens)
    rotary = Rotary.of(rotary_cos, rotary_sin, rotary_interleaved, stepping=local(options, further), new=new)
    found = attend_cached(q, cache, new, rotary, options=options, further=further, leftpad=cache_leftpad)
    return _answer(found, return_softmax_lse)


def _answer(found: Attended, with_lse: bool) -> Any:
    return (found.out, heads_first(found.lse)) if with_lse else found.out
