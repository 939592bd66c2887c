"""Batches of prefill and decode in one call, and attention with sinks: the library's wrappers for them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.attend import LOG2_E, Place, Scale, Scales, Variant, attend, copied
from headrace.compat.flashinfer.batch import paged_batch
from headrace.compat.flashinfer.layout import Cache, checked_layout, key_value_pages
from headrace.compat.flashinfer.plan import Plan
from headrace.compat.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from headrace.compat.flashinfer.workspace import planned, refuse


class BatchAttention:
    """Attention of q [tokens, heads, head_dim], each request over its own pages; device is accepted and the CPU."""

    def __init__(self, kv_layout: str = "NHD", device: str = "cuda") -> None:
        self._kv_layout = checked_layout(kv_layout)
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """What the next runs have in common: tokens, pages and lengths of each request, options."""
        refuse(profiler_buffer=use_profiler or None)
        variant = Variant(causal=causal, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)
        self._plan = Plan(paged_batch(qo_indptr, kv_indptr, kv_indices, kv_len_arr, page_size), variant)

    def run(
        self,
        q: Tensor,
        kv_cache: Cache,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: Tensor | None = None,
        kv_cache_sf: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """out [tokens, heads, value_dim] and the base-2 log-sum-exp [tokens, heads]."""
        refuse(profiler_buffer=profiler_buffer, kv_cache_sf=kv_cache_sf)
        plan: Plan = planned(self._plan)
        if logits_soft_cap > 0 and plan.variant.softcap is None:
            raise ValueError("logits_soft_cap: expected it in plan() too, got it in run() alone")
        plan = plan.with_options(logits_soft_cap=logits_soft_cap) if logits_soft_cap > 0 else plan
        scales, place = Scales(key=k_scale, value=v_scale), Place(out, lse)
        pages = key_value_pages(kv_cache, self._kv_layout)
        return attend(q, pages, plan.batch, plan.variant, scales=scales, place=place)


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """The prefill wrapper with a sink for each head, which here the log-sum-exp counts too."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, *buffers)

    def run(  # type: ignore[override]
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        sink: Tensor | None = None,
        sm_scale: float | None = None,
        **options: Any,
    ) -> Any:
        """sink [heads]: natural logits that take weight and give no value; sm_scale: in place of the plan's."""
        plan = planned(self._plan)
        if sm_scale is not None:
            self._plan = plan.with_options(sm_scale=float(sm_scale))
        return_lse, lse = options.pop("return_lse", False), options.pop("lse", None)
        out, sums = super().run(q, paged_kv_cache, sinks=sink, return_lse=True, **options)
        if sink is not None:
            sums = torch.logaddexp2(sums, sink.float() * LOG2_E)
        if lse is not None:
            copied(sums, lse, "lse")
        return (out, sums) if return_lse else out

    run_return_lse = functools.partialmethod(run, return_lse=True)
