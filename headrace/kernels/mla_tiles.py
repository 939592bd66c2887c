"""Sizes of the latent attention kernel: tiles by chip and type, how work is divided, memory of partial results.

Plain integers, without torch and triton: what the kernel is launched with and what explain says is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.kernels.chips import LITTLE_MEMORY

# The schedule's (schedule.py), in what 16 keys take: a segment begins with the time of 128, and has 256 at least.
OVERHEAD, SNAP, LEAST = 8, 4, 16
# Of a part in the batch-invariant mode: a partial result of 64 rows is 3 % of the bytes of so many latents.
INVARIANT_KEYS = 4096
MOST_KEYS = 1 << 30  # of a request; in the kernel they are counted in 32 bits
MOST_WIDTH = 576  # of a row in a tile: the largest one fills the shared memory of a multiprocessor
MOST_WORKSPACE_BYTES = 1 << 30  # only the batch-invariant mode with room for very many keys comes near
# From so many items for each worker on they are not cut, unless a request may have more keys than these for each item:
# one request of 128 k keys beside a prompt would keep a worker busy when all others are done.
_MANY_ITEMS, _KEYS_OF_ITEM = 4, 32


@dataclass(frozen=True)
class Tile:
    """rows of queries x keys; keys_first: the products are turned, keys are the rows of the tensor core's tile."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    keys_first: bool = False


# By chip and kind of latents, from few rows to many. "codes": of a byte or less; "wide": products of float32.
TILES: Mapping[tuple[str, str], tuple[Tile, ...]] = {
    ("sm_90", "plain"): (Tile(16, 32, 4, 5), Tile(32, 64, 8, 2, True), Tile(64, 64, 8, 2)),
    ("sm_90", "codes"): (Tile(16, 32, 4, 3), Tile(64, 32, 8, 2)),
    ("sm_90", "wide"): (Tile(16, 16, 8, 2),),
    ("sm_80", "plain"): (Tile(16, 32, 4, 3),),
    ("sm_80", "codes"): (Tile(16, 32, 8, 3),),
    ("sm_80", "wide"): (Tile(16, 16, 8, 1),),
    ("gfx942", "plain"): (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
    ("gfx942", "codes"): (Tile(16, 32, 4, 1),),
    ("gfx942", "wide"): (Tile(16, 16, 8, 1),),
}
# NOTE: of tcgen05, which has its sums in memory of its own, the compiler makes a tile of 64 x 512 that does not fit.
_ALIKE = {"sm_100": "sm_80", LITTLE_MEMORY: "sm_80"}
WIDE_COLUMNS = 64


@dataclass(frozen=True)
class Division:
    """How a call is cut. members: tiles of an item, side by side. workers: groups of programs with an interval each; 0:
    programs are items, or, unit_tiles at a time, `units` of their keys."""

    tile: Tile
    members: int
    items: int  # there is room for
    workers: int
    unit_tiles: int
    units: int

    @property
    def grid(self) -> tuple[int, int]:
        return (self.workers or self.items) * self.members, self.units

    @property
    def slots(self) -> int:
        """Places for partial results of an item's rows."""
        if self.workers:
            return 2 * (self.workers - 1)
        return self.items * self.units if self.units > 1 else 0

    def partial_floats(self, value_dim: int) -> tuple[int, int]:
        """Sums of values, and what goes with them."""
        rows = self.slots * self.members * self.tile.rows
        return rows * block_of(value_dim), rows * 2

    def workspace_bytes(self, value_dim: int) -> int:
        return 4 * sum(self.partial_floats(value_dim)) + 8 * self.items


def width_of(value_dim: int, rest: int) -> int:
    """What a row takes in a tile, its values and what follows them each as a power of two."""
    return block_of(value_dim) + (block_of(rest) if rest else 0)


def merge_cost(rows: int) -> int:
    """Of a part of so many rows, written and read again, in the schedule's unit."""
    return max(rows // 8, 2)


def block_of(dim: int) -> int:
    """The width that so many numbers take in a tile."""
    return max(16, 1 << (dim - 1).bit_length())


def tile_for(chip: str, kind: str, rows: int) -> Tile:
    """The smallest tile with room for so many rows, or the largest."""
    tiles = TILES[_ALIKE.get(chip, chip), kind]
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


def division(
    tokens: int,
    requests: int,
    heads: int,
    capacity: int,
    *,
    chip: str,
    kind: str,
    multiprocessors: int,
    invariant: bool,
) -> Division:
    """How so many query tokens of so many requests are cut. capacity: keys a request may have.

    invariant: neither tiles nor parts depend on what else is in the batch.
    """
    each = heads if invariant else heads * max(1, tokens // max(requests, 1))
    tile = tile_for(chip, kind, each)
    members = -(-heads // tile.rows)
    rows = tile.rows * members
    items = tokens * heads // rows + requests
    if invariant:
        return Division(tile, members, items, 0, INVARIANT_KEYS // tile.keys, max(1, -(-capacity // INVARIANT_KEYS)))
    workers = max(1, multiprocessors // members)
    if max(requests, -(-tokens * heads // rows)) >= max(_MANY_ITEMS * workers, capacity // _KEYS_OF_ITEM):
        return Division(tile, members, items, 0, MOST_KEYS // tile.keys, 1)
    return Division(tile, members, items, workers, 1, 1)


def kind_of(query: str, key: str, precision: str) -> tuple[str, str]:
    """The kind of latents, and the type that products are computed in."""
    codes = key in ("float8_e4m3fn", "int8", "uint8")
    alike = query != "float32" and (codes or query == key)
    if precision == "exact" or key == "float32" or (precision == "auto" and not alike):
        return "wide", "float32"
    return "codes" if codes else "plain", query if alike else "bfloat16"


def float32_products(device: str, precision: str) -> str:
    """How products of float32 are computed on NVIDIA's GPUs ("cuda") and others."""
    if device != "cuda":
        return "ieee"
    return "tf32" if precision == "fast" else "tf32x3"
