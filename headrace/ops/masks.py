"""What a dense boolean mask says in few words: causal, window, prefix, documents, intervals, tree, or none of these.

A dense mask costs a byte per query and key, and a kernel that reads it can leave nothing out. Most masks are one of a
few structures written out. `recognise` reads the mask once, in blocks of rows that fit the cache:

    first, last = the range of keys each row sees, if it is one range       rows that see nothing: 0, -1
    all, causal, window, prefix, document, intervals: questions about these two arrays alone
    tree, dense: when some row sees more than one range

Nothing is guessed: each answer writes back exactly the mask (`expanded`), whatever bit of it is flipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from headrace.errors import ArgumentError

BLOCK_BYTES = 1 << 18  # of the mask, looked at together


class Segment(NamedTuple):
    """Queries row_begin .. row_end that see keys key_begin .. key_end alone; causal: aligned at their ends."""

    row_begin: int
    row_end: int
    key_begin: int
    key_end: int
    causal: bool


@dataclass(frozen=True)
class Recognised:
    """What a mask was recognised as.

    kind: "all", "causal" (aligned at the bottom right), "causal_top_left", "window", "prefix", "document", "intervals",
    "tree" or "dense". text: the same in words, with numbers. options: of attention where they express it (causal,
    align, window); prefix_len; for tree, parents int32 [queries] (-1: a root); for tree and dense, columns: how many of
    the last columns say something, those before being seen by all. segments: for document, the rows in order, all
    causal or none (one row: either). first_keys, last_keys: int32 [queries], both included, for prefix and intervals.
    """

    kind: str
    text: str
    shape: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    first_keys: np.ndarray | None = None
    last_keys: np.ndarray | None = None


@dataclass(frozen=True)
class Ranges:
    """The keys each row sees, first to last, both included, int64 [queries]; nothing: 0, -1."""

    first: np.ndarray
    last: np.ndarray
    num_keys: int

    @property
    def num_queries(self) -> int:
        return len(self.first)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_queries, self.num_keys

    def same(self, other: Ranges) -> bool:
        return np.array_equal(self.first, other.first) and np.array_equal(self.last, other.last)


def recognise(mask: np.ndarray) -> Recognised:
    """What a mask bool [queries, keys] is; True: the query sees the key. Read once, by blocks of rows."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ArgumentError(f"mask: expected bool [queries, keys], got {got}")
    ranges = row_ranges(mask)
    if ranges is None:
        return _tree(mask) or _dense(mask)
    steps: tuple[Callable[[Ranges], Recognised | None], ...] = (_all, _causal, _window, _prefix, _document)
    for step in steps:
        found = step(ranges)
        if found is not None:
            return found
    return _intervals(ranges)


def expanded(recognised: Recognised) -> np.ndarray:
    """The mask that was recognised, bool [queries, keys]. A dense one is not kept: ArgumentError."""
    num_queries, num_keys = recognised.shape
    if recognised.kind == "tree":
        parents = recognised.options["parents"]
        return np.concatenate([np.ones((num_queries, num_keys - num_queries), np.bool_), _ancestors(parents)], 1)
    ranges = ranges_of(recognised)
    if ranges is None:
        raise ArgumentError("recognised: expected a structure, got a dense mask, of which nothing is kept")
    keys = np.arange(num_keys)
    return (keys >= ranges.first[:, None]) & (keys <= ranges.last[:, None])


def ranges_of(recognised: Recognised) -> Ranges | None:
    """The keys each row sees, or None where they are no range: of a tree, and of a dense mask."""
    options = recognised.options
    if recognised.kind in ("tree", "dense"):
        return None
    if recognised.kind == "document":
        return _segment_ranges(recognised)
    if recognised.first_keys is not None and recognised.last_keys is not None:
        return Ranges(recognised.first_keys, recognised.last_keys, recognised.shape[1])
    left, right = options.get("window", (None, None))
    right = 0 if options.get("causal") else right
    return windowed(recognised.shape, left, right, options.get("align", "bottom_right"))


def row_ranges(mask: np.ndarray) -> Ranges | None:
    """The range of keys each row sees, or None where a row sees more than one."""
    num_queries, num_keys = mask.shape
    first, last = np.zeros(num_queries, np.int64), np.full(num_queries, -1, np.int64)
    step = max(1, BLOCK_BYTES // max(num_keys, 1))
    for begin in range(0, num_queries if num_keys else 0, step):
        block = np.ascontiguousarray(mask[begin : begin + step])
        lowest, highest = block.argmax(axis=1), num_keys - 1 - block[:, ::-1].argmax(axis=1)
        seeing = block[np.arange(len(block)), lowest]
        # Each row that sees anything begins at least one range: as many ranges as such rows means one each.
        begun = np.count_nonzero(block[:, 0]) + np.count_nonzero(block[:, 1:] > block[:, :-1])
        if begun != np.count_nonzero(seeing):
            return None
        first[begin : begin + step] = np.where(seeing, lowest, 0)
        last[begin : begin + step] = np.where(seeing, highest, -1)
    return Ranges(first, last, num_keys)


def clipped(first: np.ndarray, last: np.ndarray, num_keys: int) -> Ranges:
    """Ranges within 0 .. num_keys, those with nothing in them as 0, -1."""
    first, last = np.maximum(first, 0), np.minimum(last, num_keys - 1)
    return Ranges(np.where(first > last, 0, first), np.where(first > last, -1, last), num_keys)


def windowed(shape: tuple[int, int], left: int | None, right: int | None, align: str) -> Ranges:
    """What `left` keys before and `right` after each query's own make of it; None: all."""
    own = _own(shape, align)
    first = np.zeros_like(own) if left is None else own - left
    last = np.full_like(own, shape[1] - 1) if right is None else own + right
    return clipped(first, last, shape[1])


def _own(shape: tuple[int, int], align: str) -> np.ndarray:
    return np.arange(shape[0]) + (shape[1] - shape[0] if align == "bottom_right" else 0)


def _size_text(shape: tuple[int, int]) -> str:
    return f"{_count(shape[0], 'query', 'queries')}, {_count(shape[1], 'key')}"


def _count(number: int, word: str, words: str = "") -> str:
    return f"{number} {word if number == 1 else words or word + 's'}"


def _all(ranges: Ranges) -> Recognised | None:
    if not ranges.same(windowed(ranges.shape, None, None, "bottom_right")):
        return None
    return Recognised("all", f"no mask: every key is seen by every query ({_size_text(ranges.shape)})", ranges.shape)


def _causal(ranges: Ranges) -> Recognised | None:
    for kind, align in (("causal", "bottom_right"), ("causal_top_left", "top_left")):
        if ranges.same(windowed(ranges.shape, None, 0, align)):
            text = f"causal, aligned at the {align.replace('_', ' ')} ({_size_text(ranges.shape)})"
            return Recognised(kind, text, ranges.shape, {"causal": True, "align": align})
    return None


def _window(ranges: Ranges) -> Recognised | None:
    if not (ranges.last >= 0).any():
        return None
    for align in ("bottom_right", "top_left"):
        own = _own(ranges.shape, align)
        left = _offset(own - ranges.first, (ranges.first > 0))
        right = _offset(ranges.last - own, (ranges.last >= 0) & (ranges.last < ranges.num_keys - 1))
        if min(left or 0, right or 0) >= 0 and ranges.same(windowed(ranges.shape, left, right, align)):
            return _window_found(ranges, left, right, align)
    return None


def _offset(distances: np.ndarray, where: np.ndarray) -> int | None:
    """The distance of the first row that has one. Whether all have it, `same` tells."""
    return int(distances[where.argmax()]) if where.any() else None


def _window_found(ranges: Ranges, left: int | None, right: int | None, align: str) -> Recognised:
    sides = ["all" if side is None else str(side) for side in (left, right)]
    text = (
        f"a window, {sides[0]} before and {sides[1]} after a query's own key, aligned at the {align.replace('_', ' ')}"
    )
    causal = right == 0
    options = {"causal": causal, "align": align, "window": (left, None if causal else right)}
    return Recognised("window", f"{text} ({_size_text(ranges.shape)})", ranges.shape, options)


def _prefix(ranges: Ranges) -> Recognised | None:
    prefix_len = int(ranges.last[0]) + 1
    last = np.maximum(_own(ranges.shape, "bottom_right"), prefix_len - 1)
    if not ranges.same(clipped(np.zeros_like(last), last, ranges.num_keys)):
        return None
    text = f"a prefix of {_count(prefix_len, 'key')} seen by all, then causal ({_size_text(ranges.shape)})"
    options = {"prefix_len": prefix_len}
    first, last = _int32(ranges.first), _int32(ranges.last)
    return Recognised("prefix", text, ranges.shape, options, first_keys=first, last_keys=last)


def _int32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32)


def _document(ranges: Ranges) -> Recognised | None:
    """Blocks of rows that share no key, each full or each causal."""
    same_first = np.diff(ranges.first) == 0
    nothing = (ranges.last[1:] < 0) & (ranges.last[:-1] < 0)
    seeing = (ranges.last[1:] >= 0) & (ranges.last[:-1] >= 0)
    for causal in (False, True):
        going_on = nothing | (seeing & same_first & (np.diff(ranges.last) == int(causal)))
        begins = np.flatnonzero(np.concatenate([[True], ~going_on]))
        ends = np.append(begins[1:], ranges.num_queries)
        key_begins, key_ends = ranges.first[begins], ranges.last[ends - 1] + 1
        if _apart(key_begins, key_ends):
            columns = (begins.tolist(), ends.tolist(), key_begins.tolist(), key_ends.tolist())
            segments = [Segment(*numbers, causal) for numbers in zip(*columns, strict=True)]
            return Recognised("document", _document_text(segments, ranges), ranges.shape, {}, segments)
    return None


def _apart(begins: np.ndarray, ends: np.ndarray) -> bool:
    """Whether no two of these ranges, sorted or not, share a key."""
    begins, ends = begins[ends > begins], ends[ends > begins]
    order = np.argsort(begins, kind="stable")
    return bool((begins[order][1:] >= ends[order][:-1]).all())


def _document_text(segments: list[Segment], ranges: Ranges) -> str:
    rows, keys = ([segment[i + 1] - segment[i] for segment in segments] for i in (0, 2))
    kind = "causal" if segments[0].causal else "full"
    sizes = f"{_span(rows, 'query', 'queries')} and {_span(keys, 'key')}"
    seen = (ranges.last - ranges.first + 1).sum() / max(1, ranges.num_queries * ranges.num_keys)
    documents = f"{_count(len(segments), 'document')} side by side, each {kind}, of {sizes}"
    return f"{documents} ({_size_text(ranges.shape)}, {seen:.1%} of the mask)"


def _span(counts: list[int], word: str, words: str = "") -> str:
    most = _count(max(counts), word, words)
    return most if min(counts) == max(counts) else f"{min(counts)} to {most}"


def _segment_ranges(recognised: Recognised) -> Ranges:
    parts = []
    for segment in recognised.segments:
        rows, keys = segment.row_end - segment.row_begin, segment.key_end - segment.key_begin
        part = windowed((rows, keys), None, 0 if segment.causal else None, "bottom_right")
        shift = np.where(part.last < 0, 0, segment.key_begin)
        parts.append((part.first + shift, part.last + shift))
    first, last = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    return Ranges(first, last, recognised.shape[1])


def _intervals(ranges: Ranges) -> Recognised:
    counts = ranges.last - ranges.first + 1
    text = f"one range of {_span([int(counts.min()), int(counts.max())], 'key')} for each query"
    return Recognised(
        "intervals",
        f"{text} ({_size_text(ranges.shape)})",
        ranges.shape,
        first_keys=_int32(ranges.first),
        last_keys=_int32(ranges.last),
    )


def _tree(mask: np.ndarray) -> Recognised | None:
    """Everything before the last [queries, queries], and of that themselves and what their parents see."""
    num_queries, num_keys = mask.shape
    if num_keys < num_queries or not mask[:, : num_keys - num_queries].all():
        return None
    parents = _parents(mask[:, num_keys - num_queries :])
    if parents is None:
        return None
    depths = np.zeros(num_queries, np.int64)
    for i, parent in enumerate(parents.tolist()):
        depths[i] = depths[parent] + 1 if parent >= 0 else 0
    roots, past = int((parents < 0).sum()), num_keys - num_queries
    text = (
        f"a tree of {_count(num_queries, 'query', 'queries')} ({_count(roots, 'root')}, {depths.max() + 1} deep) "
        f"after a past of {_count(past, 'key')}"
    )
    return Recognised("tree", text, (num_queries, num_keys), {"parents": parents, "columns": num_queries})


def _parents(square: np.ndarray) -> np.ndarray | None:
    """Each row's parent, the last of those it sees before itself (-1: none), or None where it is no tree."""
    size = len(square)
    before = np.tri(size, k=-1, dtype=np.bool_) & square
    if not square.diagonal().all() or np.count_nonzero(square) != np.count_nonzero(before) + size:
        return None
    parents = np.where(before.any(axis=1), size - 1 - before[:, ::-1].argmax(axis=1), -1)
    inherited = square[parents]
    inherited[parents < 0] = False
    return _int32(parents) if np.array_equal(inherited, before) else None


def _ancestors(parents: np.ndarray) -> np.ndarray:
    seen = np.eye(len(parents), dtype=np.bool_)
    for i, parent in enumerate(parents.tolist()):
        if parent >= 0:
            seen[i] |= seen[parent]
    return seen


def _dense(mask: np.ndarray) -> Recognised:
    seen_by_all = mask.all(axis=0)
    columns = mask.shape[1] - int(seen_by_all.argmin())
    share = np.count_nonzero(mask) / mask.size
    text = f"no structure: {share:.1%} of {columns} columns are read as they are ({_size_text(mask.shape)})"
    if columns < mask.shape[1]:
        share = np.count_nonzero(mask[:, -columns:]) / (columns * mask.shape[0])
        text = f"no structure in the last {columns} columns, {share:.1%} of them seen ({_size_text(mask.shape)})"
    return Recognised("dense", text, (mask.shape[0], mask.shape[1]), {"columns": columns})
