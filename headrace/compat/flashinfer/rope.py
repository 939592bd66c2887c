"""Rotary positions for queries and keys outside attention, as flashinfer.rope has them, new or in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.compat.flashinfer.batch import int32, places
from headrace.compat.flashinfer.positions import frequencies, rotated

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
]


def apply_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """q and k [tokens, heads, head_dim] turned: token i of request r, of indptr, stands at offsets[r] + i."""
    positions = _positions(indptr, offsets)
    return apply_rope_pos_ids(q, k, positions, rotary_dim, interleave, rope_scale, rope_theta)


def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """apply_rope into q and k."""
    _into(q, k, apply_rope(q, k, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta))


def apply_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """q and k [tokens, heads, head_dim] turned by pos_ids [tokens], their first rotary_dim elements, all when None.

    Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) when interleaved.
    """
    turns = frequencies(rotary_dim or q.shape[-1], rope_theta, rope_scale)
    return _turned(q, k, pos_ids, turns, interleave)


def apply_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """apply_rope_pos_ids into q and k."""
    _into(q, k, apply_rope_pos_ids(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta))


def apply_llama31_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """apply_rope with the frequencies of Llama 3.1: slow ones divided by rope_scale, those between in part."""
    bends = (low_freq_factor, high_freq_factor, old_context_len)
    return apply_llama31_rope_pos_ids(
        q, k, _positions(indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta, *bends
    )


def apply_llama31_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """apply_llama31_rope into q and k."""
    bends = (low_freq_factor, high_freq_factor, old_context_len)
    _into(q, k, apply_llama31_rope(q, k, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta, *bends))


def apply_llama31_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """apply_rope_pos_ids with the frequencies of Llama 3.1."""
    plain = frequencies(rotary_dim or q.shape[-1], rope_theta, 1.0)
    turns_in_context = old_context_len * plain / (2 * math.pi)
    kept = ((turns_in_context - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return _turned(q, k, pos_ids, plain * (kept + (1 - kept) / rope_scale), interleave)


def apply_llama31_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """apply_llama31_rope_pos_ids into q and k."""
    bends = (low_freq_factor, high_freq_factor, old_context_len)
    _into(q, k, apply_llama31_rope_pos_ids(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, *bends))


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    """query and key [tokens, heads * head_size] turned; cos_sin_cache float32 [positions, cosines and then sines].

    is_neox: pairs are halves, (i, i + rotary_dim / 2); else neighbours.
    """
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(f"cos_sin_cache: expected float32, got {cos_sin_cache.dtype}")
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    found = []
    for array in (query, key):
        heads = array.reshape(len(array), -1, head_size)
        found.append(rotated(heads, cos, sin, interleave=not is_neox).to(array.dtype).reshape(array.shape))
    return found[0], found[1]


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    """apply_rope_with_cos_sin_cache into query and key."""
    _into(query, key, apply_rope_with_cos_sin_cache(positions, query, key, head_size, cos_sin_cache, is_neox))


def _positions(indptr: Tensor, offsets: Tensor) -> Tensor:
    owner, place = places(int32(indptr).diff())
    return place + int32(offsets).long()[owner]


def _turned(q: Tensor, k: Tensor, positions: Tensor, turns: Tensor, interleave: bool) -> tuple[Tensor, Tensor]:
    angles = positions.double()[:, None] * turns
    cos, sin = angles.cos(), angles.sin()
    return (
        rotated(q, cos, sin, interleave=interleave).to(q.dtype),
        rotated(k, cos, sin, interleave=interleave).to(k.dtype),
    )


def _into(q: Tensor, k: Tensor, found: tuple[Tensor, Tensor]) -> None:
    q.copy_(found[0])
    k.copy_(found[1])
