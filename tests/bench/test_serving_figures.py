"""Latencies, rates and goodput of loads whose every time is known."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from headrace.bench.serving_answer import Answer
from headrace.bench.serving_client import Outcome, Run
from headrace.bench.serving_figures import Figures, in_flight, ttft_s
from headrace.bench.serving_parts import Reading, StepParts, read_metrics


def outcome(due: float, times: list[float], *, started: float = 0.0, tokens: int = 0, error: str = "") -> Outcome:
    answer = Answer(200, error, "x" * len(times), times, "length", 10, tokens or len(times))
    return Outcome(due, started or due, times[-1] if times else due, answer)


def figures(outcomes: list[Outcome], ttft_s: float = 0.5, tpot_s: float = 0.1) -> Figures:
    return Figures(Run(outcomes, 10.0, 0.5), ttft_s, tpot_s)


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = outcome(1.0, [3.0, 3.1, 3.2], started=2.9)  # the client was held up: that is the server's time, too
    assert ttft_s(late) == 2.0
    found = figures([late, outcome(0.0, [0.25, 0.35, 0.75])]).percentiles
    assert found["ttft"]["p50_ms"] == pytest.approx(1125) and found["ttft"]["p99_ms"] == pytest.approx(1982.5)
    assert found["tpot"]["p50_ms"] == pytest.approx((100 + 250) / 2)
    assert found["gap"]["p50_ms"] == pytest.approx(100)
    assert found["end_to_end"]["p95_ms"] == pytest.approx(750 + 0.95 * (2200 - 750))


def test_rates_are_over_the_whole_load() -> None:
    data = figures([outcome(0.0, [1.0, 2.0]), outcome(2.0, [3.0, 4.0], tokens=6)]).data()
    assert data["seconds"] == 4 and data["requests_per_s"] == 0.5
    assert data["tokens_in_per_s"] == 5 and data["tokens_out_per_s"] == 2
    assert data["client_cpu_share"] == 0.05


def test_goodput_is_of_whole_answers_within_both_limits() -> None:
    outcomes = [
        outcome(0.0, [0.4, 0.5]),
        outcome(0.0, [0.6, 0.7]),  # late
        outcome(0.0, [0.1, 1.0]),  # slow
        outcome(0.0, [0.1, 0.2], error="cut short"),
        outcome(0.0, []),
    ]
    found = figures(outcomes)
    assert found.data()["goodput"]["share"] == 1 / 5 and found.data()["whole"] == 3
    assert found.errors == {"cut short": 1, "no text": 1}
    said = found.text()
    assert "1 x cut short, 1 x no text" in said and "goodput: 20%" in said and "TTFT" in said


def test_tokens_while_all_answer() -> None:
    both = [outcome(0.0, [1.0, 2.0, 3.0, 4.0]), outcome(0.0, [2.0, 3.0, 4.0, 5.0])]
    assert figures(both).steady_tokens_per_s == 2
    apart = [outcome(0.0, [1.0, 2.0]), outcome(0.0, [3.0, 4.0])]
    assert figures(apart).steady_tokens_per_s is None


def test_requests_on_their_way() -> None:
    assert in_flight([outcome(0.0, [3.0]), outcome(1.0, [2.0])]) == ([0, 1, 2, 3], [1, 2, 1, 0])


def test_a_picture_has_the_limits_and_all_four_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    from headrace.bench.serving_plot import draw

    draw(figures([outcome(0.0, [1.0, 2.0]), outcome(0.5, [], error="left")]), tmp_path / "x.svg", "the title")
    texts = [each.text for each in ElementTree.parse(tmp_path / "x.svg").iter() if each.tag.endswith("}text")]
    assert {"the title", "limit: 500 ms", "limit: 100 ms", "ms to the first token"} <= set(texts)
    assert {"tokens/s", "requests on their way"} <= set(texts)


METRICS = """
# HELP headrace:engine_steps_total Steps of the engine.
headrace:engine_steps_total{model_name="a"} 10.0
headrace:engine_steps_total{model_name="b"} 5.0
headrace:engine_step_seconds_total{model_name="a"} 0.5
headrace:engine_native_seconds_total{model_name="a"} 0.25
headrace:event_loop_cpu_seconds_total 0.125
headrace:clock_seconds 3.0
"""


def test_readings_are_taken_from_metrics() -> None:
    assert read_metrics(METRICS) == Reading(3.0, 15, 0.5, 0.25, 0.125)
    assert read_metrics(METRICS.replace("headrace", "vllm")) is None


def test_a_step_is_made_of_its_parts() -> None:
    first, last = Reading(1.0, 10, 0.5, 0.25, 0.1), Reading(2.0, 14, 1.3, 0.85, 0.2)
    parts = StepParts.between(first, last)
    assert parts is not None and parts.steps == 4 and parts.wall_s == 0.25
    assert parts.native_s + parts.engine_s + parts.between_s == pytest.approx(parts.wall_s)
    assert parts.loop_s == pytest.approx(0.025) and parts.overhead == pytest.approx((0.05 + 0.05 + 0.025) / 0.25)
    assert "(60.0%)" in str(parts) and StepParts.between(first, first) is None
