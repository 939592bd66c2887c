"""Attention of one request over keys and values in one array, in decode and in prefill."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.attend import Place, Scale, Scales, Variant, attend
from headrace.compat.flashinfer.batch import single_batch
from headrace.compat.flashinfer.layout import token_major
from headrace.compat.flashinfer.workspace import refuse


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Any:
    """out [heads, value_dim] of q [heads, head_dim], with return_lse also the base-2 log-sum-exp [heads].

    k and v: [keys, kv_heads, dim], with "HND" [kv_heads, keys, dim].
    """
    variant = Variant(
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
    )
    keys, values = token_major(k, kv_layout), token_major(v, kv_layout)
    out, lse = attend(
        q[None], (keys, values), single_batch(1, len(keys)), variant, scales=Scales(q_scale, k_scale, v_scale)
    )
    return (out[0], lse[0]) if return_lse else out[0]


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Any:
    """out [queries, heads, value_dim] of q [queries, heads, head_dim], with return_lse also lse [queries, heads].

    Causal is aligned at the bottom right, and off with a mask: bool [queries, keys], or its bits, lowest first.
    scale_q [heads], scale_k and scale_v [kv_heads]: of float8 queries, keys and values, head by head.
    """
    refuse(kv_cache_sf=kv_cache_sf)
    keys, values = token_major(k, kv_layout), token_major(v, kv_layout)
    batch = single_batch(len(q), len(keys)).masked(custom_mask, packed_custom_mask)
    variant = Variant(
        causal=causal and custom_mask is None and packed_custom_mask is None,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
    )
    scales = Scales(scale_q, both(scale_k, k_scale), both(scale_v, v_scale))
    out, lse = attend(q, (keys, values), batch, variant, scales=scales, place=Place(dtype=o_dtype))
    return (out, lse) if return_lse else out


def both(per_head: Scale, of_all: Scale) -> Scale:
    """The product of two scales, each of which there may be none."""
    if per_head is None or of_all is None:
        return of_all if per_head is None else per_head
    return per_head * of_all


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)
