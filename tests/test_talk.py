"""What is said on stderr: progress only for what lasts, and the line that ends an answer."""

from __future__ import annotations

import dataclasses

import pytest
from fake_llm import Completion, Timings

from headrace import talk
from headrace.talk import ProgressLine, speed_line

DONE = Completion("m", "t", [1, 2], [1], "stop", Timings(0.1, 0.2, 0.3, 100.0, 50.0), 10, 4.0, 0.5, "abc")


def test_the_last_line_has_every_figure() -> None:
    assert speed_line(DONE) == (
        "prefill 100.0 tokens/s | decode 50.0 tokens/s | 4.0 GB/s | 50% of the 8.0 GB/s roof | logits abc"
    )


def test_figures_that_do_not_exist_are_not_made_up() -> None:
    unknown = dataclasses.replace(DONE, roof_fraction=None)
    assert speed_line(unknown) == "prefill 100.0 tokens/s | decode 50.0 tokens/s | 4.0 GB/s | logits abc"
    one_token = dataclasses.replace(DONE, timings=Timings(0.1, 0.2, 0.0, 100.0, 0.0), gb_per_s=0.0, roof_fraction=0.0)
    assert speed_line(one_token) == "prefill 100.0 tokens/s | decode - | logits abc"


def test_progress_is_silent_for_a_second_and_then_rare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(talk.time, "monotonic", lambda: now)
    with ProgressLine() as progress:
        for now in (100.0, 100.5, 101.0, 102.0, 110.9, 111.0):
            progress("loading", round(now - 100), 20)
        now = 111.5
        progress("packing", 0, None)
        now = 113.0
        progress("packing", 0, None)
    assert capsys.readouterr().err.splitlines() == ["loading 5%", "loading 55%", "packing"]


def test_a_terminal_gets_one_line_that_is_wiped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(talk, "_QUIET_S", 0.0)
    monkeypatch.setattr(talk, "_TERMINAL_PERIOD_S", 0.0)
    monkeypatch.setattr(talk.sys.stderr, "isatty", lambda: True)
    with ProgressLine() as progress:
        progress("loading a file", 1, 2)
        progress("done", 1, None)
    assert capsys.readouterr().err == "\rloading a file 50%\rdone              \r    \r"
