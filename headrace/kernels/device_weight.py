"""A weight on a GPU: its tensors, and the words that say how their bits are laid out.

Codes of few bits lie in 32-bit words. A *span* is a run of `words` words, and its columns are dealt out in *parts*:
part p of word w is column p * words + w of the span. So four words, which is what a thread loads at once, hold four
neighbouring columns of each part, and where `words` is a quarter of a group (at most 32) four parts are one group: a
scale is fetched once for sixteen codes of a thread. These four are the bytes of a word, for dot products of bytes: part
4 g + i lies in byte i, from its bit g * low_bits on, and one shift and one mask give all four (`low_bit`). A fifth,
sixth or third bit is kept apart: one number per word (`high`) holds those of all its parts, each where few operations
bring it into the right byte (`high_bit`).

    values    float: the numbers themselves; integer: code - offset; fp8: e4m3; iq4: a table of sixteen
    scales    none; row: one per row; group: one per `group_len` columns (of `scale_rows` rows);
              byte, nibbles, six, six_pair: one per 256 columns times a small integer per group, which is a signed byte;
              a nibble beside that of the minimum; 6 bits (nibbles and upper pairs of bits apart), less 32;
              6 bits beside the 6 of the minimum
    minimums  none; added: one per group; zero: zero points, subtracted from codes; group: like the scales, subtracted

Nothing is widened: each format takes the bits it takes in a file. Rows are padded to whole spans with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Columns that share a scale of scales.
SUPER_LEN = 256
# Columns of a thread's 16 bytes that are neighbours.
CHUNK_WORDS = 4


@dataclass(frozen=True)
class WeightLayout:
    """What a kernel is compiled for."""

    values: str
    low_bits: int = 0
    high_bits: int = 0
    words: int = 0
    offset: int = 0
    group_len: int = 0
    scales: str = "none"
    minimums: str = "none"
    scale_rows: int = 1

    @property
    def parts(self) -> int:
        """Codes in a word; 1 where the numbers themselves are stored."""
        return 32 // self.low_bits if self.low_bits else 1

    @property
    def span(self) -> int:
        """Columns of a span."""
        return self.parts * self.words

    @property
    def bits(self) -> int:
        """Of a code; 0 where the numbers themselves are stored."""
        return self.low_bits + self.high_bits

    def low_bit(self, part: int) -> int:
        """The place of a part's lower bits in a word."""
        return part % 4 * 8 + part // 4 * self.low_bits

    def high_bit(self, part: int) -> int:
        """The place of its upper bits in their number: of 8 bits in the order of the parts; of 16 bits two parts of a
        group are in each byte, side by side, so that the number and itself, shifted, have a part in each byte."""
        if self.parts * self.high_bits == 8:
            return part
        return part % 2 * 8 + (part // 2 % 2 + part // 4 * 2) * self.high_bits


@dataclass(frozen=True)
class DeviceWeight:
    """A matrix [rows, cols] for `linear` on a GPU; its fields are torch tensors, one row per row of the matrix.

    codes: int32 words, or the numbers; high: the upper bits of codes; scales, minimums: per row, group or 256 columns;
    groups, groups_high: the integers of groups.
    """

    format: str
    shape: tuple[int, int]
    layout: WeightLayout
    codes: Any
    high: Any = None
    scales: Any = None
    minimums: Any = None
    groups: Any = None
    groups_high: Any = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Those there are."""
        fields = (self.codes, self.high, self.scales, self.minimums, self.groups, self.groups_high)
        return tuple(tensor for tensor in fields if tensor is not None)

    @property
    def num_bytes(self) -> int:
        """What a product reads of it."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def row_groups(self) -> int:
        """Groups of a row, those of padding included."""
        if self.layout.scales in ("none", "row"):
            return 0
        if self.layout.scales == "group":
            return int(self.scales.shape[-1])
        return int(self.scales.shape[-1]) * SUPER_LEN // self.layout.group_len


def words_of_span(group_len: int, low_bits: int, cols: int) -> int:
    """Words of a span: a quarter of a group; of a row without groups as many, up to 32, as its columns divide into."""
    if group_len:
        return max(CHUNK_WORDS, min(32, group_len // 4))
    parts = 32 // low_bits
    return next((words for words in (32, 16, 8) if cols % (parts * words) == 0), CHUNK_WORDS)
