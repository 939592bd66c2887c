"""The bench of the ops: what is predicted, checked, measured and printed, on small cases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import machine
from headrace.bench import op_cases, op_peers, ops, subjects
from headrace.bench.op_cases import CASES, SpeedCase, build, check
from headrace.bench.op_peers import torch_calls
from headrace.bench.ops import OpsBench, bench_ops
from headrace.bench.timing import Spread
from headrace.errors import ArgumentError, HeadraceError
from headrace.kernels.cpu import roof
from headrace.machine import KernelSpeed, this_machine
from headrace.ops import AttentionGradients
from headrace.talk import ProgressLine

SMALL = (
    SpeedCase("decode", (1,), (200,), 4, 2, 32, 32, "bfloat16"),
    SpeedCase("prefill", (70,), (70,), 4, 2, 32, 16, "bfloat16"),
    SpeedCase("prefill_exact", (70,), (70,), 4, 2, 32, 32, "float32", precision="exact"),
    SpeedCase("mla", (1,), (130,), 8, 1, 48, 32, "bfloat16", "mla_attention"),
    SpeedCase("ragged", (1, 1, 1), (300, 20, 64), 4, 2, 32, 32, "bfloat16", "paged_attention"),
    SpeedCase("backward", (70,), (70,), 4, 2, 32, 16, "bfloat16", "attention_backward"),
    SpeedCase("backward_exact", (70,), (70,), 4, 4, 32, 32, "float32", "attention_backward", "exact"),
)
EACH_CASE = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
FORWARD = pytest.mark.parametrize("case", SMALL[:5], ids=lambda case: case.name)
BACKWARD = pytest.mark.parametrize("case", SMALL[5:], ids=lambda case: case.name)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    for name in ("_READ_BUDGET_S", "_MULTIPLY_BUDGET_S", "_QUICK_BUDGET_S"):
        monkeypatch.setattr(roof, name, 0.001)
    forget = (machine._kept_roofs, machine._kept_calibration, this_machine)
    for known in forget:
        known.cache_clear()
    yield
    for known in forget:
        known.cache_clear()


def test_the_promised_cases_are_there() -> None:
    assert [case.name for case in CASES] == [
        "decode_4096",
        "decode_32768",
        "prefill_2048",
        "prefill_2048_exact",
        "mla_decode_4096",
        "ragged_decode",
        "backward_2048",
        "backward_2048_exact",
        "backward_2048_8_heads",
        "backward_2048_8_heads_exact",
    ]
    long = CASES[1]
    assert str(long) == "attention, 1 queries, 32768 keys, 32/8 heads, d 128, bfloat16"
    assert long.num_bytes == 2 * (2 * 32768 * 8 * 128 + 2 * 32 * 128)
    assert long.flops == 4 * 32768 * 32 * 128
    assert CASES[5].num_bytes == 2 * (2 * (32768 + 15 * 512) * 8 * 128 + 16 * 2 * 32 * 128)
    assert CASES[4].num_bytes == 2 * (4096 * 576 + 128 * (576 + 512))  # the latent once
    backward = CASES[6]
    assert backward.flops == 10 * (2048 * 2049 // 2) * 32 * 128  # five products
    assert backward.num_bytes == 2 * 2 * 2 * 2048 * (8 + 32) * 128


@EACH_CASE
def test_work_is_counted_as_the_ops_count_it(case: SpeedCase) -> None:
    traffic = build(case).explain().request.traffic
    assert traffic.unit == case.unit
    if len(case.key_lens) == 1:
        assert traffic.flops == case.flops
    if case.op in ("attention", "attention_backward"):
        lse_bytes = 4 * sum(case.query_lens) * case.heads
        assert traffic.num_bytes == case.num_bytes + lse_bytes


@FORWARD
def test_every_case_is_right_and_a_wrong_one_is_not_let_through(case: SpeedCase) -> None:
    work = build(case)
    check(case, work)
    out = np.array(work.run())
    check(case, replace(work, run=lambda: out))
    out[:, case.heads - 1] += out.dtype.type(0.5)
    out[:, 0] = 0
    with pytest.raises(HeadraceError, match=f"{case.name}: the result is wrong, no speed is printed"):
        check(case, replace(work, run=lambda: out))


@FORWARD
def test_torch_computes_the_same(case: SpeedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    sdpa, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*arrays: Any, **options: Any) -> Any:
        seen.append(sdpa(*arrays, **options))
        return seen[-1]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(op_peers, "_tensor", lambda array: torch.from_numpy(array.astype(np.float32)))
    work = build(case)
    calls = torch_calls(case, work, 1, flex=False)
    assert list(calls) == ["torch SDPA"] + ["torch SDPA, heads as rows"] * (not case.causal)
    for call in calls.values():
        seen.clear()
        call()
        rows = [out.reshape(case.heads, -1, case.value_dim).transpose(0, 1) for out in seen]
        theirs = torch.cat(rows).numpy()
        check(case, replace(work, run=lambda theirs=theirs: theirs))


@BACKWARD
def test_gradients_are_right_and_wrong_ones_are_not_let_through(case: SpeedCase) -> None:
    work = build(case)
    check(case, work)
    found = work.run()
    for name in ("query", "key", "value"):
        wrong = replace(found, **{name: getattr(found, name) + getattr(found, name).dtype.type(0.5)})
        with pytest.raises(HeadraceError, match=f"{case.name}: d_{name} is wrong, no speed is printed"):
            check(case, replace(work, run=lambda wrong=wrong: wrong))


@BACKWARD
def test_torch_computes_the_same_gradients(case: SpeedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(
        torch, "randn_like", lambda out: torch.from_numpy(d_out.astype(np.float32)).transpose(0, 1)[None]
    )
    monkeypatch.setattr(op_peers, "_tensor", lambda array: torch.from_numpy(array.astype(np.float32)))
    work = build(case)
    d_out = work.beside["d_out"]
    calls = torch_calls(case, work, 1)
    assert list(calls) == ["torch SDPA"] + ["torch SDPA, keys repeated"] * (case.heads > case.kv_heads)
    for call in calls.values():
        theirs = AttentionGradients(*(gradient.transpose(1, 2).numpy() for gradient in call()))
        check(replace(case, dtype="bfloat16"), replace(work, run=lambda theirs=theirs: theirs))  # not to our last bit


def test_a_line_says_how_much_of_the_roof_and_how_many_times(own_cache: None) -> None:
    ceiling = ops.Ceiling(1, 2_000_000, 1_000_000, 1e-3, 0.5e-3)
    ours, theirs = Spread(2e-3, 1e-3, 3e-3, 7), Spread(8e-3, 8e-3, 8e-3, 7)
    assert ceiling.bound == "memory" and ceiling.seconds == 1e-3
    assert ops.row("headrace", ours, ours, ceiling)[1:] == ["2.000 (1.000-3.000, 7)", "1.0", "0.5", "50.0%", ""]
    assert ops.row("torch", theirs, ours, ceiling)[-2:] == ["12.5%", "4.00 x"]


def test_plans_that_cannot_be_are_named() -> None:
    with pytest.raises(ArgumentError, match="repeat: expected a whole number >= 5, got 4"):
        OpsBench(repeat=4)
    with pytest.raises(ArgumentError, match="--regret"):
        OpsBench(calibrate=True, regret=True)


def run(plan: OpsBench, capsys: pytest.CaptureFixture[str], json_only: bool = False) -> tuple[str, dict[str, Any]]:
    with ProgressLine() as progress:
        data = bench_ops(plan, json_only=json_only, progress=progress)
    *text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == data
    return "\n".join(text), data


def test_speeds_are_printed_with_predictions_first(
    own_cache: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "CASES", SMALL[:2])
    monkeypatch.setattr(ops, "torch_calls", lambda *_: {"another": lambda: None})
    monkeypatch.setattr(ops, "_SETTLE_S", 0.0)
    monkeypatch.setattr(ops, "_SAMPLE_S", 1e-4)
    text, data = run(OpsBench(("decode",), 5), capsys)
    lines = text.splitlines()
    assert lines[0] == "decode: attention, 1 queries, 200 keys, 4/2 heads, d 32, bfloat16"
    assert re.search(r"0\.1 MB at .* GB/s, 0\.00 GFLOP bf16 at .*: at least .* ms .*predicted to take", lines[1])
    assert [line.split()[0] for line in lines[3:5]] == ["headrace", "another"]
    [case] = data["cases"]
    assert case["case"] == "decode" and set(case["by"]) - {ops.PLAIN_READ} == {"headrace", "another"}
    assert case["by"]["another"]["n"] == 5
    reading = 2 * case["memory_s"] > case["compute_s"]
    assert (ops.PLAIN_READ in case["by"]) == reading
    assert run(OpsBench(("decode",), 5), capsys, json_only=True)[0] == ""


@pytest.mark.slow
def test_calibration_is_kept_and_used(
    own_cache: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subjects, "LARGE_NORM", ())
    machine.keep_calibration({"other/k/fp32": KernelSpeed(1.0, 1.0)})
    text, data = run(OpsBench(("rms_norm",), 5, calibrate=True), capsys)
    kept = this_machine().calibration
    assert "rms_norm/cpu_portable/fp32" in text and data["calibration"].keys() == kept.keys() - {"other/k/fp32"}
    assert kept["rms_norm/cpu_portable/fp32"].call_s < 1.0 and "other/k/fp32" in kept


def test_regret_is_summed_up(
    own_cache: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, data = run(OpsBench(("rms_norm/one", "rms_norm/lanes"), 5, regret=True), capsys)
    assert data["regret"]["cases"] == len(data["cases"]) and data["regret"]["median"] >= 1.0
    assert re.search(r"regret over \d+ cases: median \d+\.\d\d, worst", text)


def test_threads_are_cores_of_this_process() -> None:
    most = machine.usable_cores()
    for threads in (0, most + 1):
        with pytest.raises(ArgumentError, match=f"threads: expected 1 to {most}"):
            machine.limit_cores(threads)
    program = "from headrace import machine; print(machine.limit_cores(1).cores, machine.usable_cores())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_pages_hold_the_sequences() -> None:
    sequences = [np.arange(2 * n).reshape(n, 1, 2) for n in (130, 1, 64)]
    pages, table = op_cases.paged(sequences), op_cases.page_table((130, 1, 64))
    for row, sequence in zip(table, sequences, strict=True):
        assert np.array_equal(pages[row].reshape(-1, 1, 2)[: len(sequence)], sequence)
