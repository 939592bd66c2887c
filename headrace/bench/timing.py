"""Repeated measurements: their middle and their spread, and taking turns so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LONG = 50


@dataclass(frozen=True)
class Spread:
    """Some measurements of one thing, in any unit."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def __str__(self) -> str:
        digits = 1 if self.median < 1000 else 0
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f}, {self.count})"


def call_seconds(call: Callable[[], object], at_least_s: float = 5e-4) -> float:
    """Seconds per call, over as many calls in a row as take `at_least_s`; a call before them warms up.

    A first call that takes far longer than that is the measurement: warm or not makes no difference to it.
    """
    begin = time.perf_counter()
    call()
    calls, seconds = 1, time.perf_counter() - begin
    if seconds >= _LONG * at_least_s:
        return seconds
    while True:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - begin
        if seconds >= at_least_s:
            return seconds / calls
        calls = max(2 * calls, int(1.1 * calls * at_least_s / max(seconds, 1e-9)))


def alternate(
    samplers: Mapping[str, Callable[[], float]], rounds: int, settle: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """One sample of each, round after round; every round begins with the next one. `settle` is called before each.

    What a machine does for others changes by the minute: only samples taken in turns may be compared.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            settle()
            samples[name].append(samplers[name]())
    return samples
