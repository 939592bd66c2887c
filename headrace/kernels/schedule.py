"""How work is divided among workers: units of items on a line, cut into intervals. cpu/schedule.h is its twin.

An item is one request, one group of KV heads, one tile of query rows; heads are numbered fastest, so that neighbours
share pages. It has `counts[i]` units of KV costing `weights[i]` each, and `overhead` wherever a segment of it begins.
On a line, item i occupies starts[i] .. starts[i + 1] = starts[i] + overhead + counts[i] * weights[i]. All are integers.

Boundary (item, unit) stands before that unit, unit < counts[item]; an item's end is (item + 1, 0). Interval p is what
lies between boundaries p and p + 1; lists begin with (0, 0) and end with (items, 0), so each unit, and each item of no
units (its output still wants writing), is in exactly one interval. Two ways of cutting, priced, the cheaper taken:

- closed-form intervals: as many as workers, all of one length on the line. An interval follows from `starts` and its
  number alone.
- equal splits: each item in equal parts, more intervals than workers; better where a batch is short and uniform.

Batch-invariant mode is the same with chunks as units, chunks being cut by a rule that knows nothing of the batch: a
partial result is then kept for each unit of a split item (`per_unit`), and merged in the order of the units whoever
computed them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from itertools import accumulate, pairwise
from typing import NamedTuple

from headrace.errors import ArgumentError

# Together these keep every sum of the native twin below 2^63.
MOST_TOTAL, MOST_COST, MOST_WORKERS = 1 << 60, 1 << 38, 1 << 20
# Equal splits: the length of a part is found to a 64th.
TARGET_STEPS = 64
EQUAL_LENGTHS = 8  # of parts that a GPU looks at together


class Boundary(NamedTuple):
    """A place between two units: before `unit` of `item`."""

    item: int
    unit: int


class Segment(NamedTuple):
    """What of one item lies in one interval; partial: the rest of the item lies in others."""

    item: int
    begin: int
    end: int
    partial: bool


class MergedItem(NamedTuple):
    """An item whose units lie in several intervals, and where its partial results are, in the order of its units."""

    item: int
    first_slot: int
    pieces: int

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + self.pieces)


@dataclass(frozen=True)
class ScheduleCosts:
    """What is known besides the items. The first two and `snap` are in the unit of the weights.

    overhead: of each segment. merge_cost: of each partial segment besides. snap: no segment at an end of a split item
    is cheaper than this.
    """

    overhead: int
    merge_cost: int
    workers: int
    snap: int

    def __post_init__(self) -> None:
        _check("overhead", self.overhead, 0, MOST_COST)
        _check("merge_cost", self.merge_cost, 0, MOST_COST)
        _check("workers", self.workers, 1, MOST_WORKERS)
        _check("snap", self.snap, 0, MOST_COST)


@dataclass(frozen=True)
class Schedule:
    """Intervals with their predicted time, and the slots of partial results.

    The partial pieces of interval p take slots first_slots[p], first_slots[p] + 1, ... in the order of the line.
    """

    boundaries: list[Boundary]
    makespan: int
    first_slots: list[int] = field(default_factory=list)
    merges: list[MergedItem] = field(default_factory=list)
    slots: int = 0


class _Items:
    """Checked counts and weights, with where each item starts on the line."""

    def __init__(self, counts: Sequence[int], weights: Sequence[int], overhead: int) -> None:
        self.counts = [int(count) for count in counts]
        self.weights = [int(weight) for weight in weights]
        if len(self.counts) != len(self.weights):
            raise ArgumentError(f"weights: expected {len(self.counts)}, one for each item, got {len(self.weights)}")
        _check("counts", min(self.counts, default=0), 0, MOST_TOTAL)
        _check("weights", min(self.weights, default=1), 1, MOST_TOTAL)
        self.payloads = [count * weight for count, weight in zip(self.counts, self.weights, strict=True)]
        self.starts = list(accumulate((overhead + payload for payload in self.payloads), initial=0))
        if self.total > MOST_TOTAL:
            raise ArgumentError("counts: all work together may cost at most 2^60")

    @property
    def total(self) -> int:
        return self.starts[-1]


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ArgumentError(f"{name}: expected {least} to {most}, got {value}")


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def item_starts(counts: Sequence[int], weights: Sequence[int], overhead: int) -> list[int]:
    """Where each item begins on the line, and last the total: items + 1 numbers."""
    return _Items(counts, weights, overhead).starts


def stream_boundaries(
    counts: Sequence[int], weights: Sequence[int], costs: ScheduleCosts, least: int = 0
) -> list[Boundary]:
    """workers + 1 boundaries at equal distances on the line, each moved to the nearest unit.

    A cut makes its second piece pay an overhead again, and both a merge: they are part of what is shared out. So the
    first worker, who continues nothing, has an overhead and a merge more of the line than the others; the last, whom
    nothing continues, a merge more.

    One less than `snap` from the start or end of its item's units is moved there. At most workers - 1 items are split.
    An interval costs at most overhead + weight + 2 snap + 2 merge_cost more than ceil(total / workers).

    least: of the line to each, so that little work is divided among few and the last ones have none. From the largest
    weight on, no two boundaries within an item are the same.
    """
    return _stream(_Items(counts, weights, costs.overhead), costs, costs.workers, least)


def _stream(items: _Items, costs: ScheduleCosts, workers: int, least: int = 0) -> list[Boundary]:
    lead = costs.overhead + costs.merge_cost
    step = max(_divide_up(max(0, items.total - lead - costs.merge_cost), workers), least)
    inner = [_boundary_at(items, costs, min(lead + p * step, items.total)) for p in range(1, workers)]
    return [Boundary(0, 0), *inner, Boundary(len(items.counts), 0)]


def _boundary_at(items: _Items, costs: ScheduleCosts, x: int) -> Boundary:
    item = bisect_right(items.starts, x) - 1
    if item == len(items.counts):
        return Boundary(item, 0)
    count, weight = items.counts[item], items.weights[item]
    inside = max(0, x - items.starts[item] - costs.overhead)
    unit = min(count, (inside + weight // 2) // weight)
    rest = count - unit
    if unit <= rest:
        return Boundary(item, 0 if unit * weight < costs.snap else unit)
    return Boundary(item + 1, 0) if rest == 0 or rest * weight < costs.snap else Boundary(item, unit)


def equal_boundaries(counts: Sequence[int], weights: Sequence[int], costs: ScheduleCosts) -> list[Boundary]:
    """Each item cut in equal parts (to a unit), each an interval: at most items + workers - 1 of them.

    With fewer items than workers, no more parts than workers; else no more than make each part a worker's share. No
    part of a split item costs less than `snap`.
    """
    return _equal(_Items(counts, weights, costs.overhead), costs)


def _equal(items: _Items, costs: ScheduleCosts) -> list[Boundary]:
    target = _equal_target(items, costs)
    cuts = []
    for item, (count, parts) in enumerate(zip(items.counts, _equal_parts(items, costs, target), strict=True)):
        each, longer = divmod(count, parts)
        cuts += [Boundary(item, k * each + min(k, longer)) for k in range(parts)]
    return [*cuts, Boundary(len(items.counts), 0)]


def _equal_parts(items: _Items, costs: ScheduleCosts, target: int) -> Iterator[int]:
    for count, weight, payload in zip(items.counts, items.weights, items.payloads, strict=True):
        most = count // max(1, _divide_up(costs.snap, weight))
        yield max(1, min(most, _divide_up(payload, target)))


def _equal_target(items: _Items, costs: ScheduleCosts) -> int:
    def fits(target: int) -> bool:
        return sum(_equal_parts(items, costs, target)) <= costs.workers

    low = max(1, _divide_up(sum(items.payloads), costs.workers))
    if len(items.counts) >= costs.workers or fits(low):
        return low
    high = max(low, *items.payloads)
    while high - low > 1 + low // TARGET_STEPS:
        middle = low + (high - low) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def even_boundaries(counts: Sequence[int], weight: int, costs: ScheduleCosts, least: int) -> list[Boundary]:
    """What GPU kernels do, whose workers find it without a list: workers + 1 boundaries.

    With no more items than workers, parts of one length, the shortest of EQUAL_LENGTHS that fit, if the longest part
    costs no more than an interval of the line; else `stream_boundaries`. No part of a split item costs less than least.
    """
    items = _Items(counts, [weight] * len(counts), costs.overhead)
    shared = items.total - costs.overhead - 2 * costs.merge_cost
    step, most = max(_divide_up(max(0, shared), costs.workers), least), max(counts, default=0)
    part = _even_part(counts, costs.workers, _divide_up(least, weight)) if len(counts) <= costs.workers and most else 0
    longest = min(part, most) * weight + (costs.merge_cost if part < most else 0)
    if not part or longest > step + 2 * costs.merge_cost:
        return _stream(items, costs, costs.workers, least)
    cuts = [Boundary(item, unit) for item, count in enumerate(counts) for unit in range(0, max(count, 1), part)]
    return [*cuts, *[Boundary(len(counts), 0)] * (costs.workers + 1 - len(cuts))]


def _even_part(counts: Sequence[int], workers: int, least: int) -> int:
    units, spare = sum(counts), workers - len(counts)
    low = max(_divide_up(units, workers), least, 1)
    high = max(low, min(_divide_up(units, spare), max(counts)) if spare else max(counts))
    lengths = [low + (high - low) * n // (EQUAL_LENGTHS - 1) for n in range(EQUAL_LENGTHS)]
    return next((n for n in lengths if sum(max(1, _divide_up(count, n)) for count in counts) <= workers), high)


def makespan(
    boundaries: Sequence[Boundary], counts: Sequence[int], weights: Sequence[int], costs: ScheduleCosts
) -> int:
    """The predicted time of intervals that the workers claim in order as they become free."""
    return _price(boundaries, _Items(counts, weights, costs.overhead), costs)


def _price(boundaries: Sequence[Boundary], items: _Items, costs: ScheduleCosts) -> int:
    free, latest = [0] * min(costs.workers, len(boundaries)), 0
    for begin, end in pairwise(boundaries):
        done = free[0] + _interval_cost(items, costs, begin, end)
        heapreplace(free, done)
        latest = max(latest, done)
    return latest


def _interval_cost(items: _Items, costs: ScheduleCosts, begin: Boundary, end: Boundary) -> int:
    partial = costs.overhead + costs.merge_cost
    if begin.item == end.item:
        return partial + (end.unit - begin.unit) * items.weights[end.item] if end.unit > begin.unit else 0
    cost = partial + end.unit * items.weights[end.item] if end.unit else 0
    whole = begin.item
    if begin.unit:
        cost += partial + (items.counts[whole] - begin.unit) * items.weights[whole]
        whole += 1
    return cost + items.starts[end.item] - items.starts[whole]


def best_boundaries(counts: Sequence[int], weights: Sequence[int], costs: ScheduleCosts) -> list[Boundary]:
    """The cheapest of equal splits and closed-form intervals for all, half, a quarter, ... of the workers.

    Of equal prices fewer workers win: little work is better undivided.
    """
    return plan(counts, weights, costs).boundaries


def plan(counts: Sequence[int], weights: Sequence[int], costs: ScheduleCosts, *, per_unit: bool = False) -> Schedule:
    """The best boundaries with their price and the slots of partial results; per_unit: as `first_slots` says.

    Raises ArgumentError where a number is out of range or all work together costs more than 2^60.
    """
    items = _Items(counts, weights, costs.overhead)
    best = _stream(items, costs, costs.workers)
    price = _price(best, items, costs)
    trial = _equal(items, costs)
    if (trial_price := _price(trial, items, costs)) < price:
        best, price = trial, trial_price
    few = costs.workers // 2
    # So many workers take at least total / few: once that is too much, fewer take longer still.
    while few and _divide_up(items.total, few) <= price:
        trial = _stream(items, costs, few)
        if (trial_price := _price(trial, items, costs)) <= price:
            best, price = trial, trial_price
        few //= 2
    first, merged = first_slots(best, items.counts, per_unit=per_unit), merges(best, items.counts, per_unit=per_unit)
    return Schedule(best, price, first, merged, sum(row.pieces for row in merged))


def segments(counts: Sequence[int], begin: Boundary, end: Boundary) -> Iterator[Segment]:
    """The segments of one interval, in order; an item of no units is one segment of none."""
    unit = begin.unit
    for item in range(begin.item, end.item):
        yield Segment(item, unit, counts[item], unit > 0)
        unit = 0
    if end.unit > unit:
        yield Segment(end.item, unit, end.unit, True)


def _partials(
    boundaries: Sequence[Boundary], counts: Sequence[int], *, per_unit: bool
) -> Iterator[list[tuple[Segment, int]]]:
    """For each interval its partial segments, each with the slots it takes."""
    for begin, end in pairwise(boundaries):
        found = [segment for segment in segments(counts, begin, end) if segment.partial]
        yield [(segment, segment.end - segment.begin if per_unit else 1) for segment in found]


def first_slots(boundaries: Sequence[Boundary], counts: Sequence[int], *, per_unit: bool = False) -> list[int]:
    """For each interval the slot of its first partial piece; a second piece takes the next one.

    Partial pieces are numbered in the order of the line: exactly as many slots as pieces, an item's side by side in the
    order a merge wants. They are never more than `workspace_slots`. Where an interval is known by its number p alone,
    two rules need no count of what lies before: slot p + item (items + workers - 1 slots), or 2 p - 1 for the piece
    that continues an item and 2 p for the one that is continued (2 workers - 2 slots). The smaller of them is the
    same bound.

    per_unit: a slot holds one unit of a split item, not a segment.
    """
    sizes = (sum(slots for _, slots in row) for row in _partials(boundaries, counts, per_unit=per_unit))
    return list(accumulate(sizes, initial=0))[:-1]


def merges(boundaries: Sequence[Boundary], counts: Sequence[int], *, per_unit: bool = False) -> list[MergedItem]:
    """Each split item with the slots of its pieces (per_unit: of its units)."""
    rows: list[MergedItem] = []
    slot = 0
    for segment, slots in (pair for row in _partials(boundaries, counts, per_unit=per_unit) for pair in row):
        if segment.begin == 0:
            rows.append(MergedItem(segment.item, slot, 0))
        rows[-1] = rows[-1]._replace(pieces=rows[-1].pieces + slots)
        slot += slots
    return rows


def paired_slot(interval: int, begin: int) -> int:
    """The slot of an interval's partial piece that begins at that unit of its item, by the rule for those who know no
    more: of `paired_slots` in all."""
    return 2 * interval - (begin > 0)


def paired_slots(workers: int) -> int:
    """How many there are by that rule."""
    return 2 * max(workers - 1, 0)


def workspace_slots(num_items: int, workers: int) -> int:
    """The most partial segments a plan for so many items and workers can have; for some counts it has as many.

    workers - 1 cuts make a piece each, and one more for each item that they split.
    """
    return workers - 1 + min(num_items, workers - 1)
