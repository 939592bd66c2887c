"""Latent attention over two paged caches, one of latents and one of rotated keys, in decode and in prefill.

Our op reads both from one row. Caches that are the two parts of one tensor are read where they lie; of others the pages
in use are put side by side first, which float8 caches, read with their scales, need in any case.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.attend import LOG2_E, Scale, copied
from headrace.compat.flashinfer.batch import Batch, paged_batch
from headrace.compat.flashinfer.workspace import Workspace, buffers_of, planned, refuse
from headrace.ops import mla_attention

# Of the heads that backend="cutlass" is made for, before they were absorbed.
_CUTLASS_SCALE = (128 + 64) ** -0.5


@dataclass(frozen=True)
class _Plan:
    batch: Batch
    causal: bool
    sm_scale: float


class BatchMLAPagedAttentionWrapper(Workspace):
    """Attention of q_nope [tokens, heads, latent] and q_pe [tokens, heads, rope], each request over its own pages."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer, "NHD", use_cuda_graph)
        buffers = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len_arr}
        self._buffers = buffers_of(use_cuda_graph, **buffers)
        self._plan: _Plan | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        """What the next runs have in common.

        Request r: tokens qo_indptr[r] .. qo_indptr[r + 1], the pages from kv_indices[kv_indptr[r]] on that
        kv_len_arr[r] tokens fill. sm_scale: of the heads before they were absorbed. Causal is aligned at the
        bottom right. Types and sizes are taken from the arrays of run.
        """
        refuse(profiler_buffer=use_profiler or None)
        self._fill(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        self._plan = _Plan(paged_batch(qo_indptr, kv_indptr, kv_indices, kv_len_arr, page_size), causal, sm_scale)

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> Any:
        """out [tokens, heads, latent], with return_lse also lse [tokens, heads], base 2 or natural.

        Caches [pages, page_size, latent] and [pages, page_size, rope]; rope may be 0. Float8 ones with ckv_scale, or
        ckv_scale_arr float32 [pages, page_size, latent / 128], and kpe_scale. kv_len and page_table, as of
        backend="cutlass", stand for a plan of one query a request, with the scale of heads of 128 + 64.
        """
        refuse(profiler_buffer=profiler_buffer, o_scale=o_scale)
        if kv_len is not None and page_table is not None:
            plan = _cutlass_plan(kv_len, page_table)
        else:
            plan = planned(self._plan)
        if q_nope.element_size() == 1:
            q_nope, q_pe = q_nope.bfloat16(), q_pe.bfloat16()  # which holds every code
        _check_scales(ckv_cache, ckv_scale, ckv_scale_arr, kpe_scale)
        ckv_scales = ckv_scale if ckv_scale_arr is None else ckv_scale_arr
        pages, table = _side_by_side((ckv_cache, ckv_scales), (kpe_cache, kpe_scale), plan.batch, q_nope.dtype)
        direct = out is not None and out.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        found = mla_attention(
            q_nope,
            pages,
            table,
            plan.batch.key_lens,
            query_starts=plan.batch.query_starts,
            query_rope=q_pe if q_pe.shape[-1] else None,
            value_dim=ckv_cache.shape[-1],
            scale=float(plan.sm_scale),
            causal=plan.causal,
            out=out if direct else None,
        )
        result = found.out if out is None or direct else copied(found.out, out, "out")
        base = found.lse if return_lse_base_on_e else found.lse * LOG2_E
        sums = base if lse is None else copied(base, lse, "lse")
        return (result, sums) if return_lse else result

    run_return_lse = functools.partialmethod(run, return_lse=True)


def _check_scales(cache: Tensor, of_all: float | None, by_tile: Tensor | None, of_keys: float | None) -> None:
    narrow = cache.element_size() == 1
    if narrow and ((of_all is None) == (by_tile is None) or of_keys is None):
        raise ValueError("Exactly one of ckv_scale or ckv_scale_arr is needed with float8 caches, and kpe_scale")
    if by_tile is not None and (by_tile.shape[:-1] != cache.shape[:-1] or cache.shape[-1] % by_tile.shape[-1]):
        expected = [*cache.shape[:-1], cache.shape[-1] // 128]
        raise ValueError(f"Invalid shape of ckv_scale_arr: expected {expected}, got {list(by_tile.shape)}")
    if not narrow and any(scale is not None for scale in (of_all, by_tile, of_keys)):
        raise ValueError(f"ckv_scale, ckv_scale_arr, kpe_scale: expected None with {cache.dtype} caches, got scales")


def _cutlass_plan(kv_len: Tensor, page_table: Tensor) -> _Plan:
    starts = torch.arange(len(kv_len) + 1, dtype=torch.int32)
    table = page_table.to(torch.int32).contiguous()
    return _Plan(Batch(starts, kv_len.to(torch.int32).contiguous(), page_table=table), False, _CUTLASS_SCALE)


Part = tuple[Tensor, Scale]


def _side_by_side(ckv: Part, kpe: Part, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pages [pages, page_size, latent + rope] and the table that goes with them."""
    assert batch.page_table is not None
    latents, ropes = ckv[0], kpe[0]
    narrow = latents.element_size() == 1
    whole = None if narrow else joined(latents, ropes)
    if whole is not None:
        return whole, batch.page_table
    table, page_size = batch.page_table, latents.shape[1]
    used = torch.arange(table.shape[1]) < (-(-batch.key_lens // page_size))[:, None]
    pages, places = torch.unique(table[used].long(), return_inverse=True)
    local = torch.zeros_like(table)
    local[used] = places.to(torch.int32)
    rows = torch.cat([_numbers(part, pages, dtype) for part in (ckv, kpe)], dim=-1)
    return (rows if len(pages) else rows.new_zeros(1, *rows.shape[1:])), local


def joined(latents: Tensor, ropes: Tensor) -> Tensor | None:
    """One view of both, where the rotated keys lie right behind their latents, or there are none; else None."""
    if not ropes.shape[-1]:
        return latents
    behind = latents.data_ptr() + latents.shape[-1] * latents.element_size()
    alike = latents.dtype == ropes.dtype and latents.stride() == ropes.stride() and latents.stride(-1) == 1
    one = latents.untyped_storage().data_ptr() == ropes.untyped_storage().data_ptr()
    if not (alike and one and ropes.data_ptr() == behind):
        return None
    dim = latents.shape[-1] + ropes.shape[-1]
    return latents.as_strided((*latents.shape[:-1], dim), latents.stride())


def _numbers(part: Part, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """These pages of a cache as numbers, times their scale."""
    cache, scale = part
    if cache.element_size() != 1:
        return cache[pages].to(dtype)
    codes = cache.view(torch.uint8)[pages].view(cache.dtype).float()
    if isinstance(scale, Tensor) and scale.numel() > 1:
        tiles = scale[pages].float()
        return (codes.unflatten(-1, (tiles.shape[-1], -1)) * tiles[..., None]).flatten(-2).to(dtype)
    return (codes if scale is None else codes * float(scale)).to(dtype)
