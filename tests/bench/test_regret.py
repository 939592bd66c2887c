"""Regret: what is counted as one, and what as noise."""

from __future__ import annotations

import pytest

from headrace.bench import regret
from headrace.bench.regret import measure, middle_half, regret_of, summary
from headrace.bench.subjects import Subject, subjects
from headrace.check import cases
from headrace.check.attention_cases import PAGED
from headrace.ops.select import Kernel, Reason, Request, Traffic

STEADY = [1.0, 1.01, 1.02, 1.03, 1.04]


def subject(**seconds: float) -> Subject:
    """Kernels with these predicted seconds; the first of them in name order is the fastest in truth."""
    kernels = tuple(
        Kernel(name, lambda request: [], lambda *_, cost=cost: cost, print) for name, cost in seconds.items()
    )
    return Subject("toy/one", Request("toy", {}, {}, Traffic(1, 1)), kernels, lambda name: name)


def test_the_fastest_has_no_regret() -> None:
    found = regret_of("s", "a", {"a": STEADY, "b": [2 * s for s in STEADY]})
    assert (found.ratio, found.fastest, found.beyond_noise, found.flagged) == (1.0, "a", False, False)


def test_a_slower_choice_is_flagged_when_the_middle_halves_are_apart() -> None:
    found = regret_of("s", "a", {"a": [1.2 * s for s in STEADY], "b": STEADY})
    assert found.ratio == pytest.approx(1.2) and found.fastest == "b" and found.flagged


def test_a_slower_median_within_noise_is_not_flagged() -> None:
    found = regret_of("s", "a", {"a": [1.0, 1.0, 1.3, 1.4, 1.5], "b": STEADY})
    assert found.ratio > regret.GOAL and not found.beyond_noise and not found.flagged
    assert regret.row(found)[-1] == "within noise"


def test_less_than_the_goal_is_not_flagged_however_sure() -> None:
    found = regret_of("s", "a", {"a": [1.03] * 5, "b": [1.0] * 5})
    assert found.beyond_noise and not found.flagged and regret.row(found)[-1] == ""


def test_the_middle_half() -> None:
    assert middle_half([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 4.0)
    assert middle_half([7.0]) == (7.0, 7.0)


def test_kernels_take_turns_and_hopeless_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    true_seconds, calls = {"quick": 1.0, "chosen": 1.02, "hopeless": 9.0}, []

    def timed(call: object) -> float:
        calls.append(call())  # type: ignore[operator]
        return true_seconds[calls[-1]]

    monkeypatch.setattr(regret, "call_seconds", timed)
    found = measure(subject(chosen=1e-6, quick=2e-6, hopeless=3e-6), 5)
    assert found and (found.chosen, found.fastest) == ("chosen", "quick")
    assert calls.count("hopeless") == 1 and calls.count("chosen") == calls.count("quick") == 6


def test_a_regret_is_measured_again_before_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def timed(call: object) -> float:
        calls.append(call())  # type: ignore[operator]
        return 1.0 if calls[-1] == "quick" or len(calls) > 12 else 2.0

    monkeypatch.setattr(regret, "call_seconds", timed)
    found = measure(subject(chosen=1e-6, quick=2e-6), 5)
    assert found and not found.flagged and found.spreads["chosen"].count == 15


def test_one_kernel_alone_has_no_regret() -> None:
    assert measure(subject(only=1.0), 5) is None
    no = Kernel("no", lambda request: [Reason("a", "b", "c")], lambda *_: 1.0, print)
    assert measure(Subject("toy/none", Request("toy", {}, {}, Traffic(1, 1)), (no,), print), 5) is None


def test_the_summary_tells_noise_from_regret() -> None:
    noisy = regret_of("noisy", "a", {"a": [1.0, 1.0, 1.6, 1.7, 1.8], "b": STEADY})
    real = regret_of("real", "a", {"a": [1.2] * 5, "b": [1.0] * 5})
    fine = regret_of("fine", "a", {"a": STEADY})
    found = summary([noisy, real, fine])
    assert found["cases"] == 3 and found["median"] == pytest.approx(1.2)
    assert found["worst"] > found["worst_beyond_noise"] == pytest.approx(1.2) and found["over_goal"] == ["real"]
    assert summary([])["median"] == 1.0
    assert regret.data(real)["seconds"]["b"] == {"median": 1.0, "min": 1.0, "max": 1.0, "n": 5}


def test_every_named_case_is_a_subject_that_runs() -> None:
    found = {each.name: each for each in subjects() if "large" not in each.name}
    assert {f"rms_norm/{case.name}" for case in cases.NORM} <= set(found)
    assert {f"paged_attention/{case.name}/bfloat16" for case in PAGED} <= set(found)
    assert {f"linear/{case.name}/Q4_0" for case in cases.LINEAR} <= set(found)
    for each in found.values():
        each.run(each.able()[0])
