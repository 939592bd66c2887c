"""Repeated measurements: the middle, the ends, and who goes first."""

from __future__ import annotations

import pytest

from headrace.bench import timing
from headrace.bench.timing import Spread, alternate, call_seconds


def test_spread_is_the_middle_and_the_ends() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([4.0, 1.0]).median == 2.5
    assert str(Spread(12.345, 1.0, 99.96, 5)) == "12.3 (1.0-100.0, 5)"
    assert str(Spread(1234.5, 1000.0, 2000.0, 5)) == "1234 (1000-2000, 5)"


def test_every_round_has_each_once_and_another_first() -> None:
    calls: list[str] = []

    def sampler(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = alternate({name: lambda name=name: sampler(name) for name in "abc"}, 4, lambda: calls.append("."))
    assert "".join(calls) == ".a.b.c.b.c.a.c.a.b.a.b.c"
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert samples["a"] == [2.0, 12.0, 16.0, 20.0]


def test_nobody_takes_no_turns() -> None:
    assert alternate({}, 3) == {}


@pytest.mark.parametrize("each_s,calls", [(1e-6, 500), (1e-4, 5), (1e-3, 2), (1.0, 1)])
def test_short_calls_are_many_and_long_ones_few(monkeypatch: pytest.MonkeyPatch, each_s: float, calls: int) -> None:
    made = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: len(made) * each_s)
    assert call_seconds(lambda: made.append(0), 5e-4) == pytest.approx(each_s)
    assert calls <= len(made) <= 4 * calls + 2
