"""`bench model`: what it accepts, and what it prints for a small real run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from headrace import machine
from headrace.bench.model import ModelBench, bench_model
from headrace.errors import ArgumentError
from headrace.kernels.cpu import roof
from headrace.talk import ProgressLine


@pytest.mark.parametrize(
    "name,wrong",
    [
        ("prompt_len", {"prompt_len": 0}),
        ("new_tokens", {"new_tokens": 0}),
        ("depth", {"depths": ()}),
        ("depth", {"depths": (0, -1)}),
        ("repeat", {"repeat": 0}),
        ("batch", {"batches": ()}),
        ("batch", {"batches": (4, 0)}),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(name: str, wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        ModelBench(**wrong)  # type: ignore[arg-type]


def test_ceilings_come_first_and_the_document_last(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    for budget in ("_READ_BUDGET_S", "_MULTIPLY_BUDGET_S", "_QUICK_BUDGET_S"):
        monkeypatch.setattr(roof, budget, 0.01)
    for known in (machine._kept_roofs, machine.this_machine):
        known.cache_clear()
    plan = ModelBench(prompt_len=8, new_tokens=2, depths=(0, 5), repeat=2)
    bench_model(str(default_model_path), plan, threads=1, json_only=False, progress=ProgressLine())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ceiling") and lines[6].startswith("phase")
    data = json.loads(lines[-1])
    assert [(row["phase"], row["depth"]) for row in data["rows"]] == [
        ("prefill", 0),
        ("decode", 0),
        ("prefill", 5),
        ("decode", 5),
    ]
    for row in data["rows"]:
        assert 0 < row["tokens_per_s_low"] <= row["tokens_per_s_median"] <= row["tokens_per_s_high"]
        assert row["roof_fraction"] == row["tokens_per_s_median"] / row["ceiling"]["tokens_per_s"]
    quantized = dataclasses.replace(plan, kv_dtype="int8")
    bench_model(str(default_model_path), quantized, threads=1, json_only=True, progress=ProgressLine())
    other = json.loads(capsys.readouterr().out)
    assert (other["plan"]["prompt_len"], other["plan"]["kv_dtype"]) == (8, "int8")
    assert other["kv_bytes_per_token"] * 128 == data["kv_bytes_per_token"] * 68  # heads of 64 numbers, one scale each
    for row, narrow in zip(data["rows"], other["rows"], strict=True):
        saved = data["kv_bytes_per_token"] - other["kv_bytes_per_token"]
        keys = row["depth"] + (row["tokens"] if row["phase"] == "prefill" else row["tokens"] // 2 + 1)
        assert row["ceiling"]["num_bytes"] - narrow["ceiling"]["num_bytes"] == saved * keys
    for known in (machine._kept_roofs, machine.this_machine):
        known.cache_clear()
