"""Prefill over keys and values of all requests in one array, one request after the other."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.attend import Place, Scales, Variant, attend
from headrace.compat.flashinfer.batch import ragged_batch
from headrace.compat.flashinfer.layout import Dtype, dtype_of, token_major
from headrace.compat.flashinfer.plan import Plan
from headrace.compat.flashinfer.single import both
from headrace.compat.flashinfer.workspace import (
    Workspace,
    buffers_of,
    check_value_dim,
    float8_scales,
    planned,
    refuse,
)


class BatchPrefillWithRaggedKVCacheWrapper(Workspace):
    """Attention of q [tokens, heads, head_dim] over k and v [key tokens, kv_heads, dim], request by request."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        refuse(jit_args=jit_args)
        self._buffers = buffers_of(use_cuda_graph, qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf)
        self._plan: Plan | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
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
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Tensor | None = None,
        o_indptr: Tensor | None = None,
    ) -> None:
        """What the next runs have in common: where each request's queries and keys are, a mask, options.

        custom_mask: of every request its [queries, keys], one after the other, flat; it takes causal's place. Types are
        taken from the arrays of run; o_data_type is the result's.
        """
        check_value_dim(head_dim_vo)
        refuse(
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
            v_indptr=v_indptr,
            o_indptr=o_indptr,
        )
        if len(qo_indptr) != len(kv_indptr):
            raise ValueError(f"kv_indptr: expected {len(qo_indptr)} numbers as of qo_indptr, got {len(kv_indptr)}")
        self._fill(qo_indptr, kv_indptr)
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
        batch = ragged_batch(qo_indptr, kv_indptr).masked(custom_mask, packed_custom_mask)
        self._plan = Plan(batch, variant, dtype_of(o_data_type), masked)

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """out [tokens, heads, value_dim], with return_lse also the base-2 log-sum-exp [tokens, heads].

        k and v: [key tokens, kv_heads, dim], with "HND" [kv_heads, key tokens, dim]. With a float8 q, args are its
        scales and those of keys and values, head by head.
        """
        refuse(kv_cache_sf=kv_cache_sf, o_scale=o_scale)
        per_head = float8_scales(q, args)
        plan: Plan = planned(self._plan)
        dtype = plan.out_dtype
        if dtype is None and q.element_size() == 1:
            dtype = torch.bfloat16
        results = attend(
            q,
            (token_major(k, self._kv_layout), token_major(v, self._kv_layout)),
            plan.batch,
            plan.variant,
            scales=Scales(
                *(both(own, scale) for own, scale in zip(per_head, (q_scale, k_scale, v_scale), strict=True))
            ),
            place=Place(out, lse, dtype),
        )
        return results if return_lse else results[0]

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        return self.run(q, k, v, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)
