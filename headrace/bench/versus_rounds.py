"""Measuring a row: all engines in turns, round after round, with a plain read of memory among them.

An unmeasured round warms up. An engine whose samples take long gives fewer; where the first one alone exceeds its part
of the row's time, that one is the measurement. A sample of decode ends after its tokens or after `LIMIT_S`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from headrace.bench.engines import READ, Opened
from headrace.bench.peer_process import PeerFailed
from headrace.bench.timing import Spread
from headrace.bench.versus_cases import Case

REPEAT = 5
ROW_S = 45.0
LIMIT_S = 0.5

Sampler = Callable[[], float]


@dataclass(frozen=True)
class Found:
    """What a row found of one engine: figures, or the reason why there are none.

    `read`: bytes/s of a plain read in the same rounds. `roof`: the share of what the machine allows.
    """

    spread: Spread | None = None
    why_not: str = ""
    read: float | None = None
    roof: float | None = None


class Row:
    """Samples of a row, engine by engine."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def take(self, samplers: Mapping[str, Sampler], first: int) -> dict[str, float]:
        """One sample of each that has not failed, beginning with the one whose turn it is; the seconds they took."""
        names = [name for name in samplers if name not in self.failed]
        start = first % len(names) if names else 0
        taken_s = {}
        for name in names[start:] + names[:start]:
            begin = perf_counter()
            try:
                self.samples.setdefault(name, []).append(samplers[name]())
            except PeerFailed as failed:
                self.failed[name] = str(failed)
            taken_s[name] = perf_counter() - begin
        return taken_s

    def found(self) -> dict[str, Found]:
        """NOTE: an engine that failed in a later round has no figures: what it gave before is not comparable."""
        read = self.samples.get(READ)
        middle = Spread.of(read).median if read else None
        spreads = {
            name: Spread.of(taken) for name, taken in self.samples.items() if taken and name not in (READ, *self.failed)
        }
        found = {name: Found(spread, read=middle) for name, spread in spreads.items()}
        return found | {name: Found(why_not=why) for name, why in self.failed.items() if name != READ}


def rounds(samplers: Mapping[str, Sampler], row_s: float | None = None) -> Row:
    """REPEAT rounds; of an engine that takes long, as many samples as fit into its part of the row's time."""
    row = Row()
    part_s = (ROW_S if row_s is None else row_s) / max(len(samplers), 1)
    taken_s = row.take(samplers, 0)
    counts = {name: min(REPEAT, int(part_s / max(seconds, 1e-9))) for name, seconds in taken_s.items()}
    for name, count in counts.items():
        if count and name in row.samples:
            row.samples[name].clear()  # the first one warmed up
    for number in range(REPEAT):
        row.take({name: sampler for name, sampler in samplers.items() if number < counts[name]}, number + 1)
    return row


@dataclass(frozen=True)
class Texts:
    """Random tokens: a long text whose beginnings engines hold, and fresh ones for every sample."""

    vocab_size: int
    held: list[int]
    chance: np.random.Generator

    @classmethod
    def of(cls, vocab_size: int, longest: int) -> Texts:
        chance = np.random.default_rng()
        return cls(vocab_size, [int(token) for token in chance.integers(0, vocab_size, longest)], chance)

    def fresh(self, length: int) -> list[int]:
        return [int(token) for token in self.chance.integers(0, self.vocab_size, length)]


def measure(opened: Opened, case: Case, texts: Texts, read_bytes: int) -> dict[str, Found]:
    """Speeds of every open engine. `read_bytes`: what a step reads, and therefore what the plain read reads; or 0."""
    samplers: dict[str, Sampler] = {}
    failed: dict[str, str] = {}
    for name in opened.engines:
        if name == READ:
            if read_bytes:
                samplers[name] = lambda: opened.engines[READ].ask("read", read_bytes)
            continue
        try:
            samplers[name] = _sampler(opened, name, case, texts)
        except PeerFailed as why:
            failed[name] = str(why)
    row = rounds(samplers)
    row.failed |= failed
    for name, reason in row.failed.items():
        opened.fail(name, reason)
    gone = {name: Found(why_not=reason) for name, reason in opened.failed.items()}
    return gone | row.found()


def _sampler(opened: Opened, name: str, case: Case, texts: Texts) -> Sampler:
    """What takes one sample of an engine, which then holds what the row wants cached."""
    engine = opened.engines[name]
    if case.phase == "batch":
        engine.fill(texts.held[: case.depth], case.sequences)
        return lambda: engine.ask("decode_batch", case.sequences, case.tokens, LIMIT_S)
    engine.hold(texts.held[: case.depth])
    if case.phase == "prefill":
        return lambda: engine.prefill(texts.fresh(case.tokens))
    return lambda: engine.ask("decode", texts.fresh(case.tokens), LIMIT_S)
