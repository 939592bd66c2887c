"""Rounds of samples: in turns, as many as there is time for, and an engine that fails stops none of the others."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.bench import versus_rounds
from headrace.bench.engines import READ
from headrace.bench.peer_process import PeerFailed
from headrace.bench.versus_rounds import REPEAT, Texts, rounds


def test_every_round_begins_with_the_next_and_the_first_only_warms_up() -> None:
    order: list[str] = []
    row = rounds({name: lambda name=name: float(order.append(name) or len(order)) for name in "abc"})  # type: ignore[misc]
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"
    assert row.samples["a"] == [6, 8, 10, 15, 17] and len(row.samples["c"]) == REPEAT


def test_a_round_longer_than_the_row_is_the_measurement() -> None:
    row = rounds({"a": lambda: 1.0}, row_s=0.0)
    assert row.samples == {"a": [1.0]}


def test_rounds_fit_into_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(versus_rounds, "perf_counter", lambda: clock[0])

    def sample() -> float:
        clock[0] += 10.0
        return 1.0

    assert len(rounds({"a": sample}, row_s=35.0).samples["a"]) == 3  # besides the one that warmed up
    assert len(rounds({"a": sample}, row_s=1000.0).samples["a"]) == REPEAT
    samples = rounds({"a": sample, "b": lambda: 2.0}, row_s=35.0).samples  # half of the time for each
    assert len(samples["a"]) == 1 and len(samples["b"]) == REPEAT


def test_an_engine_that_fails_is_out_and_said() -> None:
    taken: list[int] = []

    def fails_later() -> float:
        taken.append(1)
        if len(taken) == 3:
            raise PeerFailed("it ended")
        return 1.0

    found = rounds({"bad": fails_later, "good": lambda: 2.0, READ: lambda: 7.0}).found()
    assert set(found) == {"bad", "good"} and len(taken) == 3
    assert found["bad"].spread is None and found["bad"].why_not == "it ended"
    assert found["good"].spread and found["good"].spread.count == REPEAT and found["good"].read == 7.0


def test_texts_are_fresh_and_of_the_vocabulary() -> None:
    texts = Texts.of(1000, 50)
    fresh = [texts.fresh(50) for _ in range(3)]
    assert len({tuple(ids) for ids in [texts.held, *fresh]}) == 4
    assert np.ravel(fresh).min() >= 0 and np.ravel(fresh).max() < 1000
