"""Attention over parts of the keys, merged: states of two or many parts, and wrappers for keys that requests share.

A state is an output v [tokens, heads, dim] and its base-2 log-sum-exp s [tokens, heads]; one that saw no key (-inf)
counts nothing. Our own ops find beginnings that page tables share by themselves; these wrappers are for programs that
say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.attend import LOG2_E
from headrace.compat.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from headrace.compat.flashinfer.layout import Cache, Dtype, packed
from headrace.compat.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from headrace.compat.flashinfer.single import single_prefill_with_kv_cache
from headrace.compat.flashinfer.workspace import planned
from headrace.ops import merge_attention


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """The state over the keys of both; v in the type of v_a, s in float32."""
    return _merged([(v_a, s_a), (v_b, s_b)])


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """merge_state into v and s. mask bool [tokens]: the rows that are merged; the others stay as they are."""
    merged_v, merged_s = _merged([(v, s), (v_other, s_other)])
    if mask is None:
        v.copy_(merged_v)
        s.copy_(merged_s)
    else:
        v.copy_(torch.where(mask.bool()[:, None, None], merged_v, v))
        s.copy_(torch.where(mask.bool()[:, None], merged_s, s))


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The state over the keys of all parts: v [tokens, parts, heads, dim], s [tokens, parts, heads]."""
    return _merged([(v[:, i], s[:, i]) for i in range(v.shape[1])])


def _merged(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    dtype, wide = states[0][0].dtype, torch.float64 if states[0][0].dtype == torch.float64 else torch.float32
    parts = [(packed(v), packed(s.to(wide) * math.log(2))) for v, s in states]
    found = merge_attention(parts, out_dtype=str(dtype).removeprefix("torch."))
    return found.out, found.lse * LOG2_E


class MultiLevelCascadeAttentionWrapper:
    """Queries over keys in levels, from those all share to those of each: a prefill wrapper for each level, merged."""

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[Tensor] | None = None,
        paged_kv_indices_buf_arr: list[Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[Tensor] | None = None,
    ) -> None:
        arrays = (
            qo_indptr_buf_arr,
            paged_kv_indptr_buf_arr,
            paged_kv_indices_buf_arr,
            paged_kv_last_page_len_buf_arr,
        )
        columns: list[list[Any]] = [[*array] if array else [None] * num_levels for array in arrays]
        self._use_cuda_graph = use_cuda_graph
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, use_cuda_graph, *buffers)
            for buffers in zip(*columns, strict=True)
        ]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffers: list[Tensor]) -> None:
        """Takes other buffers, an int one for each level."""
        for level, buffer in zip(self._levels, int_workspace_buffers, strict=True):
            level.reset_workspace_buffer(float_workspace_buffer, buffer)

    def plan(
        self,
        qo_indptr_arr: list[Tensor],
        paged_kv_indptr_arr: list[Tensor],
        paged_kv_indices_arr: list[Tensor],
        paged_kv_last_page_len: list[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """What the next runs have in common, level by level, the one all share first; causal is the last one's."""
        arrays = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        for level, *own in zip(self._levels, *arrays, strict=True):
            qo_indptr, kv_indptr, kv_indices, last_page_len = own
            level.plan(
                qo_indptr,
                kv_indptr,
                kv_indices,
                last_page_len,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal and level is self._levels[-1],
                pos_encoding_mode=pos_encoding_mode,
                sm_scale=sm_scale,
                window_left=window_left,
                logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale,
                rope_theta=rope_theta,
            )

    begin_forward = plan

    def run(self, q: Tensor, paged_kv_cache: Cache) -> Tensor:
        """out [tokens, heads, head_dim] over the keys of all levels, which lie in one cache."""
        states = [level.run(q, paged_kv_cache, return_lse=True) for level in reversed(self._levels)]
        return _merged(states)[0]

    forward = run

    def end_forward(self) -> None:
        """Does nothing, as in the library."""


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decode over a beginning that all requests share, in one array, and pages of each request's own."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        self._own = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Takes other buffers, of any size."""
        self._own.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        unique_kv_indptr: Tensor,
        unique_kv_indices: Tensor,
        unique_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: Dtype = "float16",
    ) -> None:
        """What the next calls have in common: the pages that are each request's own."""
        pages = (unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len)
        self._own.plan(*pages, num_qo_heads, num_kv_heads, head_dim, page_size)

    def forward(self, q: Tensor, k_shared: Tensor, v_shared: Tensor, unique_kv_cache: Cache) -> Tensor:
        """out [requests, heads, head_dim]; k_shared and v_shared [keys, kv_heads, dim], "HND" [kv_heads, keys, dim]."""
        planned(self._own._plan, "forward")
        shared = single_prefill_with_kv_cache(q, k_shared, v_shared, kv_layout=self._kv_layout, return_lse=True)
        own = self._own.forward_return_lse(q, unique_kv_cache)
        return merge_state(*shared, *own)[0]

    def end_forward(self) -> None:
        """Does nothing, as in the library."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Prefill or append over a beginning that all requests share, in one array, and pages of each request's own."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        self._own = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Takes other buffers, of any size."""
        self._own.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """What the next calls have in common: tokens and pages of each request's own."""
        pages = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._own.plan(*pages, num_qo_heads, num_kv_heads, head_dim, page_size)

    def forward(
        self,
        q: Tensor,
        k_shared: Tensor,
        v_shared: Tensor,
        unique_kv_cache: Cache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """out [tokens, heads, head_dim]; causal holds among each request's own keys."""
        planned(self._own._plan, "forward")
        options: dict[str, Any] = {"sm_scale": sm_scale, "rope_scale": rope_scale, "rope_theta": rope_theta}
        shared = single_prefill_with_kv_cache(
            q, k_shared, v_shared, kv_layout=self._kv_layout, return_lse=True, **options
        )
        own = self._own.forward_return_lse(q, unique_kv_cache, causal=causal, **options)
        return merge_state(*shared, *own)[0]

    def end_forward(self) -> None:
        """Does nothing, as in the library."""
