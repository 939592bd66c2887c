"""`bench model --batch`: what is checked, measured and printed, on a tiny model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace import LLM, cli
from headrace.bench import batches
from headrace.bench.batches import Together, bench_batches, check_batches, engines_of, varying_parts
from headrace.bench.model import ModelBench, greedy
from headrace.bench.step import explain_model
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.errors import HeadraceError, UnsupportedError
from headrace.kernels import cpu
from headrace.machine import Machine
from headrace.talk import ProgressLine

MACHINE = Machine(
    {},
    measured=True,
    cores=1,
    reads={1: {1000: 1e10}},
    products={unit: {1: 1e11} for unit in ("fp32", "bf16", "int8")},
)
PLAN = ModelBench(prompt_len=8, new_tokens=2, depths=(0, 70), batches=(4, 2), repeat=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel(matrix_format="Q8_0"))


def load(path: Path, **options: Any) -> LLM:
    return LLM(path, context_len=128, max_requests=4, chunk_len=32, threads=1, **options)


def test_the_document_has_every_batch_at_every_depth(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batches, "measured_machine", lambda num_bytes, threads: MACHINE)
    data = bench_batches(str(path), PLAN, threads=1, json_only=False, progress=ProgressLine())
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == json.loads(json.dumps(data))
    assert out.index("tokens/s at most") < out.index("over batch 1") < out.index("as it does alone")
    rows = data["rows"]
    assert [(row["batch"], row["depth"]) for row in rows] == [(b, d) for d in (0, 70) for b in (1, 2, 4)]
    for row in rows:
        one = next(r for r in rows if (r["batch"], r["depth"]) == (1, row["depth"]))
        assert row["factor"] == row["tokens_per_s_median"] / one["tokens_per_s_median"]
        assert row["roof_fraction"] == pytest.approx(row["tokens_per_s_median"] / row["ceiling"]["tokens_per_s"])
        keys = row["batch"] * (row["depth"] + 2)  # a measurement's middle step, its own token included
        assert row["ceiling"]["num_bytes"] == data["bytes_per_token"] + keys * data["kv_bytes_per_token"]
        steps_per_s = row["tokens_per_s_median"] / row["batch"]
        assert row["gb_per_s"] == pytest.approx(row["ceiling"]["num_bytes"] * steps_per_s / 1e9)


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "int8", "int4"])
def test_a_copy_goes_on_as_the_original(path: Path, kv_dtype: str) -> None:
    together = Together(load(path, kv_dtype=kv_dtype).engine)
    sequence = together.filled(list(range(70)))
    copies = [together.copied(sequence) for _ in range(2)]
    assert len({*sequence.pages, *copies[0].pages, *copies[1].pages}) == 3 * len(sequence.pages) == 6
    assert together.decode([sequence], [5], 4) == together.decode([copies[0]], [5], 4)
    together.forget([sequence, copies[0]], 0)
    alone = load(path, kv_dtype=kv_dtype).engine
    assert together.decode([copies[1]], [5], 4) == Together(alone).decode(
        [Together(alone).filled([*range(70)])], [5], 4
    )


def test_together_answers_are_those_of_generate(path: Path) -> None:
    with cpu.limit_isa("avx2"):
        llm = load(path)
    prompts = [[7], [1, 2, 3], list(range(40))]
    expected = [llm.generate(prompt, greedy(6)).token_ids for prompt in prompts]
    assert Together(llm.engine).answers(prompts, 6) == expected


def test_no_speed_for_a_batch_that_answers_otherwise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cpu.limit_isa("avx2"):
        llm = load(path)
    assert check_batches(llm, [1, 2, 4]) and llm.engine.pool.num_free == llm.engine.pool.num_pages
    right = Together.decode

    def wrong(self: Together, *given: Any) -> list[list[int]]:
        answers = right(self, *given)
        answers[-1][-1] ^= len(answers) > 2  # only in the last batch
        return answers

    monkeypatch.setattr(Together, "decode", wrong)
    with cpu.limit_isa("avx2"), pytest.raises(HeadraceError, match="an answer in a batch of 4 is"):
        check_batches(llm, [1, 2, 4])
    monkeypatch.setattr(batches, "varying_parts", lambda llm: ["tiles"])
    assert not check_batches(llm, [1, 2, 4])


def test_what_may_vary_is_named(path: Path, tmp_path: Path) -> None:
    with cpu.limit_isa("avx2"):
        assert varying_parts(load(path)) == []
        assert varying_parts(load(path, kv_dtype="int8")) == ["attention over keys with scales"]
        long = write_tiny_model(tmp_path / "long.gguf", TinyModel(head_dim=80))
        assert varying_parts(load(long)) == ["attention over long heads"]


def test_what_batch_invariance_costs_is_measured_beside(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batches, "measured_machine", lambda num_bytes, threads: MACHINE)
    plan = replace(PLAN, kv_dtype="int8", depths=(0,))
    data = bench_batches(str(path), plan, threads=1, json_only=False, progress=ProgressLine())
    out = capsys.readouterr().out
    assert [row["batch_invariant"]["count"] for row in data["rows"]] == [2, 2, 2] and len(data["prefill"]) == 2
    assert "% time)" in out and "prefill of 8: " in out and "the same" not in out


def test_an_engine_that_breaks_its_promise_gives_no_speed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(path, kv_dtype="int8")
    assert [engine.runner.storage.dtype for engine in engines_of(llm, [1, 4])] == ["int8", "int8"]
    monkeypatch.setattr(batches, "_difference", lambda llm, engine, batches: "an answer in a batch of 4 is [1]")
    with pytest.raises(HeadraceError, match="with batch_invariant, an answer in a batch of 4 is"):
        engines_of(llm, [1, 4])


def test_a_batch_is_not_explained(path: Path) -> None:
    with pytest.raises(UnsupportedError, match="batch: expected 1"):
        explain_model(str(path), PLAN, threads=1, json_only=True, progress=ProgressLine())


def test_the_command_takes_a_list(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batches, "measured_machine", lambda num_bytes, threads: MACHINE)
    given = ["--batch", "3,1", "--json", "-m", str(path), "--depth", "0", "--prompt-len", "4", "--new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["headrace", "bench", "model", *given, "--threads", "1", "--repeat", "1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    data = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in data["rows"]] == [1, 3] and data["same_as_alone"]
