"""Engines together: who fits into memory, and who would take too long to fill its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.bench import engines
from headrace.bench.engines import Engine, Field
from headrace.bench.peer_process import PeerFailed
from headrace.bench.peers import Opening


class Asked:
    """A process that is there and answers nothing."""

    alive = True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, call: str, *given: Any, way: str) -> float:
        self.asked.append(call)
        return 5.0


@pytest.fixture
def process() -> Asked:
    return Asked()


def engine(process: Any) -> Engine:
    return Engine("x", "x", "", process)


def test_a_cache_that_would_take_too_long_to_fill_is_not_filled(
    process: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr(engines, "FILL_S", 10.0)
    monkeypatch.setattr(engines, "perf_counter", lambda: float(next(seconds)))  # everything takes a second
    one = engine(process)
    one.hold([1] * 16)
    one.hold([1] * 116)  # a hundred more: 6 s at the speed of the first ones
    one.hold([1] * 136)  # few at a time are slower, which is no reason to expect less of many
    with pytest.raises(PeerFailed, match="filling 1200 tokens would take 11 s"):
        one.hold([1] * 1200)
    with pytest.raises(PeerFailed, match="filling 1002 tokens would take 10 s"):
        one.hold([2] * 1002)  # another text is filled from its beginning
    assert process.asked == ["hold"] * 3


def test_few_tokens_tell_nothing_of_the_speed(process: Asked) -> None:
    one = engine(process)
    one.prefill([1] * 4)
    assert one.fill_rate == 0.0
    assert one.prefill([1] * 40) == 5.0 and one.fill_rate > 0


def test_engines_that_do_not_fit_together_come_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))
    entries = Field(("headrace", "llama.cpp", "transformers"), Opening(str(path), 1), weights=1000)
    assert entries.groups(10_101) == [("headrace", "llama.cpp", "transformers")]  # 1100 + 1000 + 6000 + 2 x the file
    assert entries.groups(10_100) == [("headrace",), ("llama.cpp",), ("transformers",)]
    assert entries.groups(5000) == [("headrace", "llama.cpp")]
    assert entries.too_large("transformers", 5000) and not entries.too_large("headrace", 5000)


def test_peers_are_told_the_instruction_set(tmp_path: Path) -> None:
    entries = Field((), Opening("x", 1, isa="avx2"), 0, llama_lib=tmp_path)
    assert entries.environment("llama.cpp") == {"LLAMA_CPP_LIB_PATH": str(tmp_path)}
    assert entries.environment("transformers")["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert Field((), Opening("x", 1), 0).environment("transformers") == {}
