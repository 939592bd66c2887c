"""All that is fixed when a kernel of attention is compiled: tile, types, parts of a head, which options there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

TYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}
SMALLEST = 16  # that a product takes


@dataclass(frozen=True)
class Part:
    """How the numbers of a head are cut into the two parts that products take, each a power of two wide.

    192 is 128 and 64, 96 is 64 and 32: less work than padding it to the next power of two. layout "plain": the first
    and the rest. "bytes": int4, the low and the high halves of bytes; "turns": what meets these, every second number.
    """

    count: int  # stored in a head
    width_0: int
    width_1: int
    layout: str = "plain"
    format: str = ""

    @property
    def two(self) -> bool:
        return self.width_1 > 0

    @property
    def even_0(self) -> bool:
        return self.width_0 * (2 if self.layout == "turns" else 1) <= self.count

    @property
    def even_1(self) -> bool:
        return self.even_0 if self.layout == "turns" else self.width_0 + self.width_1 <= self.count

    @property
    def width(self) -> int:
        return self.width_0 + self.width_1


def part_of(dim: int, format: str = "", layout: str = "plain") -> Part:
    """A head of so many stored numbers: with the layout "bytes" two elements each."""
    if layout != "plain":
        half = max(SMALLEST, triton.next_power_of_2(dim if layout == "bytes" else dim // 2))
        return Part(dim, half, half, layout, format)
    whole = max(SMALLEST, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(SMALLEST, triton.next_power_of_2(max(dim - first, 1)))
    return Part(dim, whole, 0, layout, format) if second >= first else Part(dim, first, second, layout, format)


@dataclass(frozen=True)
class Form:
    """See above. natural: scores are scaled before the softmax, since something is added to them or caps them."""

    query_part: Part
    key_part: Part
    value_part: Part
    out_part: Part
    rows: int
    keys: int
    score_type: Any  # of Triton, that scores are multiplied in
    value_type: Any  # and weighted values
    loaded_value: Any
    precision: str
    packed: int = 1
    top_left: bool = False
    has_left: bool = False
    has_right: bool = False
    capped: bool = False
    natural: bool = False
    masked: str = ""  # "bits" or "float"
    mask_rows: int = 1
    mask_columns: int = 1
    padded: int = 64  # rows of the tiles that totals lie in, no two requests in one
    wide: bool = False  # rows of a tile may lie farther apart than 32 bits count
