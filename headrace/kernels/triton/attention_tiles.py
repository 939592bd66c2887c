"""Tile sizes of attention for each chip.

A tile of rows walks the keys in tiles. Both are as large as registers and shared memory of a chip allow: the sums of a
tile take rows x value_dim floats of registers, its scores rows x keys, and each stage of the pipeline keys x
(head_dim + value_dim) numbers of shared memory. docs/kernels/attention_gpu.md has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from headrace.kernels.chips import LITTLE_MEMORY
from headrace.kernels.triton import launch

INTERPRETER = "interpreter"
CONVERTS_FLOAT8 = ("sm_90", "sm_100")  # float8_e4m3fn, in hardware
MOST_KEYS_WITH_EXTRAS = 64
FEW_ROWS = 16  # up to so many rows of a KV head are one tile of 16


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, warps that share it, stages of its pipeline."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# Forward. Bits of what is multiplied, then the width of a head up to: 64, 128, 256, more.
FORWARD = {
    "sm_80": {
        16: (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        32: (Tile(64, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
    },
    "sm_90": {
        16: (Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 16, 8, 2)),
        32: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
    },
    "sm_100": {
        16: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
        32: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
    },
    "gfx942": {
        16: (Tile(128, 64, 4, 1), Tile(128, 32, 4, 1), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
        32: (Tile(64, 32, 4, 1), Tile(64, 16, 4, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
}
# Gradients of keys and values: the sums of a tile of keys stay, rows pass.
KEY_GRADIENTS = {
    "sm_80": {
        16: (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 4, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "sm_90": {
        16: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "sm_100": {
        16: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "gfx942": {
        16: (Tile(32, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
}
# Gradients of queries: those of a tile of rows stay, keys pass.
QUERY_GRADIENTS = {
    "sm_80": {
        16: (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 4, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "sm_90": {
        16: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "sm_100": {
        16: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "gfx942": {
        16: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
}
# Both from the same walk of rows past a tile of keys: the queries' are added up in memory, by the copy engine.
SUMMED_GRADIENTS = {
    "sm_90": {
        16: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    "sm_100": {
        16: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        32: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
}
# Few rows: bound by reading keys, so many of them are under way at a time.
FEW = {
    16: (Tile(FEW_ROWS, 128, 4, 3), Tile(FEW_ROWS, 64, 4, 3), Tile(FEW_ROWS, 32, 4, 2), Tile(FEW_ROWS, 16, 4, 2)),
    32: (Tile(FEW_ROWS, 64, 4, 2), Tile(FEW_ROWS, 32, 4, 2), Tile(FEW_ROWS, 16, 4, 2), Tile(FEW_ROWS, 16, 8, 1)),
}
# In the interpreter small ones: a case of a hundred keys then has tiles that are seen whole, in part and not at all.
INTERPRETED_TILE, INTERPRETED_FEW = Tile(64, 32, 4, 1), Tile(FEW_ROWS, 64, 4, 1)


def tile_of(table: Any, chip: str, bits: int, width: int, *, few: bool = False, extra: bool = False) -> Tile:
    """The tile for heads of that width. extra: caps, distances, masks or codes, which take registers."""
    if chip == INTERPRETER:
        return INTERPRETED_FEW if few else INTERPRETED_TILE
    number = next((i for i, most in enumerate((64, 128, 256)) if width <= most), 3)
    found = FEW[bits] if few else table["sm_80" if chip == LITTLE_MEMORY else chip][bits]
    one: Tile = found[number]
    if chip == LITTLE_MEMORY:
        one = replace(one, num_stages=min(one.num_stages, 2))
    most = MOST_KEYS_WITH_EXTRAS // 2 if table is QUERY_GRADIENTS else MOST_KEYS_WITH_EXTRAS
    if extra and one.keys > most and not few:
        walked = table is KEY_GRADIENTS or table is SUMMED_GRADIENTS
        one = Tile(32, most, 4, one.num_stages) if walked else replace(one, keys=most, num_warps=8)
    if few and chip == "gfx942":
        return Tile(one.rows, min(one.keys, 32), one.num_warps, 1)
    return one


def chip_of(tensor: torch.Tensor) -> str:
    """Whose table a tensor's device goes by."""
    return launch.chip_of(tensor, INTERPRETER)
