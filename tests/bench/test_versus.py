"""`bench versus`: everyone gets tokens of their own in turns, and a missing peer is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headrace.bench import peers, versus
from headrace.bench.model import random_ids
from headrace.check.fakes import write_tiny_model
from headrace.config import KV_DTYPES
from headrace.errors import ArgumentError
from headrace.llm import LLM
from headrace.talk import ProgressLine


class Counting:
    """A peer of constant speed that remembers what it was given."""

    def __init__(self, name: str, speed: float) -> None:
        self.name, self._speed = name, speed
        self.held: list[int] = []
        self.given: list[tuple[str, tuple[int, ...]]] = []

    def hold(self, ids: list[int]) -> None:
        self.held = ids

    def prefill(self, ids: list[int]) -> float:
        self.given.append(("prefill", tuple(ids)))
        return self._speed

    def decode(self, ids: list[int]) -> float:
        self.given.append(("decode", tuple(ids)))
        return self._speed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versus, "_SETTLE_S", 0.0)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_all_hold_the_same_and_compute_fresh_tokens(phase: str) -> None:
    chance = np.random.default_rng(1)
    engines = {"headrace": Counting("headrace", 30.0), "other": Counting("other", 20.0)}
    case = versus.Case(phase, 7, 3)
    spreads = versus.measure(engines, case, lambda length: chance.integers(0, 1 << 40, length).tolist())
    assert engines["headrace"].held == engines["other"].held and len(engines["other"].held) == 7
    given = [ids for engine in engines.values() for _, ids in engine.given]
    assert len(given) == len(set(given)) == 2 * (versus.REPEAT + 1)  # one round warms up
    assert {name for engine in engines.values() for name, _ in engine.given} == {phase}
    assert all(spread.count == versus.REPEAT for spread in spreads.values())
    table = versus.versus_table({case: spreads}).splitlines()
    assert len(table) == 3 and table[2].endswith("1.50 x")


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ArgumentError, match="nobody"):
        versus.bench_versus("smollm2", ("nobody",), progress=ProgressLine())


def test_without_peers_headrace_is_measured_alone(
    default_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versus, "CASES", (versus.Case("prefill", 0, 4), versus.Case("decode", 3, 2)))
    monkeypatch.setattr(versus, "missing_modules", lambda name: ["that_module"])
    versus.bench_versus(str(default_model_path), ("llama.cpp", "transformers"), progress=ProgressLine())
    out, err = capsys.readouterr()
    assert err.count("left out, not installed: that_module") == 2
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [list(row["engines"]) for row in rows] == [["headrace"], ["headrace"]]
    assert all(row["engines"]["headrace"]["ratio"] == 1.0 for row in rows)


def test_everyone_has_the_type_of_cache_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def opened(path: Path, threads: int, context_len: int, kv_dtype: str) -> list[Counting]:
        asked.append(kv_dtype)
        return [Counting("other", 1.0)]

    monkeypatch.setattr(versus, "CASES", (versus.Case("decode", 3, 2),))
    monkeypatch.setattr(versus, "PEERS", {"other": ((), opened)})
    monkeypatch.setattr(versus, "missing_modules", lambda name: [])
    path = write_tiny_model(tmp_path / "tiny.gguf")
    data = versus.bench_versus(str(path), ("other",), kv_dtype="int8", progress=ProgressLine())
    assert asked == [data["kv_dtype"]] == ["int8"]
    assert "other" in capsys.readouterr().out


def test_llama_cpp_has_a_cache_of_as_many_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, threads: int, context_len: int, *, flash_attention: bool, cache: tuple[str, int]) -> object:
        return flash_attention, cache[0]

    monkeypatch.setattr(peers, "LlamaCpp", opened)
    names = {kv_dtype: peers._llama_cpps(Path("x"), 1, 8, kv_dtype) for kv_dtype in KV_DTYPES}
    assert names == {
        "float32": [(False, "F32"), (True, "F32")],
        "float16": [(False, "F16"), (True, "F16")],
        "bfloat16": [(False, "BF16"), (True, "BF16")],
        "float8_e4m3fn": [(False, "F16"), (True, "F16")],  # it has no float8
        "int8": [(True, "Q8_0")],
        "int4": [(True, "Q4_0")],
    }


def test_headrace_computes_only_behind_what_it_holds(default_model_path: Path) -> None:
    llm = LLM(default_model_path, threads=1, context_len=128)
    chance = np.random.default_rng(2)
    engine = peers.Headrace(llm)
    engine.hold(random_ids(llm, 20, chance))
    assert engine.prefill(random_ids(llm, 6, chance)) > 0
    stream = llm.stream([*engine._held, *random_ids(llm, 6, chance)])
    next(iter(stream))
    assert stream.completion.timings.prefill_tokens_per_s * stream.completion.timings.prefill_s == pytest.approx(6)
