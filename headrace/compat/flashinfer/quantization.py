"""Bits packed into bytes, as flashinfer.quantization has them: masks of custom attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["packbits", "segment_packbits"]


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """Eight elements of x [n] a byte, uint8 [ceil(n / 8)]; the first its highest bit ("big") or lowest ("little")."""
    whole = torch.zeros(-(-x.numel() // 8) * 8, dtype=torch.uint8)
    whole[: x.numel()] = x.reshape(-1).bool()
    return (whole.view(-1, 8) * _weights(bitorder)).sum(1, dtype=torch.uint8)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """x[indptr[i] : indptr[i + 1]] packed, each beginning a byte of its own; the bytes and where each begins."""
    bounds = indptr.tolist()
    parts = [packbits(x[begin:end], bitorder) for begin, end in pairwise(bounds)]
    starts = torch.zeros(len(bounds), dtype=torch.int32)
    starts[1:] = torch.tensor([len(part) for part in parts]).cumsum(0)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8), starts


def unpacked_segments(packed: Tensor, counts: Sequence[int]) -> Tensor:
    """The bits of segments of these lengths, bool [sum of counts], lowest bit first.

    Segments begin a byte of their own, as segment_packbits writes them; where the bytes are fewer, they follow each
    other bit by bit, as packbits writes them.
    """
    bits = ((packed.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()
    lens = [-(-count // 8) * 8 for count in counts]
    if bits.numel() < sum(lens):
        if bits.numel() < sum(counts):
            raise ValueError(f"packed_custom_mask: expected {sum(lens) // 8} bytes, got {packed.numel()}")
        return bits[: sum(counts)]
    segments = bits[: sum(lens)].split(lens)
    return torch.cat([own[:count] for own, count in zip(segments, counts, strict=True)]) if lens else bits[:0]


def _weights(bitorder: str) -> Tensor:
    if bitorder not in ("big", "little"):
        raise ValueError(f"bitorder: expected 'big' or 'little', got {bitorder!r}")
    places = torch.arange(8)
    return (1 << (places if bitorder == "little" else 7 - places)).to(torch.uint8)
