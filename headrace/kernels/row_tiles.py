"""Tiles of query rows and the units of keys each of them sees: what GPU kernels divide among their workers.

The query rows of a request that share a KV head lie one behind the other, token by token, the heads of the group
fastest: row x is token x // group and head x % group of it. A tile is `rows` of them. Where tile numbers must follow
from shapes alone, and requests from tile numbers without a list, request r has tiles

    query_starts[r] * group // rows + r   ..   the first of request r + 1

which are never too few and at most one too many: tiles without rows have no work. All is integers, and
kernels/triton/schedule.py says the same on the device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowTiling:
    """How rows become tiles. left, right: keys seen before and behind a query's own; -1: no bound."""

    group: int
    rows: int
    unit_keys: int
    left: int = -1
    right: int = -1
    top_left: bool = False

    def num_tiles(self, num_tokens: int, num_requests: int) -> int:
        """All there can be, by shapes alone."""
        return num_tokens * self.group // self.rows + num_requests


@dataclass(frozen=True)
class RowTile:
    """One tile that has rows: whose it is, its first row there, its keys [begin, end) and the units that hold them."""

    number: int
    request: int
    first_row: int
    begin: int
    end: int
    first_unit: int
    num_units: int


def row_tiles(query_starts: Sequence[int], key_lens: Sequence[int], tiling: RowTiling) -> list[RowTile]:
    """The tiles that have rows, in the order of their numbers."""
    group, rows = tiling.group, tiling.rows
    firsts = [start * group // rows + r for r, start in enumerate(query_starts[:-1])]
    found = []
    for number in range(tiling.num_tiles(query_starts[-1], len(key_lens))):
        request = bisect_right(firsts, number) - 1
        first_row = (number - firsts[request]) * rows
        if first_row < (query_starts[request + 1] - query_starts[request]) * group:
            num_tokens = query_starts[request + 1] - query_starts[request]
            found.append(_row_tile(number, request, first_row, num_tokens, key_lens[request], tiling))
    return found


def _row_tile(number: int, request: int, first_row: int, num_tokens: int, num_keys: int, tiling: RowTiling) -> RowTile:
    own = 0 if tiling.top_left else num_keys - num_tokens
    last_row = min(first_row + tiling.rows, num_tokens * tiling.group) - 1
    begin, end = 0, num_keys
    if tiling.left >= 0:
        begin = max(own + first_row // tiling.group - tiling.left, 0)
    if tiling.right >= 0:
        end = min(own + last_row // tiling.group + tiling.right + 1, num_keys)
    first_unit = begin // tiling.unit_keys
    num_units = -(-end // tiling.unit_keys) - first_unit if end > begin else 0
    return RowTile(number, request, first_row, begin, end, first_unit, num_units)
