"""Tile sizes, stages and workers of paged attention on each GPU, and the bytes its partial results take.

No Triton here, so that a plan can be told where there is none. The rows of a tile follow from how many there are; its
keys are as many as make `TILE_BYTES`; the stages fill the shared memory that a worker has, so that at least 40 KB are
on their way to each multiprocessor. None of it was measured yet: `headrace bench gpu` will.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.kernels.schedule import paired_slots

TILE_BYTES = 32768  # of keys and values together
# What one worker may take of a multiprocessor's shared memory, for as many workers as stand beside it. "sm_86" is every
# NVIDIA chip of small memory, of consumers' cards too.
SHARED_OF_WORKER = {
    "sm_80": (81920, 2),
    "sm_86": (49152, 2),
    "sm_90": (114688, 2),
    "sm_100": (114688, 2),
    "gfx942": (65536, 1),
}
WIDEST = {
    "sm_80": (163840, 1),
    "sm_86": (98304, 1),
    "sm_90": (229376, 1),
    "sm_100": (229376, 1),
    "gfx942": (65536, 1),
}
# Batch-invariant: rows of a tile and keys of a chunk, the same whatever else is in the batch.
INVARIANT_ROWS, INVARIANT_KEYS = 32, 512
LEAST_ROWS, MOST_ROWS = 16, 128


@dataclass(frozen=True)
class Heads:
    """What tiles depend on. wide: products of float32. key_bits: of an element of keys and values in the pages."""

    group: int
    head_dim: int
    value_dim: int
    key_bits: int
    wide: bool = False

    @property
    def key_blocks(self) -> tuple[int, int]:
        """The head dimension as a power of two and the rest, if that is less than the next power of two; else 0."""
        whole = max(_power(self.head_dim), 16)
        part = whole // 2
        rest = max(_power(self.head_dim - part), 16)
        return (part, rest) if whole > 128 and part + rest < whole else (whole, 0)

    @property
    def value_block(self) -> int:
        return max(_power(self.value_dim), 16)

    @property
    def key_bytes(self) -> int:
        """Of a key and its value in shared memory."""
        return (sum(self.key_blocks) + self.value_block) * self.key_bits // 8


@dataclass(frozen=True)
class PagedTile:
    """A configuration. chunk: tiles of keys in a unit of the schedule, more than one in batch-invariant mode.

    weight, overhead, merge_cost, snap, least: the schedule's, in quarters of what a tile of keys takes.
    """

    rows: int
    keys: int
    chunk: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int
    merge_cost: int
    overhead: int = 4
    snap: int = 4

    @property
    def weight(self) -> int:
        return 4 * self.chunk

    @property
    def least(self) -> int:
        return max(16, self.weight)

    @property
    def unit_keys(self) -> int:
        return self.keys * self.chunk


def paged_tile(
    heads: Heads, num_tokens: int, num_requests: int, *, invariant: bool, chip: str, masked: bool = False
) -> PagedTile:
    """The configuration for so many query tokens of so many requests. masked: with a mask beside the keys."""
    rows = _rows_of(heads, num_tokens, num_requests, invariant)
    keys = min(max(_power(TILE_BYTES // heads.key_bytes + 1) // 2, 16), 128)
    if rows >= 32 or heads.key_bits < 16 or masked:
        # As compiled: more scores than these take registers that are not there.
        keys = min(keys, 64)
    tile_bytes = keys * heads.key_bytes
    shared, beside = SHARED_OF_WORKER[chip]
    if rows >= 64 or 2 * tile_bytes > shared:
        shared, beside = WIDEST[chip]
    query_bytes = rows * sum(heads.key_blocks) * (4 if heads.wide else 2)
    # A stage more than there are tiles in memory, beside the queries and what changes its layout through memory.
    beside_them = query_bytes + (20480 if heads.wide else 8192)
    staged = tile_bytes + (4 * rows * keys if masked else 0)
    stages = min(max((shared - beside_them) // staged + 1, 2), 4)
    if chip == "gfx942" and heads.key_bits < 16:
        # NOTE: its compiler (Triton 3.6) fails on pipelined loads of scales.
        stages = 1
    chunk = max(INVARIANT_KEYS // keys, 1) if invariant else 1
    merge_cost = max(8 * 4 * rows * heads.value_block // tile_bytes, 2)
    warps = 8 if rows == MOST_ROWS else 4
    return PagedTile(rows, keys, chunk, warps, stages, beside, merge_cost)


def _rows_of(heads: Heads, num_tokens: int, num_requests: int, invariant: bool) -> int:
    most = MOST_ROWS
    if heads.wide or heads.value_block > 128 or heads.head_dim > 128:
        most = 64 if heads.value_block <= 256 and not heads.wide else 32
    if heads.value_block > 256 or (heads.wide and heads.value_block > 128):
        most = LEAST_ROWS
    if invariant:
        return min(INVARIANT_ROWS, most)
    mean = -(-num_tokens // max(num_requests, 1)) * heads.group
    return min(max(_power(mean), LEAST_ROWS), most)


def slots_of(tile: PagedTile, *, workers: int, num_items: int, most_keys: int, invariant: bool) -> int:
    """Partial results there is room for: two of a worker but the last, or all units of items that may be cut."""
    if not invariant:
        return paired_slots(workers)
    return min(max(workers - 1, 0), num_items) * units_of(tile, most_keys)


def units_of(tile: PagedTile, most_keys: int) -> int:
    """The most units an item can have."""
    return -(-most_keys // tile.unit_keys)


def workspace_bytes(tile: PagedTile, heads: Heads, slots: int) -> int:
    """Of the partial results: a float32 row of values, its largest score and its sum, for each row of a slot."""
    return 4 * slots * tile.rows * (heads.value_block + 2)


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
