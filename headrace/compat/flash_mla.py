"""FlashMLA's functions on the CPU; the line to replace:

    from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    from headrace.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata

    get_mla_metadata          () and the older (cache_seqlens, num_q_tokens_per_head_k, num_heads_k, ...)
    flash_mla_with_kvcache    dense and sparse, any page size, latent, heads and KV heads; float8 caches of 656 and 584
                              bytes a token; attn_sink; a second cache beside the first; lengths of what is listed
    flash_mla_sparse_fwd      with the largest score of each row
    flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func       with gradients

Conventions are the library's: causal is aligned at the bottom right, the log-sum-exp is natural and without the sink, a
row that sees no key is 0 with +inf. Beyond it: float32, float16 and float64, sparse attention over caches that are not
float8, sinks and float8 in dense attention. Schedules are made natively, call by call: the metadata only remembers what
it was first used with. What float8 caches hold is read into the query's bfloat16, else float32: of dense
attention the pages in use, of sparse attention the tokens that are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flash_mla_layouts import check_layout, tokens_at
from headrace.ops import attention, mla_attention, paged_attention

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

_METADATA_SIZE = 8  # numbers of the library's schedule for one part of the machine
_BLOCK = 1 << 22  # numbers of keys looked at together for the largest scores


@dataclass
class FlashMLASchedMeta:
    """What the first call was made with: a later one must agree."""

    @dataclass
    class Config:
        """The sizes and switches of a call."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
    """(FlashMLASchedMeta(), None); with the older arguments int32 [1, 8] and [batch + 1], one split for each request.

    The older arguments: cache_seqlens int32 [batch], num_q_tokens_per_head_k, num_heads_k, num_heads_q=None,
    is_fp8_kvcache=False, topk=None.
    """
    if not args and not kwargs:
        return FlashMLASchedMeta(), None
    return _older_metadata(*args, **kwargs)


def _older_metadata(
    cache_seqlens: Tensor,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Tensor, Tensor]:
    metadata = torch.zeros(1, _METADATA_SIZE, dtype=torch.int32)
    return metadata, torch.arange(len(cache_seqlens) + 1, dtype=torch.int32)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [batch, queries, heads, head_dim_v] in q's type, and the log-sum-exp [batch, heads, queries] in float32.

    q [batch, queries, heads, head_dim], k_cache [pages, page_size, kv_heads, head_dim] (bytes: flash_mla_layouts.py),
    block_table int32 [batch, max_pages], cache_seqlens int32 [batch]. indices int32 [batch, queries, topk], each a
    page * page_size + place, -1 (or what is outside the cache) for none. Memory past a sequence's end, and the table
    past its last page, may hold anything.
    """
    sparse = _Sparse(topk_length, extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
    _agree(tile_scheduler_metadata, num_splits, _config(q, k_cache, causal, is_fp8_kvcache, indices, sparse))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if is_fp8_kvcache:
        check_layout(k_cache, "k_cache")
    if indices is not None:
        if causal:
            raise AssertionError("causal must be False when indices are given (sparse attention)")
        places = sparse.places(q, k_cache, indices, is_fp8_kvcache)
    elif any(given is not None for given in vars(sparse).values()):
        raise AssertionError(f"{', '.join(vars(sparse))} must be None without indices (dense attention)")
    else:
        places = _pages(q, k_cache, block_table, cache_seqlens, is_fp8_kvcache)
    return _attended(q, places, head_dim_v, scale=scale, causal=causal, attn_sink=attn_sink)


@dataclass(frozen=True)
class _Places:
    """Which keys there are: pages, the table of each request, its length; and of these what is listed."""

    pages: Tensor
    table: Tensor
    lens: Tensor
    query_starts: Tensor
    indices: Tensor | None = None


@dataclass(frozen=True)
class _Sparse:
    """The arguments that go with indices."""

    topk_length: Tensor | None
    extra_k_cache: Tensor | None
    extra_indices_in_kvcache: Tensor | None
    extra_topk_length: Tensor | None

    def places(self, q: Tensor, cache: Tensor, indices: Tensor, is_fp8: bool) -> _Places:
        """The cache itself; with float8 or a second cache what is listed, in an array of its own."""
        listed = _listed(indices, self.topk_length, cache.shape[0] * cache.shape[1])
        if is_fp8 or self.extra_k_cache is not None:
            cache, listed = _gathered(self._scopes(cache, listed, is_fp8), q.dtype, is_fp8)
        return _whole(cache, listed.flatten(0, 1))

    def _scopes(self, cache: Tensor, listed: Tensor, is_fp8: bool) -> list[tuple[Tensor, Tensor]]:
        if self.extra_k_cache is None or self.extra_indices_in_kvcache is None:
            return [(cache, listed)]
        if is_fp8:
            check_layout(self.extra_k_cache, "extra_k_cache")
        num_keys = self.extra_k_cache.shape[0] * self.extra_k_cache.shape[1]
        extra = _listed(self.extra_indices_in_kvcache, self.extra_topk_length, num_keys)
        return [(cache, listed), (self.extra_k_cache, extra)]


def _config(
    q: Tensor, cache: Tensor, causal: bool, is_fp8: bool, indices: Tensor | None, sparse: _Sparse
) -> FlashMLASchedMeta.Config:
    extra_cache, extra = sparse.extra_k_cache, sparse.extra_indices_in_kvcache
    return FlashMLASchedMeta.Config(
        b=q.shape[0],
        s_q=q.shape[1],
        h_q=q.shape[2],
        page_block_size=cache.shape[1],
        h_k=cache.shape[2],
        causal=causal,
        is_fp8_kvcache=is_fp8,
        topk=None if indices is None else indices.shape[-1],
        extra_page_block_size=None if extra_cache is None else extra_cache.shape[1],
        extra_topk=None if extra is None else extra.shape[-1],
    )


def _agree(metadata: FlashMLASchedMeta | Tensor, num_splits: Tensor | None, config: FlashMLASchedMeta.Config) -> None:
    """AssertionError, as the library has it, where metadata is used for a call unlike its first."""
    if not isinstance(metadata, FlashMLASchedMeta):
        return
    if num_splits is not None:
        raise AssertionError("num_splits must be None with a FlashMLASchedMeta")
    if not metadata.have_initialized:
        metadata.have_initialized, metadata.config = True, config
    for name, first in vars(metadata.config).items():
        now = getattr(config, name)
        if first != now:
            raise AssertionError(f"{name}: expected {first} as in this FlashMLASchedMeta's first call, got {now}")


def _pages(q: Tensor, cache: Tensor, block_table: Tensor | None, cache_seqlens: Tensor | None, is_fp8: bool) -> _Places:
    if block_table is None or cache_seqlens is None:
        raise AssertionError("block_table and cache_seqlens must be given without indices (dense attention)")
    table, lens = (array.to(torch.int32).contiguous() for array in (block_table, cache_seqlens))
    if is_fp8:
        cache, table = _decoded_pages(cache, table, lens, q.dtype)
    batch, queries = q.shape[:2]
    starts = torch.arange(batch + 1, dtype=torch.int32) * queries
    return _Places(cache, table, lens, starts)


def _decoded_pages(cache: Tensor, table: Tensor, lens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    page_size = cache.shape[1]
    used = torch.arange(table.shape[1]) < (-(-lens // page_size))[:, None]
    pages, places = torch.unique(table[used], return_inverse=True)
    local = torch.zeros_like(table)
    local[used] = places.to(torch.int32)
    tokens = (pages.long()[:, None] * page_size + torch.arange(page_size)).flatten()
    rows = tokens_at(cache, tokens, _decoded_dtype(dtype))
    return rows.view(len(pages), page_size, 1, rows.shape[-1]), local


def _listed(indices: Tensor, length: Tensor | None, num_keys: int) -> Tensor:
    """Indices [batch or queries, .., topk] with -1 for what is not in the cache or behind the length; int32."""
    seen = (indices >= 0) & (indices < num_keys)
    if length is not None:
        ends = length.view(-1, *[1] * (indices.ndim - 1))
        seen &= torch.arange(indices.shape[-1]) < ends
    return torch.where(seen, indices, -1).to(torch.int32)


def _gathered(scopes: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, is_fp8: bool) -> tuple[Tensor, Tensor]:
    """The tokens that are listed as pages of one, and the lists with their new names, one behind the other."""
    rows, lists, count = [], [], 0
    for cache, listed in scopes:
        seen = listed >= 0
        tokens, places = torch.unique(listed[seen].long(), return_inverse=True)
        local = torch.full_like(listed, -1)
        local[seen] = (places + count).to(torch.int32)
        page_size = cache.shape[1]
        plain = cache[tokens // page_size, tokens % page_size, 0] if not is_fp8 else None
        rows.append(tokens_at(cache, tokens, _decoded_dtype(dtype)) if plain is None else plain)
        lists.append(local)
        count += len(tokens)
    return torch.cat(rows)[:, None, None], torch.cat(lists, dim=-1)


def _decoded_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 may not hold a code times its scale."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _whole(pages: Tensor, listed: Tensor) -> _Places:
    """All pages as one sequence, which all queries share."""
    if not pages.shape[0] * pages.shape[1]:
        pages = pages.new_zeros(1, 1, *pages.shape[2:])
    table = torch.arange(pages.shape[0], dtype=torch.int32)[None]
    lens = torch.tensor([pages.shape[0] * pages.shape[1]], dtype=torch.int32)
    return _Places(pages, table, lens, torch.tensor([0, len(listed)], dtype=torch.int32), listed.contiguous())


def _attended(
    q: Tensor, places: _Places, value_dim: int, *, scale: float, causal: bool, attn_sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, head_dim = q.shape
    sinks = None if attn_sink is None else attn_sink.float().contiguous()
    options = {"query_starts": places.query_starts, "scale": scale, "causal": causal, "sinks": sinks}
    query, pages = q.reshape(-1, heads, head_dim), places.pages
    if pages.dtype != query.dtype and query.dtype == torch.float64:
        pages = pages.to(query.dtype)
    asked: tuple[Any, ...] = (query, pages, pages[..., :value_dim], places.table, places.lens)
    if pages.shape[2] == 1:
        asked, options["value_dim"] = (query, pages[:, :, 0], *asked[3:]), value_dim
        result = mla_attention(*asked, **options, indices=places.indices)
    else:
        result = paged_attention(*asked, **options, indices=places.indices)
    out, lse = _silenced(result.out, sinks), _lonely_is_inf(result.lse)
    return out.view(batch, queries, heads, value_dim), lse.view(batch, queries, heads).transpose(1, 2).contiguous()


def _silenced(out: Tensor, sinks: Tensor | None) -> Tensor:
    """Heads whose sink is +inf are 0 exactly."""
    if sinks is not None and bool(torch.isposinf(sinks).any()):
        return torch.where(torch.isposinf(sinks)[:, None], 0, out)
    return out


def _lonely_is_inf(lse: Tensor) -> Tensor:
    return torch.where(torch.isneginf(lse), torch.inf, lse)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [queries, heads, d_v] in q's type, the largest score and the log-sum-exp of each row, float32.

    q [queries, heads, head_dim], kv [keys, kv_heads, head_dim], indices int32 [queries, kv_heads, topk], each a key;
    what is below 0 or no key is none. topk_length int32 [queries]: how many of a row's count. A row without keys:
    out 0, largest score -inf, log-sum-exp +inf. The log-sum-exp is natural and knows nothing of the sink.
    """
    listed = _listed(indices, topk_length, len(kv))
    group = q.shape[1] // kv.shape[1]
    parts = []
    for head in range(kv.shape[1]):
        own = slice(head * group, (head + 1) * group)
        query, keys, seen = q[:, own], kv[:, head], listed[:, head]
        sink = None if attn_sink is None else attn_sink[own]
        # One page that holds all keys.
        places = _whole(keys[None, :, None], seen)
        out, lse = _attended(query[:, None], places, d_v, scale=sm_scale, causal=False, attn_sink=sink)
        parts.append((out[:, 0], _largest_scores(query, keys, seen, sm_scale), lse[..., 0]))
    joined = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]
    return joined[0], joined[1], joined[2]


def _largest_scores(query: Tensor, keys: Tensor, listed: Tensor, scale: float) -> Tensor:
    """[queries, heads]; some queries at a time, for each has its own keys."""
    wide = torch.promote_types(query.dtype, torch.float32)
    largest = torch.full(query.shape[:2], -torch.inf, dtype=wide)
    step = max(1, _BLOCK // max(1, listed.shape[1] * keys.shape[1]))
    for begin in range(0, len(query) if listed.shape[1] and len(keys) else 0, step):
        seen = listed[begin : begin + step]
        near = keys[seen.clamp(min=0).long()].to(wide)
        scores = torch.einsum("qhd,qkd->qhk", query[begin : begin + step].to(wide), near) * scale
        largest[begin : begin + step] = torch.where(seen[:, None] >= 0, scores, -torch.inf).amax(-1)
    return largest


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """out [tokens, heads, value_dim] and the natural log-sum-exp [tokens, heads], -inf for a row without keys.

    q [tokens, heads, head_dim], k and v [key tokens, kv_heads, ..], starts int32 [requests + 1]; causal is aligned at
    the bottom right. Longest lengths and is_varlen say nothing that the starts do not.
    """
    if dropout_p:
        raise NotImplementedError("dropout_p: headrace has no dropout; pass 0.0 and drop out of the result")
    starts = {"query_starts": cu_seqlens_qo.to(torch.int32), "key_starts": cu_seqlens_kv.to(torch.int32)}
    result = attention(q, k, v, **starts, causal=causal, scale=softmax_scale, deterministic=deterministic)
    return result.out, result.lse


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func of qkv [tokens, heads, 2 * head_dim_qk + value_dim], one beside the other."""
    q, k, v = qkv.tensor_split((head_dim_qk, 2 * head_dim_qk), dim=-1)
    lens = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lens, dropout_p, softmax_scale, causal, deterministic, is_varlen)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func of kv [key tokens, kv_heads, head_dim_qk + value_dim]: keys and values side by side."""
    k, v = kv.tensor_split((head_dim_qk,), dim=-1)
    lens = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    return flash_attn_varlen_func(q, k, v, *lens, dropout_p, softmax_scale, causal, deterministic, is_varlen)
