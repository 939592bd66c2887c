"""The schedule against brute force that walks unit by unit, and its two twins against each other."""

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ArgumentError
from headrace.kernels.cpu import _native
from headrace.kernels.schedule import (
    MOST_COST,
    MOST_TOTAL,
    MOST_WORKERS,
    Boundary,
    ScheduleCosts,
    best_boundaries,
    equal_boundaries,
    first_slots,
    item_starts,
    makespan,
    merges,
    plan,
    segments,
    stream_boundaries,
    workspace_slots,
)

COSTS = st.builds(
    ScheduleCosts,
    overhead=st.integers(0, 7),
    merge_cost=st.integers(0, 5),
    workers=st.integers(1, 12) | st.sampled_from([64, 257]),
    snap=st.integers(0, 9),
)


@st.composite
def items(draw, most=12):
    """Counts with zeros and with giants among them, and weights."""
    counts = draw(st.lists(st.integers(0, 12) | st.sampled_from([0, 1, 64, 301]), max_size=most))
    weights = draw(st.lists(st.integers(1, 6), min_size=len(counts), max_size=len(counts)))
    return counts, weights


def lists_of(counts, weights, costs):
    return [cut(counts, weights, costs) for cut in (stream_boundaries, equal_boundaries, best_boundaries)]


def walk(boundaries, counts):
    """Brute force: for each unit (None: the item has none) the intervals that hold it, of all that there are."""
    for item, count in enumerate(counts):
        for unit in range(count) if count else [None]:
            place = (item, unit or 0)
            yield (
                item,
                unit,
                [p for p in range(len(boundaries) - 1) if boundaries[p] <= place < boundaries[p + 1]],
            )


def pieces_of(boundaries, counts):
    """Brute force: {item: [(interval, units)]} in the order of the units."""
    found = {}
    for item, unit, intervals in walk(boundaries, counts):
        rows = found.setdefault(item, [])
        if not rows or rows[-1][0] != intervals[0]:
            rows.append((intervals[0], 0))
        rows[-1] = (intervals[0], rows[-1][1] + (unit is not None))
    return found


def brute_makespan(boundaries, counts, weights, costs):
    """Each worker's clock moved on unit by unit."""
    pieces = pieces_of(boundaries, counts)
    clocks = [0] * costs.workers
    for p in range(len(boundaries) - 1):
        worker = clocks.index(min(clocks))
        for item, rows in pieces.items():
            for interval, units in rows:
                if interval == p:
                    clocks[worker] += costs.overhead + (costs.merge_cost if len(rows) > 1 else 0)
                    for _ in range(units):
                        clocks[worker] += weights[item]
    return max(clocks)


def brute_stream(counts, weights, costs):
    """Each boundary found by trying all units of all items; nearest, the later of two as near."""
    starts = [0]
    for count, weight in zip(counts, weights, strict=True):
        starts.append(starts[-1] + costs.overhead + count * weight)
    shared = max(0, starts[-1] - costs.overhead - 2 * costs.merge_cost)
    found = [(0, 0)]
    for p in range(1, costs.workers):
        x = min(costs.overhead + costs.merge_cost + p * -(-shared // costs.workers), starts[-1])
        item = max(i for i, start in enumerate(starts) if start <= x)
        if item == len(counts):
            found.append((item, 0))
            continue
        first, weight, count = starts[item] + costs.overhead, weights[item], counts[item]
        unit = max(range(count + 1), key=lambda u: (-abs(first + u * weight - x), u))
        before, after = unit * weight, (count - unit) * weight
        if before <= after:
            found.append((item, 0 if before < costs.snap else unit))
        else:
            found.append((item + 1, 0) if after < max(1, costs.snap) else (item, unit))
    return [*found, (len(counts), 0)]


@given(items(), COSTS)
def test_every_unit_and_every_empty_item_is_in_exactly_one_interval(drawn, costs):
    for boundaries in lists_of(*drawn, costs):
        assert boundaries == sorted(boundaries)
        assert boundaries[0] == (0, 0) and boundaries[-1] == (len(drawn[0]), 0)
        assert all(len(intervals) == 1 for _, _, intervals in walk(boundaries, drawn[0]))


@given(items(), COSTS)
def test_segments_are_what_a_walk_finds(drawn, costs):
    counts, weights = drawn
    for boundaries in lists_of(counts, weights, costs):
        pieces = pieces_of(boundaries, counts)
        expected = [(p, item, units) for item, rows in pieces.items() for p, units in rows]
        found, partial = [], set()
        for p in range(len(boundaries) - 1):
            for segment in segments(counts, boundaries[p], boundaries[p + 1]):
                found.append((p, segment.item, segment.end - segment.begin))
                partial |= {segment.item} if segment.partial else set()
        assert found == expected
        assert partial == {item for item, rows in pieces.items() if len(rows) > 1}


@given(items(), COSTS)
def test_stream_boundaries_are_the_nearest_units(drawn, costs):
    assert stream_boundaries(*drawn, costs) == brute_stream(*drawn, costs)


@given(items(), COSTS)
def test_the_makespan_is_what_a_walk_unit_by_unit_takes(drawn, costs):
    for boundaries in lists_of(*drawn, costs):
        assert makespan(boundaries, *drawn, costs) == brute_makespan(boundaries, *drawn, costs)


@given(items(), COSTS)
def test_merges_cover_the_split_items_with_slots_of_their_own(drawn, costs):
    counts, weights = drawn
    for boundaries in lists_of(counts, weights, costs):
        pieces = {item: rows for item, rows in pieces_of(boundaries, counts).items() if len(rows) > 1}
        rows = merges(boundaries, counts)
        assert [(row.item, row.pieces) for row in rows] == [(item, len(found)) for item, found in pieces.items()]
        used = [slot for row in rows for slot in row.slots]
        assert used == list(range(len(used)))
        assert len(used) <= workspace_slots(len(counts), costs.workers)


@given(items(), COSTS, st.booleans())
def test_an_interval_finds_its_slots_where_the_merge_looks_for_them(drawn, costs, per_unit):
    counts, weights = drawn
    for boundaries in lists_of(counts, weights, costs):
        written = {}
        for p, slot in enumerate(first_slots(boundaries, counts, per_unit=per_unit)):
            for segment in segments(counts, boundaries[p], boundaries[p + 1]):
                for unit in range(segment.begin, segment.end if per_unit else segment.begin + 1):
                    if segment.partial:
                        assert slot not in written
                        written[slot] = (segment.item, unit)
                        slot += 1
        rows = merges(boundaries, counts, per_unit=per_unit)
        assert sum(row.pieces for row in rows) == len(written)
        for row in rows:
            found = [written[slot] for slot in row.slots]
            assert {item for item, _ in found} == {row.item}
            assert [unit for _, unit in found] == (
                list(range(counts[row.item])) if per_unit else sorted(unit for _, unit in found)
            )


@pytest.mark.parametrize(("num_items", "workers"), [(1, 1), (1, 7), (3, 7), (6, 7), (7, 7), (20, 7), (99, 2)])
def test_some_counts_need_every_slot_of_the_workspace(num_items, workers):
    costs = ScheduleCosts(0, 0, workers, 0)
    num_long = min(num_items, workers - 1)  # has no divisor in common with `workers`: no cut falls between two of them
    counts = [1000 * num_items] * num_long + [1] * (num_items - num_long)
    used = merges(stream_boundaries(counts, [1] * num_items, costs), counts)
    assert sum(row.pieces for row in used) == workspace_slots(num_items, workers)


@given(items(), COSTS)
def test_two_rules_that_need_no_count_give_each_partial_segment_a_slot(drawn, costs):
    counts, weights = drawn
    boundaries = stream_boundaries(counts, weights, costs)
    by_sum, by_two = [], []
    for p in range(costs.workers):
        for segment in segments(counts, boundaries[p], boundaries[p + 1]):
            if segment.partial:
                by_sum.append(p + segment.item)
                by_two.append(2 * p - 1 if segment.begin else 2 * p)
    for slots, bound in ((by_sum, len(counts) + costs.workers - 1), (by_two, 2 * costs.workers - 2)):
        assert slots == sorted(set(slots))
        assert all(0 <= slot < bound for slot in slots)


@given(items(), COSTS)
def test_no_sliver_is_cut_off_an_item(drawn, costs):
    counts, weights = drawn
    for cut in (stream_boundaries, equal_boundaries):
        for item, rows in pieces_of(cut(counts, weights, costs), counts).items():
            ends = (rows[0], rows[-1]) if cut is stream_boundaries else rows
            if len(rows) > 1:
                assert min(units * weights[item] for _, units in ends) >= costs.snap


@given(items(), COSTS)
def test_pieces_within_an_item_are_equal_to_a_unit(drawn, costs):
    counts, weights = drawn
    shared = item_starts(counts, weights, costs.overhead)[-1] - costs.overhead - 2 * costs.merge_cost
    step = -(-max(0, shared) // costs.workers)
    for item, rows in pieces_of(stream_boundaries(counts, weights, costs), counts).items():
        for _, units in rows[1:-1]:
            assert abs(units * weights[item] - step) <= weights[item]


@given(items(), COSTS)
def test_equal_parts_are_equal_and_few(drawn, costs):
    counts, weights = drawn
    boundaries = equal_boundaries(counts, weights, costs)
    assert len(boundaries) - 1 <= len(counts) + costs.workers - 1
    if 0 < len(counts) < costs.workers:
        assert len(boundaries) - 1 <= costs.workers
    for rows in pieces_of(boundaries, counts).values():
        units = [number for _, number in rows]
        assert max(units) - min(units) <= 1


@given(items(), COSTS)
def test_intervals_cost_a_share_and_a_bounded_rest(drawn, costs):
    counts, weights = drawn
    share = -(-item_starts(counts, weights, costs.overhead)[-1] // costs.workers)
    rest = costs.overhead + max(weights, default=0) + 2 * costs.snap + 2 * costs.merge_cost
    assert share <= plan(counts, weights, costs).makespan <= share + rest
    assert makespan(stream_boundaries(counts, weights, costs), counts, weights, costs) <= share + rest


@given(items(), COSTS)
def test_the_chosen_is_the_cheapest_of_what_is_priced(drawn, costs):
    chosen = plan(*drawn, costs)
    prices = [makespan(cut(*drawn, costs), *drawn, costs) for cut in (stream_boundaries, equal_boundaries)]
    few = costs.workers
    while few := few // 2:
        fewer = ScheduleCosts(costs.overhead, costs.merge_cost, few, costs.snap)
        prices.append(makespan(stream_boundaries(*drawn, fewer), *drawn, costs))
    assert chosen.makespan == makespan(chosen.boundaries, *drawn, costs) == min(prices)


def test_little_work_is_not_divided():
    assert best_boundaries([6], [1], ScheduleCosts(4, 8, 16, 0)) == [(0, 0), (1, 0)]
    assert len(best_boundaries([6000], [1], ScheduleCosts(4, 8, 16, 0))) == 17


def test_equal_splits_are_taken_where_they_are_cheaper():
    costs = ScheduleCosts(5, 0, 132, 0)
    counts, weights = [64] * 32, [1] * 32
    assert best_boundaries(counts, weights, costs) == equal_boundaries(counts, weights, costs)
    assert plan(counts, weights, costs).makespan < makespan(
        stream_boundaries(counts, weights, costs), counts, weights, costs
    )


def assert_twins_agree(counts, weights, costs):
    native = astuple(costs)
    assert _native.item_starts(counts, weights, costs.overhead) == item_starts(counts, weights, costs.overhead)
    assert _native.best_boundaries(counts, weights, native) == best_boundaries(counts, weights, costs)
    for name, cut in (("stream_boundaries", stream_boundaries), ("equal_boundaries", equal_boundaries)):
        boundaries = cut(counts, weights, costs)
        assert getattr(_native, name)(counts, weights, native) == boundaries
        assert _native.makespan(boundaries, counts, weights, native) == makespan(boundaries, counts, weights, costs)
        for per_unit in (False, True):
            assert _native.first_slots(boundaries, counts, per_unit) == first_slots(
                boundaries, counts, per_unit=per_unit
            )
            assert _native.merges(boundaries, counts, per_unit) == merges(boundaries, counts, per_unit=per_unit)
    assert _native.workspace_slots(len(counts), costs.workers) == workspace_slots(len(counts), costs.workers)


@given(items(most=40), COSTS)
def test_the_native_twin_says_the_same(drawn, costs):
    assert_twins_agree(*drawn, costs)


@st.composite
def large_items(draw):
    counts = draw(st.lists(st.integers(0, 1 << 33), max_size=20))
    return counts, draw(st.lists(st.integers(1, 1 << 22), min_size=len(counts), max_size=len(counts)))


LARGE_COSTS = st.builds(
    ScheduleCosts,
    overhead=st.integers(0, MOST_COST),
    merge_cost=st.integers(0, MOST_COST),
    workers=st.integers(1, 300),
    snap=st.integers(0, MOST_COST),
)


@given(large_items(), LARGE_COSTS)
def test_the_native_twin_says_the_same_of_large_numbers(drawn, costs):
    assert _native.best_boundaries(*drawn, astuple(costs)) == best_boundaries(*drawn, costs)
    for boundaries in lists_of(*drawn, costs):
        assert _native.makespan(boundaries, *drawn, astuple(costs)) == makespan(boundaries, *drawn, costs)


def test_the_largest_total_does_not_overflow():
    counts, weights = [1 << 40, (1 << 40) - 1, 0], [1 << 19, 1 << 19, 1]
    costs = ScheduleCosts(1, MOST_COST, 2, MOST_COST)
    assert_twins_agree_without_units(counts, weights, costs)
    assert_twins_agree_without_units([], [], ScheduleCosts(MOST_COST, MOST_COST, 1 << 12, MOST_COST))


def assert_twins_agree_without_units(counts, weights, costs):
    boundaries = best_boundaries(counts, weights, costs)
    assert _native.best_boundaries(counts, weights, astuple(costs)) == boundaries
    assert _native.merges(boundaries, counts, False) == merges(boundaries, counts)


def test_a_million_requests():
    num_items, workers = 1 << 20, 132
    counts, weights = [(i * 7919) % 4096 for i in range(num_items)], [3] * num_items
    found = _native.best_boundaries(counts, weights, (5, 2, workers, 4))
    share = -(-_native.item_starts(counts, weights, 5)[-1] // workers)
    assert found == sorted(found)
    assert share <= _native.makespan(found, counts, weights, (5, 2, workers, 4)) <= share + 5 + 3 + 2 * 4 + 2 * 2


BAD = [
    ([-1], [1], (0, 0, 1, 0), "counts"),
    ([1], [0], (0, 0, 1, 0), "weights"),
    ([1, 2], [1], (0, 0, 1, 0), "weights"),
    ([MOST_TOTAL], [2], (0, 0, 1, 0), "2\\^60"),
    ([MOST_TOTAL], [1], (1, 0, 1, 0), "2\\^60"),
    ([1], [1], (-1, 0, 1, 0), "overhead"),
    ([1], [1], (0, MOST_COST + 1, 1, 0), "merge_cost"),
    ([1], [1], (0, 0, 0, 0), "workers"),
    ([1], [1], (0, 0, MOST_WORKERS + 1, 0), "workers"),
    ([1], [1], (0, 0, 1, -1), "snap"),
]


@pytest.mark.parametrize(("counts", "weights", "costs", "named"), BAD)
def test_numbers_out_of_range_are_named(counts, weights, costs, named):
    with pytest.raises(ArgumentError, match=named):
        plan(counts, weights, ScheduleCosts(*costs))
    with pytest.raises(ArgumentError, match=named):
        _native.best_boundaries(counts, weights, costs)


@pytest.mark.parametrize("boundaries", [[], [(0, 0)], [(0, 0), (0, 3), (1, 0)], [(0, 0), (0, 2), (0, 1), (1, 0)]])
def test_boundaries_that_are_none_are_refused(boundaries):
    with pytest.raises(ArgumentError, match="boundaries"):
        _native.makespan(boundaries, [3], [1], (0, 0, 1, 0))


def test_boundaries_are_pairs():
    assert Boundary(3, 4) == (3, 4)
