"""The schedule on the device: its host twin's intervals, every unit exactly once, slots that nobody shares."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.row_tiles import RowTiling, row_tiles
from headrace.kernels.schedule import (
    ScheduleCosts,
    Segment,
    even_boundaries,
    paired_slot,
    paired_slots,
    segments,
    stream_boundaries,
)
from headrace.kernels.triton.schedule import ScheduleSetup, intervals

MOST = 160  # segments of a worker
COSTS = {"weight": 4, "overhead": 4, "merge_cost": 2, "snap": 4, "least": 16}


def device_segments(device, query_lens, key_lens, kv_heads, setup, *, workers, left=-1, right=0):
    """What each worker finds it has: [tile, head, begin, end, interval of the first piece, pieces]."""
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=device)
    lens = torch.tensor(key_lens, dtype=torch.int32, device=device)
    sizes = {"num_tokens": sum(query_lens), "most_keys": max(key_lens), "kv_heads": kv_heads, "workers": workers}
    found = intervals(starts, lens, setup, **sizes, left=left, right=right, most=MOST)
    return [list(itertools.takewhile(lambda row: row[0] >= 0, rows.tolist())) for rows in found.cpu()]


def twin_segments(query_lens, key_lens, kv_heads, setup, *, workers, left=-1, right=0):
    """The same by the host's twin: items, how many units each has, and every interval's segments."""
    starts = [0, *itertools.accumulate(query_lens)]
    tiling = RowTiling(setup.group, setup.rows, setup.unit_keys, left, right, setup.top_left)
    tiles = row_tiles(starts, key_lens, tiling)
    items = [(tile.number, head) for tile in tiles for head in range(kv_heads)]
    counts = [tile.num_units for tile in tiles for _ in range(kv_heads)]
    costs = ScheduleCosts(setup.overhead, setup.merge_cost, workers, setup.snap)
    if setup.equal:
        boundaries = even_boundaries(counts, setup.weight, costs, setup.least)
    else:
        boundaries = stream_boundaries(counts, [setup.weight] * len(counts), costs, setup.least)
    return items, counts, [list(segments(counts, begin, end)) for begin, end in itertools.pairwise(boundaries)]


def assert_divided_once(counts, rows, workers):
    """Brute force: all units of all items, and a slot of its own for every partial piece."""
    seen = [(s.item, unit) for row in rows for s in row for unit in range(s.begin, s.end)]
    assert seen == [(item, unit) for item, count in enumerate(counts) for unit in range(count)]
    empty = [s.item for row in rows for s in row if s.begin == s.end]
    assert empty == [item for item, count in enumerate(counts) if count == 0]
    slots = [paired_slot(p, s.begin) for p, row in enumerate(rows) for s in row if s.partial]
    assert slots == sorted(set(slots))
    assert all(0 <= slot < paired_slots(workers) for slot in slots)


SETUPS = st.builds(
    ScheduleSetup,
    group=st.sampled_from([1, 3, 4]),
    rows=st.sampled_from([16, 32]),
    unit_keys=st.sampled_from([16, 64]),
    top_left=st.booleans(),
    weight=st.sampled_from([4, 32]),
    overhead=st.integers(1, 9),
    merge_cost=st.integers(0, 7),
    snap=st.integers(0, 9),
    least=st.integers(32, 60),
    equal=st.booleans(),
)
REQUESTS = st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 9, 40]), st.integers(0, 700)), min_size=1, max_size=6)
WINDOWS = st.sampled_from([(-1, -1), (-1, 0), (20, 0), (0, 3), (100, -1)])


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(batch=REQUESTS, kv_heads=st.integers(1, 3), workers=st.integers(1, 24), setup=SETUPS, window=WINDOWS)
def test_the_device_finds_the_intervals_of_the_host(batch, kv_heads, workers, setup, window):
    query_lens, key_lens = zip(*batch, strict=True)
    asked = {"workers": workers, "left": window[0], "right": window[1]}
    items, counts, rows = twin_segments(query_lens, key_lens, kv_heads, setup, **asked)
    found = device_segments("cpu", query_lens, key_lens, kv_heads, setup, **asked)
    cut = [[s.item for s in row if s.partial] for row in rows]
    for got, expected in zip(found, rows, strict=True):
        assert [row[:4] for row in got] == [[*items[s.item], s.begin, s.end] for s in expected]
        for row, segment in zip(got, expected, strict=True):
            holders = [p for p, held in enumerate(cut) if segment.item in held]
            assert row[4:] == ([holders[0], len(holders)] if segment.partial else [0, 0])
            assert holders == list(range(row[4], row[4] + row[5]))
    assert_divided_once(counts, rows, workers)


@pytest.mark.parametrize("equal,workers", [(False, 5), (True, 9)])
@pytest.mark.parametrize("key_lens", [(700, 3, 64), (0, 0, 0)])
def test_decode_is_divided_on_the_device(device, key_lens, equal, workers):
    setup = ScheduleSetup(group=4, rows=16, unit_keys=16, top_left=False, **COSTS, equal=equal)
    items, counts, rows = twin_segments((1, 1, 1), key_lens, 2, setup, workers=workers)
    found = device_segments(device, (1, 1, 1), key_lens, 2, setup, workers=workers)
    assert [[row[:4] for row in got] for got in found] == [
        [[*items[s.item], s.begin, s.end] for s in row] for row in rows
    ]
    assert_divided_once(counts, rows, workers)
    assert any(s.partial for row in rows for s in row) == any(key_lens)


@pytest.mark.parametrize("workers,pieces", [(8, 1), (16, 2)])
def test_equal_requests_are_cut_in_equal_parts(device, workers, pieces):
    """Nobody has two segments, and no part is longer than another by more than what does not divide."""
    setup = ScheduleSetup(group=4, rows=16, unit_keys=16, top_left=False, **COSTS, equal=True)
    found = device_segments(device, [1] * 4, [640] * 4, 2, setup, workers=workers)
    assert max(map(len, found)) == 1
    lengths = [row[0][3] - row[0][2] for row in found if row]
    assert len(lengths) == 8 * pieces and max(lengths) == -(-40 // pieces)


def test_many_requests_are_summed_in_blocks(device):
    """More tiles of rows than are summed at once, in the first block without work."""
    query_lens, key_lens = [0] * 270 + [1] * 9, [40] * 279
    setup = ScheduleSetup(group=1, rows=16, unit_keys=16, top_left=False, **COSTS)
    items, _, rows = twin_segments(query_lens, key_lens, 1, setup, workers=3)
    found = device_segments(device, query_lens, key_lens, 1, setup, workers=3)
    assert [[tuple(row[:2]) for row in got] for got in found] == [[items[s.item] for s in row] for row in rows]


def test_least_leaves_the_last_workers_without_work():
    costs = ScheduleCosts(4, 2, 8, 4)
    boundaries = stream_boundaries([10, 10], [4, 4], costs, 24)
    rows = [list(segments([10, 10], begin, end)) for begin, end in itertools.pairwise(boundaries)]
    assert rows[0] == [Segment(0, 0, 7, True)]
    assert [len(row) > 0 for row in rows] == [True] * 4 + [False] * 4
    assert_divided_once([10, 10], rows, 8)


def test_tiles_are_numbered_by_shapes_alone():
    random = np.random.default_rng(0)
    for _ in range(200):
        lens = random.integers(0, 30, random.integers(1, 9)).tolist()
        starts = [0, *itertools.accumulate(lens)]
        tiling = RowTiling(group=int(random.integers(1, 7)), rows=16, unit_keys=16)
        tiles = row_tiles(starts, [50] * len(lens), tiling)
        rows = [(tile.request, tile.first_row) for tile in tiles]
        assert rows == [(r, x) for r, n in enumerate(lens) for x in range(0, n * tiling.group, 16)]
        assert all(tile.number < tiling.num_tiles(starts[-1], len(lens)) for tile in tiles)
