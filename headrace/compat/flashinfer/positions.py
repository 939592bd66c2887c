"""Positions inside attention as the library has them: rotation of queries and keys (ROPE_LLAMA), and ALiBi.

A request's queries stand at its last keys: query i of n at key_len - n + i. Rotated are halves of a head, in float32.
ALiBi adds slope * (j - i) to the score of query i and key j, both counted from 0: beside -slope * |distance| that is
slope * (key_len - n) more for every key up to a query's own, which the output does not see and the log-sum-exp does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.compat.flashinfer.batch import Batch, places

MODES = ("NONE", "ROPE_LLAMA", "ALIBI")


def checked_mode(pos_encoding_mode: str) -> str:
    """The mode; KeyError, as the library has it, for another word."""
    if pos_encoding_mode not in MODES:
        raise KeyError(f"pos_encoding_mode: expected one of {', '.join(MODES)}, got {pos_encoding_mode!r}")
    return pos_encoding_mode


def query_positions(batch: Batch) -> Tensor:
    """Where each token stands among its request's keys, int64 [tokens]."""
    owner, place = places(batch.query_lens)
    return place + (batch.key_lens - batch.query_lens).long()[owner]


def key_positions(batch: Batch) -> Tensor:
    """The same of keys one after the other."""
    return places(batch.key_lens)[1]


def frequencies(dim: int, rope_theta: float, rope_scale: float) -> Tensor:
    """Radians a position for each pair, float64 [dim / 2]."""
    return rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) / rope_scale


def rotated(array: Tensor, cos: Tensor, sin: Tensor, *, interleave: bool = False) -> Tensor:
    """[tokens, heads, dim] with its first elements turned by angles [tokens, rotary_dim / 2]; float32 at least.

    Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) when interleaved.
    """
    wide = array.to(torch.promote_types(array.dtype, torch.float32))
    cos, sin = (table[:, None].to(wide.dtype) for table in (cos, sin))
    rotary_dim = 2 * cos.shape[-1]
    turning, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
    shape = (-1, 2) if interleave else (2, -1)
    first, second = turning.unflatten(-1, shape).unbind(-1 if interleave else -2)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1 if interleave else -2)
    return torch.cat([turned.flatten(-2), rest], dim=-1)


def llama_rotated(array: Tensor, positions: Tensor, rope_theta: float, rope_scale: float) -> Tensor:
    """[tokens, heads, dim] turned by its positions, all of each head."""
    angles = positions.double()[:, None] * frequencies(array.shape[-1], rope_theta, rope_scale)
    return rotated(array, angles.cos(), angles.sin())


@dataclass(frozen=True)
class Alibi:
    """What goes into the kernel, slopes or a mask, and what the log-sum-exp needs on top, [tokens, heads]."""

    slopes: Tensor | None
    mask: Tensor | None
    shift: Tensor


def get_alibi_slopes(n_heads: int) -> Tensor:
    """The slope of each head, float32 [heads]: powers of 2 ** (-8 / n), n a power of two; then those between."""
    nearest = 2 ** math.floor(math.log2(n_heads))
    exponents = -8.0 / nearest * torch.arange(1, nearest + 1, dtype=torch.float64)
    between = -4.0 / nearest * torch.arange(1, 2 * (n_heads - nearest) + 1, 2, dtype=torch.float64)
    return (2.0 ** torch.cat([exponents, between])).float()


def alibi_of(batch: Batch, num_heads: int, causal: bool) -> Alibi:
    """Slopes where no query sees past its own key; else all that is added, written out."""
    slopes = get_alibi_slopes(num_heads)
    owner, place = places(batch.query_lens)
    if batch.mask is None and (causal or int(batch.query_lens.max()) <= 1):
        ahead = (batch.key_lens - batch.query_lens).long()[owner]
        return Alibi(slopes, None, ahead[:, None] * slopes)
    columns = max(int(batch.key_lens.max()), 1)
    mask = slopes[:, None, None] * torch.arange(1 - columns, 1, dtype=torch.float32)
    if batch.mask is not None:
        mask = torch.where(batch.mask, mask, -torch.inf)
    ahead = batch.key_lens.long()[owner] - 1 - place
    return Alibi(None, mask, ahead[:, None] * slopes)
