"""Prefill and append over pages: any number of queries of each request, the last of its keys."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from headrace.compat.flashinfer.attend import Place, Scale, Scales, Variant, attend
from headrace.compat.flashinfer.batch import Batch, int32, listed_pages, paged_lens
from headrace.compat.flashinfer.layout import Cache, Dtype, dtype_of, key_value_pages
from headrace.compat.flashinfer.plan import Plan
from headrace.compat.flashinfer.ragged import BatchPrefillWithRaggedKVCacheWrapper
from headrace.compat.flashinfer.single import (
    both,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from headrace.compat.flashinfer.workspace import (
    Workspace,
    buffers_of,
    check_value_dim,
    float8_scales,
    planned,
    refuse,
)

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]


class BatchPrefillWithPagedKVCacheWrapper(Workspace):
    """Attention of q [tokens, heads, head_dim], each request over its own pages."""

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
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        refuse(jit_args=jit_args)
        self._buffers = buffers_of(
            use_cuda_graph,
            qo_indptr_buf=qo_indptr_buf,
            paged_kv_indptr_buf=paged_kv_indptr_buf,
            paged_kv_indices_buf=paged_kv_indices_buf,
            paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
        )
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """What the next runs have in common.

        Request r: tokens qo_indptr[r] .. qo_indptr[r + 1], pages paged_kv_indices[paged_kv_indptr[r] :
        paged_kv_indptr[r + 1]], all full but the last. custom_mask: of every request its [queries, keys], one after the
        other, flat; it takes causal's place. Types are taken from the arrays of run; o_data_type is the result's.
        """
        check_value_dim(head_dim_vo)
        refuse(
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
        )
        self._fill(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        lens = paged_lens(paged_kv_indptr, paged_kv_last_page_len, page_size) if seq_lens is None else int32(seq_lens)
        if block_tables is None:
            table = listed_pages(paged_kv_indptr, paged_kv_indices)
        else:
            table = int32(block_tables).view(block_tables.shape)
        batch = Batch(int32(qo_indptr), lens, page_table=table).masked(custom_mask, packed_custom_mask)
        masked = custom_mask is not None or packed_custom_mask is not None
        variant = Variant(
            causal=causal and not masked,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            deterministic=disable_split_kv or fixed_split_size is not None,
        )
        self._plan = Plan(batch, variant, dtype_of(o_data_type), masked)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """out [tokens, heads, value_dim], with return_lse also the base-2 log-sum-exp [tokens, heads].

        The cache: (keys, values), each [pages, page_size, kv_heads, head_dim] ("HND": kv_heads before page_size), or
        one [pages, 2, ..]. With a float8 q, args are its scales and those of keys and values, head by head. sinks
        [heads]: natural logits that take weight and give no value; lse is without them.
        """
        refuse(kv_cache_sf=kv_cache_sf, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        per_head = float8_scales(q, args)
        plan: Plan = planned(self._plan)
        plan = plan if window_left is None else plan.with_options(window_left=window_left)
        results = attend(
            q,
            key_value_pages(paged_kv_cache, self._kv_layout),
            plan.batch,
            plan.variant,
            scales=Scales(
                *(both(own, scale) for own, scale in zip(per_head, (q_scale, k_scale, v_scale), strict=True))
            ),
            sinks=sinks,
            place=Place(out, lse, plan.out_dtype),
        )
        return results if return_lse else results[0]

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """run with options given here, which replace those of the plan."""
        plan: Plan = planned(self._plan, "forward")
        self._plan = plan.with_options(
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)
