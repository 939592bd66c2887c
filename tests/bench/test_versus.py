"""`bench versus` from the file to the document, beside an engine made of paper: every row has figures or a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.bench import engines, peers, versus, versus_file, versus_rounds
from headrace.bench.peer_llama_cpp import cache_ways
from headrace.bench.peers import PeerKind
from headrace.bench.versus import bench_versus
from headrace.bench.versus_cases import Case
from headrace.bench.versus_file import Versus
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.config import KV_DTYPES
from headrace.errors import ArgumentError
from headrace.machine import Machine
from headrace.talk import ProgressLine

MACHINE = Machine(
    {},
    measured=True,
    cores=1,
    reads={1: {1000: 1e10}},
    products={unit: {1: 1e11} for unit in ("fp32", "bf16", "int8")},
)
CASES = (
    Case("prefill", 20),
    Case("decode", 2, 5),
    Case("decode", 2, 5000),
    Case("batch", 2, 20, 1),
    Case("batch", 2, 20, 3),
    Case("start"),
    Case("load"),
    Case("memory"),
    Case("accuracy"),
)
PLAN = Versus(CASES, ("fake",), threads=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.KINDS, "fake", PeerKind((), "fake_peer", lambda file, weights: 0))  # type: ignore[arg-type]
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(versus, "PEERS", ("llama.cpp", "fake"))
    monkeypatch.setattr(versus_rounds, "ROW_S", 0.0)
    monkeypatch.setattr(versus_file, "measured_machine", lambda num_bytes, threads: MACHINE)


def path_of(folder: Path, name: str = "tiny.gguf") -> Path:
    return write_tiny_model(folder / name, TinyModel(matrix_format="Q8_0"))


def test_every_row_has_figures_or_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bench_versus([str(path_of(tmp_path))], PLAN, progress=ProgressLine())
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == json.loads(json.dumps(data))
    (table,) = data["tables"]
    rows = {row["row"]: row["engines"] for row in table["rows"]}
    assert list(rows) == [str(case) for case in CASES] and all(name in out for name in rows)
    assert "too short" in rows.pop("decode at 5000")["headrace"]["why_not"]
    fakes = {"fake, slow way", "fake, fast way"}
    for name, found in rows.items():
        fresh = name in ("start to first token", "load and first step", "peak memory")
        assert set(found) == {"headrace"} | ({"fake"} if fresh else fakes), name
        assert all(figures.get("median", 0) > 0 for figures in found.values()), (name, found)
    assert rows["decode of 3 at 20"]["fake, fast way"]["over_one"] == pytest.approx(3**0.5)
    assert rows["decode at 5"]["headrace"]["plain_read_gb_per_s"] > 0 < rows["decode at 5"]["headrace"]["roof_fraction"]
    assert rows["KL from float32 weights"]["fake, fast way"]["median"] == 1.0
    assert 0 < rows["KL from float32 weights"]["headrace"]["median"] < 0.5
    assert table["conditions"]["fake"] == "made of paper" and table["conditions"]["engines"] == "in turns"


def test_an_engine_that_dies_is_said_in_every_later_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = replace(PLAN, cases=CASES[:2])
    data = bench_versus([str(path_of(tmp_path, "dies.gguf"))], plan, output="markdown", progress=ProgressLine())
    for row in data["tables"][0]["rows"]:
        assert "the last words" in row["engines"]["fake, slow way"]["why_not"]
        assert row["engines"]["headrace"]["median"] > 0
    out = capsys.readouterr().out
    assert "| prefill 20, tokens/s |" in out and not out.endswith("}\n")


def test_without_memory_for_all_they_come_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines.Field, "groups", lambda self, available: [("headrace",), ("fake",)])
    plan = replace(PLAN, cases=CASES[:2], isa="portable")
    data = bench_versus([str(path_of(tmp_path))], plan, output="json", progress=ProgressLine())
    assert capsys.readouterr().out.count("\n") == 1
    (table,) = data["tables"]
    assert "one after the other" in table["conditions"]["engines"]
    for row in table["rows"]:
        assert len(row["engines"]) == 3
    reads = [figures["plain_read_gb_per_s"] for figures in table["rows"][1]["engines"].values()]
    assert all(reads) and len(set(reads)) == 2  # one beside each


def test_formats_are_made_and_measured_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    plan = replace(PLAN, cases=CASES[:1], peers=())
    data = bench_versus([str(path)], plan, types=("q8_0", "f16"), output="json", progress=ProgressLine())
    names = [table["conditions"]["model"] for table in data["tables"]]
    assert names == ["tiny.q8_0.gguf", "tiny.f16.gguf"]
    assert capsys.readouterr().out


def test_mistakes_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"peers": ("nobody",)}, "--peers: .*nobody"),
        ({"isa": "abacus"}, "--isa: .*abacus"),
        ({"llama_lib": tmp_path}, "--llama-lib: "),
    ]
    for change, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            bench_versus(["smollm2"], replace(PLAN, **change), progress=ProgressLine())


def test_a_missing_peer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versus, "missing_packages", lambda name: ["that_module"])
    plan = replace(PLAN, cases=CASES[:1])
    data = bench_versus([str(path_of(tmp_path))], plan, output="json", progress=ProgressLine())
    assert "fake: left out, not installed: that_module" in capsys.readouterr().err
    assert list(data["tables"][0]["rows"][0]["engines"]) == ["headrace"]


def test_llama_cpp_has_a_cache_of_as_many_bits() -> None:
    names = {kv_dtype: [way[1] for way in cache_ways(kv_dtype).values()] for kv_dtype in KV_DTYPES}
    assert names == {
        "float32": [0, 0],
        "float16": [1, 1],
        "bfloat16": [30, 30],
        "float8_e4m3fn": [1, 1],  # it has no float8
        "int8": [8],  # a quantized cache needs flash attention
        "int4": [2],
    }
    assert list(cache_ways("int8")) == ["flash attention on, Q8_0 cache"]
