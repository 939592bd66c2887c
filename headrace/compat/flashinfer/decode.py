"""Decode: one query (or a few) of each request over its pages, planned once and run for every layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.attend import Place, Scales, Variant, attend
from headrace.compat.flashinfer.batch import Batch, int32, listed_pages, paged_lens
from headrace.compat.flashinfer.layout import Cache, Dtype, dtype_of, key_value_pages
from headrace.compat.flashinfer.plan import Plan
from headrace.compat.flashinfer.single import single_decode_with_kv_cache
from headrace.compat.flashinfer.workspace import Workspace, buffers_of, planned, refuse

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
]


class BatchDecodeWithPagedKVCacheWrapper(Workspace):
    """Attention of q [requests * q_len_per_req, heads, head_dim], each request over its own pages."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        refuse(jit_args=jit_args)
        self._buffers = buffers_of(
            use_cuda_graph,
            paged_kv_indptr_buffer=paged_kv_indptr_buffer,
            paged_kv_indices_buffer=paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
        )
        self._use_tensor_cores = use_tensor_cores
        self._plan: Plan | None = None

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        data_type: Dtype = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """What the next runs have in common.

        Request r has the pages indices[indptr[r] : indptr[r + 1]], all full but the last, of which last_page_len[r]
        tokens count. Its q_len_per_req queries are the last of its keys. Types and sizes are taken from the arrays of
        run; o_data_type is that of the result. A fixed or no split of the keys: bits that do not depend on neighbours.
        """
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req: expected at least 1, got {q_len_per_req}")
        self._fill(indptr, indices, last_page_len)
        lens = paged_lens(indptr, last_page_len, page_size) if seq_lens is None else int32(seq_lens)
        table = listed_pages(indptr, indices) if block_tables is None else _table(block_tables)
        starts = torch.arange(len(lens) + 1, dtype=torch.int32) * q_len_per_req
        variant = Variant(
            causal=q_len_per_req > 1 and window_right == 0,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            window_right=window_right,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            deterministic=disable_split_kv or fixed_split_size is not None,
        )
        self._plan = Plan(Batch(starts, lens, page_table=table), variant, dtype_of(o_data_type))

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """out like q, with return_lse also the base-2 log-sum-exp [tokens, heads]; in out and lse when they are given.

        The cache: (keys, values), each [pages, page_size, kv_heads, head_dim] ("HND": kv_heads before page_size), or
        one [pages, 2, ..]. sinks [heads]: natural logits that take weight and give no value; lse is without them.
        """
        refuse(kv_cache_sf=kv_cache_sf, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        refuse(args=args or None)
        plan: Plan = planned(self._plan)
        plan = plan if window_left is None else plan.with_options(window_left=window_left)
        results = attend(
            q,
            key_value_pages(paged_kv_cache, self._kv_layout),
            plan.batch,
            plan.variant,
            scales=Scales(q_scale, k_scale, v_scale),
            sinks=sinks,
            place=Place(out, lse, plan.out_dtype),
        )
        return results if return_lse else results[0]

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)


def _table(block_tables: Tensor) -> Tensor:
    return int32(block_tables).view(block_tables.shape)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The same with the buffers of a CUDA graph, which plan fills."""

    def __init__(
        self,
        workspace_buffer: Tensor,
        indptr_buffer: Tensor,
        indices_buffer: Tensor,
        last_page_len_buffer: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        buffers = (indptr_buffer, indices_buffer, last_page_len_buffer)
        super().__init__(workspace_buffer, kv_layout, True, use_tensor_cores, *buffers)


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: Dtype = None,
    kv_data_type: Dtype = None,
    data_type: Dtype = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: Tensor | None = None,
) -> None:
    """plan of a wrapper; global_override_indptr_cpu stands for indptr when it is given."""
    starts = indptr if global_override_indptr_cpu is None else global_override_indptr_cpu
    sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
    BatchDecodeWithPagedKVCacheWrapper.plan(
        self,
        starts,
        indices,
        last_page_len,
        *sizes,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv,
        q_len_per_req=q_len_per_req,
    )
