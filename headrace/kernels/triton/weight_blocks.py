"""Blocks of GGUF formats taken apart in torch, on any device: codes as bytes, scales and minimums as they are stored.

What the fields of a block mean is said in ops/formats.py; here are their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Columns and bytes of a block.
BLOCKS: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
FLOATS: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Parts:
    """The fields of n blocks: codes uint8 [n, columns], scales and minimums float16 [n, 1], groups uint8 [n, any]."""

    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    groups_high: torch.Tensor | None = None


def parts_of(blocks: torch.Tensor, name: str) -> Parts:
    """The fields of blocks uint8 [n, bytes] of a format that is no float."""
    return _PARTS[name](blocks)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _planes(packed: torch.Tensor, plane_len: int, bits: int) -> torch.Tensor:
    """uint8 [n, bytes] -> [n, bytes * 8 // bits]: each run of plane_len bytes is 8 // bits planes of elements."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    runs = packed.reshape(len(packed), -1, 1, plane_len)
    return ((runs >> shifts) & (2**bits - 1)).reshape(len(packed), -1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4] -> [n, 32]: bit j of the little-endian word, moved to the value 16, belongs to element j."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed[:, :, None] >> shifts) & 1) << 4).reshape(len(packed), 32)


def _pairs(nibbles: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, m] of so few bits each -> [n, m * bits // 8], the first in the lowest bits."""
    per_byte = 8 // bits
    runs = nibbles.reshape(len(nibbles), -1, per_byte)
    packed = runs[:, :, 0].clone()
    for place in range(1, per_byte):
        packed |= runs[:, :, place] << (place * bits)
    return packed


def _q4_0(b: torch.Tensor) -> Parts:
    return Parts(_planes(b[:, 2:18], 16, 4), _half(b, 0))


def _q4_1(b: torch.Tensor) -> Parts:
    return Parts(_planes(b[:, 4:20], 16, 4), _half(b, 0), _half(b, 2))


def _q5_0(b: torch.Tensor) -> Parts:
    return Parts(_planes(b[:, 6:22], 16, 4) | _fifth_bits(b[:, 2:6]), _half(b, 0))


def _q5_1(b: torch.Tensor) -> Parts:
    return Parts(_planes(b[:, 8:24], 16, 4) | _fifth_bits(b[:, 4:8]), _half(b, 0), _half(b, 2))


def _q8_0(b: torch.Tensor) -> Parts:
    return Parts(b[:, 2:34] ^ 128, _half(b, 0))


def _q2_k(b: torch.Tensor) -> Parts:
    return Parts(_planes(b[:, 16:80], 32, 2), _half(b, 80), _half(b, 82), b[:, 0:16])


def _q3_k(b: torch.Tensor) -> Parts:
    codes = _planes(b[:, 32:96], 32, 2) | (_planes(b[:, 0:32], 32, 1) << 2)
    low, high = _planes(b[:, 96:104], 8, 4), _planes(b[:, 104:108], 4, 2)
    return Parts(codes, _half(b, 108), None, _pairs(low, 4), _pairs(high, 2))


def _six_pairs(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 12 bytes that hold eight 6-bit scales and minimums -> nibbles of both per group, and their upper bits."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], 1)
    minimums = torch.cat([second & 63, (rest >> 4) | (second >> 6 << 4)], 1)
    nibbles = (scales & 15) | ((minimums & 15) << 4)
    return nibbles, _pairs((scales >> 4) | (minimums >> 4 << 2), 4)


def _q4_k(b: torch.Tensor) -> Parts:
    return Parts(_planes(b[:, 16:144], 32, 4), _half(b, 0), _half(b, 2), *_six_pairs(b))


def _q5_k(b: torch.Tensor) -> Parts:
    codes = _planes(b[:, 48:176], 32, 4) | (_planes(b[:, 16:48], 32, 1) << 4)
    return Parts(codes, _half(b, 0), _half(b, 2), *_six_pairs(b))


def _q6_k(b: torch.Tensor) -> Parts:
    codes = _planes(b[:, 0:128], 64, 4) | (_planes(b[:, 128:192], 32, 2) << 4)
    return Parts(codes, _half(b, 208), None, b[:, 192:208])


def _iq4_nl(b: torch.Tensor) -> Parts:
    return Parts(_planes(b[:, 2:18], 16, 4), _half(b, 0))


def _iq4_xs(b: torch.Tensor) -> Parts:
    # Their order in the file is that of the groups: two nibbles to a byte, four pairs of bits to a byte.
    return Parts(_planes(b[:, 8:136], 16, 4), _half(b, 0), None, b[:, 4:8], b[:, 2:4])


_PARTS: dict[str, Callable[[torch.Tensor], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
