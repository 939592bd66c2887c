"""What is compiled of Hopper's attention: shapes, options, tile sizes, from the arrays of a call.

Nothing is read of the arrays but shapes: the same form serves any lengths, starts and strides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TILE_ROWS = 128
FARTHEST = 1 << 29  # a window beyond it is none
# Sizes of keys and of values, with the keys of a tile: two places of each, and the queries, fill shared memory.
TILE_KEYS = {(64, 64): 128, (128, 128): 128, (192, 128): 128, (256, 256): 64}
_MOST_PACKED = 64  # rows of a warpgroup
_WORTH = 0.9  # packed heads take so many of the tiles at most


@dataclass(frozen=True)
class Form:
    """A configuration. packed: heads of a KV head that are rows of one tile. part: columns of keys that are copied and
    multiplied at a time."""

    head_dim: int
    value_dim: int
    keys: int
    part: int
    packed: int = 1
    ragged: bool = False
    has_lens: bool = False
    top_left: bool = False
    has_left: bool = False
    capped: bool = False
    sloped: bool = False
    has_sinks: bool = False

    def words(self) -> str:
        """For people: sizes, then what is not plain."""
        dims = f"d{self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        named = {
            "ragged": self.ragged,
            "lens": self.has_lens and not self.ragged,
            f"packed {self.packed}": self.packed > 1,
            "window": self.has_left,
            "cap": self.capped,
            "slopes": self.sloped,
            "sinks": self.has_sinks,
        }
        return " ".join([dims, *(word for word, given in named.items() if given)])


def form_with(head_dim: int, **options: Any) -> Form:
    """That of heads of this size."""
    [dims] = [each for each in TILE_KEYS if each[0] == head_dim]
    return Form(*dims, keys=TILE_KEYS[dims], part=64 if head_dim == 192 else head_dim, **options)


def form_of(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Form:
    """Of a checked call."""
    return form_with(
        arrays["query"].shape[-1],
        packed=packed_heads(arrays),
        ragged="query_starts" in arrays,
        has_lens="key_lens" in arrays,
        top_left=bool(options["top_left"]),
        has_left=0 <= options["window_left"] < FARTHEST,
        capped=options["softcap"] > 0,
        sloped="alibi_slopes" in arrays,
        has_sinks="sinks" in arrays,
    )


def packed_heads(arrays: Mapping[str, Any]) -> int:
    """1, or all the heads of a KV head that boxes can hold, where that fills tiles better.

    Ragged: always, whose requests may have any length; so the spare tile of each is one of many heads.
    """
    query, kv_heads = arrays["query"], arrays["key"].shape[-2]
    group = query.shape[-2] // kv_heads
    packed = min(group & -group, _MOST_PACKED)
    if query.dim() == 3:
        return packed
    tokens = query.shape[1]
    tiles, fewer = -(-tokens // TILE_ROWS), -(-tokens * packed // TILE_ROWS) / packed
    return packed if fewer <= _WORTH * tiles else 1


def row_tiles(form: Form, query_shape: tuple[int, ...], requests: int) -> int:
    """Tiles of rows of a batch element, or as many as ragged requests of any lengths may have."""
    rows = math.prod(query_shape[-3:-2]) * form.packed
    return rows // TILE_ROWS + requests if form.ragged else -(-rows // TILE_ROWS)
