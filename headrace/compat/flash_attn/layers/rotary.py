"""Rotary embedding as FlashAttention applies it: pairs of elements turned by tables of cosines and sines.

from flash_attn.layers.rotary import apply_rotary_emb                      # before
from headrace.compat.flash_attn.layers.rotary import apply_rotary_emb      # after
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.compat.flash_attn.translation import request_of_rows

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_torch"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x [batch, tokens, heads, dim], or [tokens, heads, dim] with cu_seqlens, its first rotary_dim elements rotated.

    cos, sin: [places, rotary_dim / 2]; token i of a sequence is at place i + seqlen_offsets, an int or [batch].
    Pairs are (2i, 2i + 1) when interleaved, else (i, i + rotary_dim / 2). inplace: x is written to, and returned.
    """
    if cu_seqlens is None:
        offsets = seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
        places = torch.arange(x.shape[1]) + offsets
    else:
        request = request_of_rows(cu_seqlens, len(x))
        offsets = seqlen_offsets[request] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
        places = torch.arange(len(x)) - cu_seqlens[request] + offsets
    rotated = turned(x, cos[places.long()], sin[places.long()], interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [batch, tokens, heads, dim] rotated by cos and sin [tokens, pairs] or [batch, tokens, pairs]."""
    return turned(x, cos, sin, interleaved)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [.., heads, dim], the same of each token's heads rotated by its cos and sin [.., pairs]; float32 at least."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    rotary_dim = 2 * cos.shape[-1]
    pairs, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    both = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    return torch.cat([joined.to(x.dtype), rest], -1)
