"""The functions of FlashAttention 2: its arguments in its order, with the further keywords of 3 and 4.

With return_attn_probs, out comes with the log-sum-exp, natural, [batch, heads, tokens] or [heads, tokens], +inf where a
query sees no key, and with the empty array that the library returns without dropout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flash_attn.cache import Cache, NewTokens, Rotary, attend_cached
from headrace.compat.flash_attn.translation import (
    Attended,
    Further,
    dense,
    heads_first,
    keys_of,
    local,
    options_of,
    ragged,
    refuse,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """out [batch, queries, heads, value_dim] of q [batch, queries, heads, dim], k and v [batch, keys, kv_heads, dim].

    further: qv, q_descale, k_descale, v_descale, learnable_sink, return_lse; hints without effect here. deterministic:
    of out and gradients, on a GPU; on the CPU results always are.
    """
    refuse({"dropout_p": dropout_p})
    given = Further.read("flash_attn_func", further)
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _answer(dense((q, k, v), options, given), return_attn_probs, given)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """`flash_attn_func` of kv [batch, keys, 2, kv_heads, dim], read where it lies."""
    refuse({"dropout_p": dropout_p})
    given = Further.read("flash_attn_kvpacked_func", further)
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _answer(dense((q, *_pair(kv)), options, given), return_attn_probs, given)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """`flash_attn_func` of qkv [batch, tokens, 3, heads, dim], or [batch, tokens, num_heads_q + 2 kv_heads, dim]."""
    refuse({"dropout_p": dropout_p})
    given = Further.read("flash_attn_qkvpacked_func", further, "num_heads_q")
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _answer(dense(unpacked(qkv, given.num_heads_q), options, given), return_attn_probs, given)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    **further: Any,
) -> Any:
    """out [tokens, heads, value_dim] of sequences one after another: tokens cu_seqlens[i] .. cu_seqlens[i + 1].

    With block_table int32 [batch, pages], k and v are pages [pages, page_size, kv_heads, dim] of any size. The largest
    lengths have no effect here. further: those of `flash_attn_func`, seqused_q, seqused_k, page_table (block_table).
    """
    refuse({"dropout_p": dropout_p})
    given = Further.read("flash_attn_varlen_func", further, "seqused_q", "seqused_k", "page_table")
    given = replace(given, page_table=given.page_table if block_table is None else block_table)
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    found = ragged(q, cu_seqlens_q, keys_of(k, v, cu_seqlens_k, given), options, given)
    return _answer(found, return_attn_probs, given)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """`flash_attn_varlen_func` of kv [tokens, 2, kv_heads, dim], read where it lies."""
    refuse({"dropout_p": dropout_p})
    given = Further.read("flash_attn_varlen_kvpacked_func", further, "seqused_q", "seqused_k")
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    keys = keys_of(*_pair(kv), cu_seqlens_k, given)
    return _answer(ragged(q, cu_seqlens_q, keys, options, given), return_attn_probs, given)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """`flash_attn_varlen_func` of qkv [tokens, 3, heads, dim], read where it lies."""
    refuse({"dropout_p": dropout_p})
    given = Further.read("flash_attn_varlen_qkvpacked_func", further, "num_heads_q")
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = unpacked(qkv, given.num_heads_q)
    return _answer(ragged(q, cu_seqlens, keys_of(k, v, cu_seqlens, given), options, given), return_attn_probs, given)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **further: Any,
) -> Any:
    """out [batch, queries, heads, dim] over a cache, to which k and v are appended first, in place.

    k_cache, v_cache: [batches, keys, kv_heads, dim], or with block_table int32 [batch, pages] the pages, of any size.
    cache_seqlens: int or int32 [batch], tokens in the cache before; k and v go behind them, rotated with the tables
    from that place on. q is rotated from there too, each query one place on if causal or with a window, else all by
    the first. cache_batch_idx: int32 [batch], whose cache a sequence has; cache_leftpad: int32 [batch], where it
    begins. No gradient. further: those of `flash_attn_func`, page_table (block_table), cu_seqlens_q, cu_seqlens_k_new,
    rotary_seqlens.
    """
    also = ("page_table", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens")
    given = Further.read("flash_attn_with_kvcache", further, *also)
    options = options_of(softmax_scale, causal, window_size, softcap, alibi_slopes)
    table = given.page_table if block_table is None else block_table
    places: dict[str, Any] = {"table": table, "batch_idx": cache_batch_idx, "seqlens": cache_seqlens}
    cache = Cache.of(k_cache, v_cache, batch=batch_of(q, given.cu_seqlens_q), **places)
    new = NewTokens.of(k, v, given.cu_seqlens_k_new, cache_seqlens)
    rotary = Rotary.of(rotary_cos, rotary_sin, rotary_interleaved, stepping=local(options, given), new=new)
    found = attend_cached(q, cache, new, rotary, options=options, further=given, leftpad=cache_leftpad)
    if not (return_softmax_lse or given.return_lse):
        return found.out
    return found.out, _with_plus_inf(heads_first(found.lse))


def batch_of(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    """How many sequences q is of."""
    return len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1


def unpacked(qkv: Tensor, num_heads_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of [.., 3, heads, dim], or with the query's heads of [.., heads of all three, dim]."""
    if num_heads_q is None:
        q, k, v = qkv.unbind(-3)
    else:
        kv_heads = (qkv.shape[-2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, kv_heads, kv_heads], -2)
    return q, k, v


def _pair(kv: Tensor) -> tuple[Tensor, Tensor]:
    k, v = kv.unbind(-3)
    return k, v


def _answer(found: Attended, return_attn_probs: bool, further: Further) -> Any:
    """What a function returns: out, or with it the log-sum-exp, and with that what stands for probabilities."""
    if not (return_attn_probs or further.return_lse):
        return found.out
    lse = _with_plus_inf(heads_first(found.lse))
    return (found.out, lse, found.out.new_empty(0)) if return_attn_probs else (found.out, lse)


def _with_plus_inf(lse: Tensor) -> Tensor:
    """+inf for rows that see no key: what FlashAttention 2 says of them."""
    return torch.where(lse == -torch.inf, torch.inf, lse)


# What the library's own tests import beside its functions: whether it runs by Triton, and how many keys a block has.
USE_TRITON_ROCM = False


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    return 64
