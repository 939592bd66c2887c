"""Shared memory and barriers of a simulated kernel, with vector clocks that tell whether accesses are in order.

A clock has a number for each partition (how often it released something), for each partition's products (groups that
are known to be complete) and for each barrier (phases known to be complete). Whoever waits for a barrier learns what
those who arrived knew. An access is in order when what it must follow is no later than its partition's clock: a read
behind the last write, a write or a copy behind that and all reads since. A store must moreover be fenced and behind a
barrier of its partition before a product reads it, and fenced before a copy lands on it.

Memory is a line of elements in pieces of 4096 (a 64 x 64 tile), plain vectors in pieces of 64. A [rows, columns] view
is panels of 64 columns, as the 128-byte swizzle has it; the swizzle itself is a matter of the addresses, left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace.check.gluon_values import NUMPY_TYPES, Tensor, raw

Event = tuple[str, int, int]  # kind ("partition", "products", "barrier"), its number, its time
Clock = dict[tuple[str, int], int]


class OutOfOrder(AssertionError):
    """An access that no barrier orders behind what it must follow, or an arrival in a phase that is full."""


class Clocks:
    """What each partition knows to have happened."""

    def __init__(self) -> None:
        self.of: list[Clock] = [defaultdict(int)]
        self.of[0]["partition", 0] = 1

    def fork(self, partitions: int) -> None:
        """All begin with what the first knows."""
        before = self.of[0]
        before["partition", 0] += 1
        self.of = [defaultdict(int, before) for _ in range(partitions)]
        for number, clock in enumerate(self.of):
            clock["partition", number] += 1

    def now(self, partition: int) -> Event:
        return "partition", partition, self.of[partition]["partition", partition]

    def released(self, partition: int) -> Clock:
        """A copy of what it knows; what it does from now on is later."""
        told = defaultdict(int, self.of[partition])
        self.of[partition]["partition", partition] += 1
        return told

    def learned(self, partition: int, told: Clock) -> None:
        join(self.of[partition], told)

    def products_done(self, partition: int, groups: int) -> None:
        clock = self.of[partition]
        clock["products", partition] = max(clock["products", partition], groups)

    def knows(self, partition: int, event: Event) -> bool:
        kind, number, time = event
        return (kind, number) == ("partition", partition) or self.of[partition][kind, number] >= time


def join(clock: Clock, other: Clock) -> None:
    for key, time in other.items():
        clock[key] = max(clock[key], time)


@dataclass
class _Barrier:
    count: int
    pending: int
    num_bytes: int = 0  # expected and not landed
    phases: int = 0  # complete
    arriving: Clock = field(default_factory=lambda: defaultdict(int))
    complete: Clock = field(default_factory=lambda: defaultdict(int))


class Barriers:
    """mbarriers: a phase is complete when all have arrived and all bytes have landed."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self._all: dict[int, _Barrier] = {}

    @staticmethod
    def number(bar: Shared) -> int:
        return bar.offset

    def init(self, bar: Shared, count: int) -> None:
        self._all[bar.offset] = _Barrier(count, count)

    def order(self, bar: Shared) -> int:
        """Which of all barriers it is, in the order in which they were initialised."""
        return list(self._all).index(bar.offset)

    def passed(self, number: int, parity: int) -> bool:
        """Whether the phase of this parity is complete, as the hardware tells it: from the phase under way."""
        return self._all[number].phases % 2 != parity

    def phase(self, number: int) -> int:
        """The number of phases that will be complete with the one under way."""
        return self._all[number].phases + 1

    def acquire(self, number: int, partition: int) -> None:
        self.clocks.learned(partition, self._all[number].complete)

    def expect(self, number: int, num_bytes: int) -> None:
        self._all[number].num_bytes += num_bytes

    def arrive(self, number: int, partition: int, count: int) -> None:
        barrier = self._all[number]
        join(barrier.arriving, self.clocks.released(partition))
        barrier.pending -= count
        if barrier.pending < 0:
            raise OutOfOrder(f"barrier {number}: more arrivals in a phase than its {barrier.count}")
        self._perhaps_complete(number)

    def landed(self, number: int, num_bytes: int) -> None:
        barrier = self._all[number]
        barrier.num_bytes -= num_bytes
        assert barrier.num_bytes >= 0, f"barrier {number}: more bytes than expected"
        self._perhaps_complete(number)

    def _perhaps_complete(self, number: int) -> None:
        barrier = self._all[number]
        if barrier.pending or barrier.num_bytes:
            return
        barrier.phases += 1
        barrier.arriving["barrier", number] = barrier.phases
        join(barrier.complete, barrier.arriving)
        barrier.pending = barrier.count


class Shared:
    """A view of shared memory."""

    def __init__(
        self, memory: Memory, line: np.ndarray, offset: int, shape: Sequence[int], turned: bool = False
    ) -> None:
        self.memory, self.line, self.offset, self.turned = memory, line, offset, turned
        self.shape = list(shape)
        self.dtype = line.dtype.type

    def index(self, number: Any) -> Shared:
        shape, at = self.shape[1:], int(raw(number))
        assert 0 <= at < self.shape[0], f"index {at} of {self.shape[0]}"
        size = math.prod(shape) if self.line.dtype != np.int64 else 1
        return Shared(
            self.memory, self.line[at * math.prod(shape) :][: math.prod(shape)], self.offset + at * size, shape
        )

    def permute(self, order: Sequence[int]) -> Shared:
        assert tuple(order) == (1, 0)
        return Shared(self.memory, self.line, self.offset, self.shape, not self.turned)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        assert math.prod(shape) == math.prod(self.shape) and dtype == self.dtype
        return Shared(self.memory, self.line, self.offset, [int(raw(n)) for n in shape])

    def numbers(self) -> np.ndarray:
        rows, columns = self._sizes()
        found = self.line.reshape(-1, rows, min(columns, 64)).transpose(1, 0, 2).reshape(rows, columns)
        return found.T if self.turned else found.reshape(self.shape)

    def put(self, values: np.ndarray) -> None:
        rows, columns = self._sizes()
        panels = np.asarray(values).reshape(rows, -1, min(columns, 64)).transpose(1, 0, 2)
        self.line[:] = panels.reshape(-1).astype(self.line.dtype)

    def _sizes(self) -> tuple[int, int]:
        return (math.prod(self.shape[:-1]), self.shape[-1]) if len(self.shape) > 1 else (1, self.shape[0])

    def load(self, layout: Any) -> Tensor:
        self.memory.simulated_load(self)
        return Tensor(self.numbers().copy())

    def store(self, value: Any) -> None:
        assert raw(value).dtype == self.line.dtype, f"{raw(value).dtype} into memory of {self.line.dtype}"
        assert list(raw(value).shape) == self.shape, f"{raw(value).shape} into memory of shape {self.shape}"
        self.memory.simulated_store(self)
        self.put(raw(value))


@dataclass
class _Piece:
    """Who wrote it last and how, and who has read it since."""

    write: Event | None = None
    by_store: bool = False
    fenced: bool = True
    synchronized: bool = True
    reads: set[Event] = field(default_factory=set)


class Memory:
    """All allocations of a program, and the order of what is done to them."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.current = lambda: 0
        self._end = 0
        self._pieces: dict[int, _Piece] = defaultdict(_Piece)

    def allocate(self, dtype: Any, shape: Sequence[Any], layout: Any, value: Any = None) -> Shared:
        sizes = [int(raw(n)) for n in shape]
        line = np.full(math.prod(sizes), -1 if dtype == np.int64 else np.nan).astype(NUMPY_TYPES.get(dtype, dtype))
        offset, self._end = self._end, self._end + -(-line.size // 4096) * 4096
        return Shared(self, line, offset, sizes)

    def _pieces_of(self, view: Shared) -> list[_Piece]:
        size = 4096 if view.line.dtype.itemsize == 2 else 64
        first, last = view.offset // size, (view.offset + view.line.size - 1) // size
        assert view.line.size % size == 0, f"a view of {view.line.size} elements is no whole number of pieces"
        return [self._pieces[n * size] for n in range(first, last + 1)]

    def read(self, view: Shared, partition: int, product: int | None = None) -> None:
        """By a product (its number), or by a load."""
        event: Event = self.clocks.now(partition) if product is None else ("products", partition, product)
        for piece in self._pieces_of(view):
            self._demand(piece.write is not None, view, partition, "reads what nobody wrote")
            self._follow(view, partition, "reads", [piece.write])
            if product is not None and piece.by_store:
                self._demand(piece.fenced, view, partition, "multiplies a store without fence_async_shared")
                self._demand(piece.synchronized, view, partition, "multiplies what its own warps may not have stored")
            piece.reads.add(event)

    def simulated_load(self, view: Shared) -> None:
        self.read(view, self.current())

    def simulated_store(self, view: Shared) -> None:
        partition = self.current()
        for piece in self._pieces_of(view):
            self._follow(view, partition, "stores to", [piece.write, *piece.reads])
            piece.write, piece.by_store = self.clocks.now(partition), True
            piece.fenced = piece.synchronized = False
            piece.reads = set()

    def copied(self, view: Shared, partition: int, barrier: int, phase: int) -> None:
        """A copy is issued whose arrival is told by this phase of a barrier."""
        for piece in self._pieces_of(view):
            self._follow(view, partition, "copies to", [piece.write, *piece.reads])
            self._demand(piece.fenced, view, partition, "copies over a store without fence_async_shared")
            piece.write, piece.by_store, piece.fenced, piece.synchronized = (
                ("barrier", barrier, phase),
                False,
                True,
                True,
            )
            piece.reads = set()

    def fence(self, partition: int) -> None:
        for piece in self._stored_by(partition):
            piece.fenced = True

    def synchronized(self, partition: int) -> None:
        """The partition's warps met: what they stored and fenced, all of them may use."""
        for piece in self._stored_by(partition):
            piece.synchronized = piece.fenced

    def _stored_by(self, partition: int) -> list[_Piece]:
        return [p for p in self._pieces.values() if p.by_store and p.write and p.write[1] == partition]

    def _follow(self, view: Shared, partition: int, does: str, events: Sequence[Event | None]) -> None:
        for event in events:
            known = event is None or self.clocks.knows(partition, event)
            self._demand(known, view, partition, f"{does} memory without knowing of {event}")

    def _demand(self, holds: bool, view: Shared, partition: int, told: str) -> None:
        if not holds:
            raise OutOfOrder(f"partition {partition} {told}: {view.shape} at {view.offset}")
