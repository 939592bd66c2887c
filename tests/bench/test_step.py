"""A step explained: every op has its part and its work, and parts add up to the step and to the model's work."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace import cli, machine
from headrace.bench import step
from headrace.bench.model import ModelBench, greedy
from headrace.bench.roofline import model_work
from headrace.bench.step import Group, OpTime, Roofs, explain_model, explained_steps, middle_means
from headrace.bench.step_parts import PRODUCTS, Part, StepSize, step_model, step_parts
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.config import KV_DTYPES
from headrace.errors import HeadraceError
from headrace.kernels.cpu import roof
from headrace.machine import Machine
from headrace.ops.select import Traffic
from headrace.talk import ProgressLine
from headrace.weights.gguf import open_gguf

ROOFS = Roofs(read=1e9, products={"fp32": 1e10, "bf16": 2e10, "int8": 4e10})
MACHINE = Machine({}, measured=True, reads={1: {1000: 1e9}}, products={unit: {1: 1e10} for unit in ROOFS.products})
MODELS = {
    "float": TinyModel(num_layers=3),
    "int8": TinyModel(matrix_format="Q8_0", tied_head=True),
    "window": TinyModel(sliding_window=20, architecture="qwen2"),
}
SIZES = [StepSize(1, 0), StepSize(1, 40), StepSize(30, 0), StepSize(7, 33)]


def loaded(folder: Path, name: str = "float", kv_dtype: str = "float16") -> headrace.LLM:
    path = write_tiny_model(folder / "tiny.gguf", MODELS[name])
    return headrace.LLM(path, threads=1, chunk_len=32, kv_dtype=kv_dtype)


def test_every_op_of_a_step_has_its_part(tmp_path: Path) -> None:
    llm = loaded(tmp_path)
    names = llm.engine.runner.program.op_names
    parts = step_parts(names, step_model(llm), StepSize(4, 0))
    assert [part.op for part in parts] == names
    layers = MODELS["float"].num_layers
    assert Counter(part.role for part in parts) == {
        **dict.fromkeys([*PRODUCTS, "append", "attention"], layers),
        **dict.fromkeys(["embedding", "rope table", "rows for the head", "head", "sampling"], 1),
    }
    assert all(part.traffic.num_bytes > 0 for part in parts)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_work_of_the_model(name: str, size: StepSize, tmp_path: Path) -> None:
    llm, made = loaded(tmp_path, name), MODELS[name]
    parts = step_parts(llm.engine.runner.program.op_names, step_model(llm), size)
    products = [part for part in parts if part.role in (*PRODUCTS, "head")]
    with open_gguf(llm.path) as file:
        work = model_work(file, llm.config, llm.bytes_per_token, llm.kv_bytes_per_token)
        read = sum(i.num_bytes for n, i in file.tensors.items() if len(i.shape) == 2)
        read -= 0 if made.tied_head else file.tensors["token_embd.weight"].num_bytes
    flops: Counter[str] = Counter()
    for part in products:
        flops[part.traffic.unit] += part.traffic.flops
    expected = Counter({unit: size.tokens * n for unit, n in work.layer_flops.items()}) + Counter(work.head_flops)
    assert flops == expected
    query, key = made.num_heads * made.head_dim, made.num_kv_heads * made.head_dim
    written = size.tokens * made.num_layers * (query + 2 * key + made.ffn_dim + 2 * made.dim) + made.vocab_size
    assert sum(part.traffic.num_bytes for part in products) == read + 4 * written
    seen = [size.depth + i + 1 for i in range(size.tokens)]
    pairs = sum(min(keys, made.sliding_window or keys) for keys in seen)
    attention = [part.traffic for part in parts if part.role == "attention"]
    assert sum(traffic.flops for traffic in attention) == pairs * work.attention_flops
    window = min(size.depth, made.sliding_window - 1) if made.sliding_window else size.depth
    moved = made.num_layers * size.tokens * made.num_heads * 4 * (2 * made.head_dim + 1)
    assert sum(t.num_bytes for t in attention) == llm.kv_bytes_per_token * (window + size.tokens) + moved


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_parts_count_the_cache_as_it_is(kv_dtype: str, tmp_path: Path) -> None:
    llm, made, size = loaded(tmp_path, kv_dtype=kv_dtype), MODELS["float"], StepSize(7, 33)
    parts = step_parts(llm.engine.runner.program.op_names, step_model(llm), size)
    read, written = (
        sum(part.traffic.num_bytes for part in parts if part.role == role) for role in ("attention", "append")
    )
    query, key = made.num_heads * made.head_dim, made.num_kv_heads * made.head_dim
    rows = made.num_layers * size.tokens
    assert read == llm.kv_bytes_per_token * (size.depth + size.tokens) + 4 * rows * (2 * query + made.num_heads)
    assert written == llm.kv_bytes_per_token * size.tokens + 4 * rows * (2 * query + 2 * key)


def test_an_unknown_op_is_a_part_of_its_own_and_missing_products_are_said(tmp_path: Path) -> None:
    llm = loaded(tmp_path)
    names = [*llm.engine.runner.program.op_names, "something_new"]
    assert step_parts(names, step_model(llm), SIZES[0])[-1] == Part("something_new", "something_new", Traffic(0, 0))
    with pytest.raises(HeadraceError, match="12 products, its model 13"):
        step_parts(names[:-3], step_model(llm), SIZES[0])


def test_the_slower_side_of_an_op_binds() -> None:
    part = Part("down", "linear", Traffic(3000, 40_000, "int8"))
    memory, compute = OpTime(part, 3.0, 1.0, 6.0), OpTime(part, 3.0, 5.0, 4.0)
    assert ROOFS.seconds(part.traffic) == (3e-6, 1e-6)
    both = Group((memory, compute))
    assert (memory.roof_s, compute.roof_s, both.roof_s, both.measured_s) == (3.0, 5.0, 8.0, 10.0)
    assert both.roof_fraction == 0.8
    assert Group((memory,)).bound == "memory" and Group((compute,)).bound == "int8"
    idle = Group((OpTime(Part("batch", "Python", Traffic(0, 0)), 0.0, 0.0, 1.0),))
    assert idle.roof_fraction is None and idle.bound == "-"


def test_the_middle_half_of_the_steps_counts() -> None:
    rows = [[9.0, 0.0], [2.0, 1.0], [1.0, 7.0], [4.0, 5.0]]
    assert middle_means(rows) == [3.0, 3.0]
    assert middle_means([[1.0, 2.0]]) == [1.0, 2.0]


def test_steps_are_those_of_the_plan_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    llm = loaded(tmp_path)
    answer = llm.generate([5, 6, 7], greedy(6)).token_ids
    plan = ModelBench(prompt_len=50, new_tokens=3, depths=(0, 70), repeat=2)
    steps = list(explained_steps(llm, plan, ROOFS))
    # A prompt longer than a chunk is computed a chunk at a time, and a step is one of them.
    assert [(s.phase, s.size, s.count) for s in steps] == [
        ("prefill", StepSize(32, 0), 2),
        ("decode", StepSize(1, 0), 3),
        ("prefill", StepSize(32, 70), 2),
        ("decode", StepSize(1, 70), 3),
    ]
    assert llm.generate([5, 6, 7], greedy(6)).token_ids == answer
    for each in steps:
        assert len(each.ops) == len(llm.engine.runner.program.op_names) + 1
        assert 0 < each.explained_s < each.wall_s  # the clock of the whole runs around those of the parts
        assert sum(group.measured_s for group in each.groups) == pytest.approx(each.explained_s)


def test_a_replayed_step_is_the_step(tmp_path: Path) -> None:
    llm = loaded(tmp_path)
    ids = list(range(40))
    expected = llm.logits(ids)[-1]
    replay = step._Replay(llm, ids[:35], ids[35:])
    for _ in range(2):
        replay.untimed(), replay.timed()
        assert replay.logits[-1].tobytes() == expected.tobytes()


def run_explain(path: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[dict[str, Any], str]:
    plan = ModelBench(prompt_len=8, new_tokens=2, depths=(0, 5), repeat=2)
    data = explain_model(str(path), plan, threads=1, progress=ProgressLine(), **options)
    return data, capsys.readouterr().out


def test_tables_come_first_and_the_document_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "measured_machine", lambda num_bytes, threads: MACHINE)
    path = write_tiny_model(tmp_path / "tiny.gguf")
    data, out = run_explain(path, capsys, json_only=False)
    assert json.loads(out.splitlines()[-1]) == data
    titles = ["prefill of 8 at depth 0", "decode of 1 at depth 0", "prefill of 8 at depth 5", "decode of 1 at depth 5"]
    assert [line.partition(":")[0] for line in out.splitlines() if " at depth " in line] == titles
    assert out.count("\nexplained: ") == out.count("\nat the roof: ") == 4
    for found in data["steps"]:
        assert found["wall_s"] == pytest.approx(found["explained_s"] + found["unexplained_s"])
        assert found["roof_s"] == pytest.approx(sum(part["roof_s"] for part in found["parts"]))
        assert (found["parts"][0]["part"], found["parts"][-1]["part"]) == ("batch", "sampling")
    _, out = run_explain(path, capsys, json_only=True)
    assert json.loads(out)["threads"] == 1


def test_the_command_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    for budget in ("_READ_BUDGET_S", "_MULTIPLY_BUDGET_S", "_QUICK_BUDGET_S"):
        monkeypatch.setattr(roof, budget, 0.001)
    for known in (machine._kept_roofs, machine.this_machine):
        known.cache_clear()
    path = write_tiny_model(tmp_path / "tiny.gguf")
    given = ["--explain", "--json", "-m", str(path), "--depth", "0", "--prompt-len", "4", "--new-tokens", "2"]
    given += ["--threads", "1", "--repeat", "1", "--kv-dtype", "int8"]
    monkeypatch.setattr(sys, "argv", ["headrace", "bench", "model", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    data = json.loads(capsys.readouterr().out)
    assert [found["phase"] for found in data["steps"]] == ["prefill", "decode"]
    for known in (machine._kept_roofs, machine.this_machine):
        known.cache_clear()
