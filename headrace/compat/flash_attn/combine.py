"""What FlashAttention 3 has beside attention: parts over split keys combined, and a plan for a GPU's scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace import ops


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """out [.., heads, dim] and lse [.., heads] over all keys, of those over parts of them.

    out_partial: float32 [parts, .., heads, dim]; lse_partial: float32 [parts, .., heads], natural, -inf where a part
    saw no key. out is written to when given; else it is of out_dtype, by default out_partial's.
    """
    parts = [(part.contiguous(), lse.contiguous()) for part, lse in zip(out_partial, lse_partial, strict=True)]
    dtype = out_dtype or (out_partial.dtype if out is None else out.dtype)
    found = ops.merge_attention(parts, out_dtype=str(dtype).removeprefix("torch."))
    return found.out if out is None else out.copy_(found.out), found.lse


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """int32 [batch_size + 1] of zeros: taken as scheduler_metadata, where it has no effect."""
    return torch.zeros(batch_size + 1, dtype=torch.int32)
