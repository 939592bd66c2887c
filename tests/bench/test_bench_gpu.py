"""`bench gpu` without a GPU: which rows, in what time, what happens to those that fail, and what is in the file."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from headrace.bench import gpu, gpu_calibrate, gpu_session
from headrace.bench.asked_process import module_command
from headrace.bench.gpu import GpuBench, bench_gpu, list_rows, rows_of
from headrace.bench.gpu_rows import GpuRow, regret_rows, target_rows
from headrace.bench.gpu_session import Budget, Session, warm_up
from headrace.bench.gpu_targets import Target
from headrace.errors import ArgumentError, UnsupportedError
from headrace.talk import ProgressLine

WORKER = "fake_gpu_worker"


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(Session.__init__, "__defaults__", (WORKER,))
    monkeypatch.setattr(warm_up, "__defaults__", (WORKER,))


def row(name: str = "row", **sizes: Any) -> GpuRow:
    return GpuRow(name, "paged", sizes, (Target("copy", 0.9), Target("times", 2.0, than="two")), limit_s=20.0)


# Rows


def test_there_is_a_row_for_every_promise() -> None:
    names = [row.name for row in target_rows()]
    assert len(set(names)) == len(names)
    promised = {"decode_p16_b1_4k", "decode_p64_b64_128k", "ragged_p64", "mla16_b128_4k", "mla128_b128_4k"}
    promised |= {"prefill_8k", "backward_8k", "prefill_exact_4k", "linear_bf16_layer", "linear_int8_qkv"}
    promised |= {"linear_int4_down", "linear_q4_k_gate_up", "rms_norm_x1", "rope_table_x8192", "sample_x64", "moe_x64"}
    promised |= {"append_x64", "merge_x4", "first_paged"}
    assert promised <= set(names)
    assert all(row.quick for row in target_rows()[: sum(row.quick for row in target_rows())]), "the telling ones first"


def test_targets_are_those_that_were_promised() -> None:
    found = {row.name: [str(target) for target in row.targets] for row in target_rows()}
    assert found["decode_p16_b8_32k"] == [
        "chosen: >= 90% of the copy bandwidth",
        "chosen: >= 2 x torch SDPA",
        "chosen: >= 1 x flashinfer",
        "chosen: >= 1 x flash_attn",
    ]
    assert found["mla128_b128_4k"][:2] == ["triton_mla: >= 400 TFLOP/s", "gluon_mla: >= 600 TFLOP/s"]
    assert found["prefill_8k"][:2] == ["triton_attention: >= 450 TFLOP/s", "gluon_attention: >= 650 TFLOP/s"]
    assert found["backward_8k"] == ["chosen: >= 400 TFLOP/s"]
    assert found["prefill_exact_4k"] == ["chosen: >= 2 x torch SDPA", "chosen: <= the error of torch SDPA"]
    shares = {weight: found[f"linear_{weight}_layer"] for weight in ("bf16", "int8", "int4")}
    assert [text[0].split()[2] for text in shares.values()] == ["90%", "85%", "80%"]
    assert found["first_linear"] == ["chosen: <= 100 ms to a first result in a warm process"]


def test_rows_are_chosen_by_their_beginnings() -> None:
    assert [row.name for row in rows_of(GpuBench(("ragged", "merge_x4")))] == ["ragged_p64", "ragged_p16", "merge_x4"]
    assert {row.name.partition("_")[0] for row in rows_of(GpuBench(("regret",)))} == {"regret"}
    quick = rows_of(GpuBench(quick=True))
    assert 8 <= len(quick) <= 16 and not any(row.work == "case" for row in quick)
    with pytest.raises(ArgumentError, match="--rows: expected some of .*, got 'nonsense'"):
        rows_of(GpuBench(("nonsense",)))


def test_the_list_names_every_row_with_its_targets() -> None:
    lines = list_rows(GpuBench()).splitlines()
    assert len(lines) == 1 + len(target_rows()) + len(regret_rows())
    [decode] = [line for line in lines if line.startswith("decode_p16_b64_4k ")]
    assert "key_lens 64 x 4096" in decode and ">= 90% of the copy bandwidth" in decode


def test_named_cases_come_last_and_large_ones_first_among_them() -> None:
    names = [row.name for row in rows_of(GpuBench())]
    first = next(i for i, name in enumerate(names) if name.startswith("regret_"))
    assert names[first] == "regret_large_prefill_bfloat16"
    assert all(name.startswith("regret_") for name in names[first:])


def test_plans_that_cannot_be_are_named() -> None:
    with pytest.raises(ArgumentError, match="repeat: expected a whole number >= 5, got 4"):
        GpuBench(repeat=4)
    with pytest.raises(ArgumentError, match="budget: expected at least 8 seconds, got 1"):
        GpuBench(seconds=1)


# Rows that fail


def asked(given: GpuRow) -> dict[str, Any]:
    with Session("cuda", {"repeat": 7}) as session:
        return session.row(given, 120.0)


def test_a_row_has_its_results() -> None:
    found = asked(row())
    assert set(found["by"]) == {"one", "two"} and found["failed"] == {}


def test_a_row_that_cannot_be_built_is_an_error_and_the_worker_stays() -> None:
    with Session("cuda", {}) as session:
        found = session.row(row(raises=True), 120.0)
        assert found == {"error": "ValueError: this row cannot be built", "failed": {}}
        process = session._process
        assert set(session.row(row(), 120.0)["by"]) == {"one", "two"} and session._process is process


def test_a_kernel_that_ends_the_process_is_left_out_and_the_others_go_on() -> None:
    found = asked(row(dies_at="one"))
    assert set(found["by"]) == {"two"}
    assert found["failed"] == {"one": "it ended with exit code 3: an illegal memory access"}


@pytest.mark.slow
def test_a_kernel_that_hangs_costs_its_limit_and_no_more() -> None:
    with Session("cuda", {}) as session:
        session.ask("describe", 120.0)
        begin = time.monotonic()
        found = session.row(GpuRow("row", "paged", {"hangs_at": "two"}, limit_s=10.0), 300.0)
        assert time.monotonic() - begin < 300.0
    assert found["failed"] == {"two": "no answer in 10 s"} and set(found["by"]) == {"one"}


def test_the_first_error_is_what_counts_where_the_device_is_lost() -> None:
    assert asked(row(breaks_at="one"))["failed"] == {"one": "the first error"}


def test_a_kernel_that_no_graph_can_hold_is_measured_in_a_new_process() -> None:
    with Session("cuda", {}) as session:
        session.ask("describe", 120.0)
        process = session._process
        found = session.row(row(not_captured="two"), 120.0)
        assert set(found["by"]) == {"one", "two"} and found["failed"] == {} and session._process is not process
        process = session._process
        assert set(session.row(row(not_captured="two"), 120.0)["by"]) == {"one", "two"}
        assert session._process is process  # once is enough to know it


def test_no_row_takes_longer_than_what_is_left() -> None:
    with Session("cuda", {}) as session:
        session.ask("describe", 120.0)
        found = session.row(row(hangs_at="two"), 1.0)
    assert found["error"] == "out of time after two failed"


def test_rows_are_compiled_in_several_processes() -> None:
    assert warm_up([row(f"row{i}") for i in range(5)], "cuda", 60.0, 2) == 5
    assert warm_up([row()], "cuda", 0.0, 1) == 0


# A whole run


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path, *rows: GpuRow, **given: Any
) -> tuple[str, str, dict[str, Any]]:
    monkeypatch.setattr(gpu, "rows_of", lambda plan: rows)
    with ProgressLine() as progress:
        data = bench_gpu(GpuBench(path=path, warm=False, **given), progress=progress)
    said = capsys.readouterr()
    assert json.loads(path.read_text()) == data
    return said.out, said.err, data


def test_a_run_prints_and_writes_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = (row("good"), row("bad", dies_at="one"), row("broken", raises=True), row("slow", chosen="two"))
    out, _, data = run(monkeypatch, capsys, tmp_path / "results" / "gpu.json", *rows)
    assert "copy 4000 GB/s, bf16 800 TFLOP/s" in out and "not measured: fp8: no such type" in out
    assert list(data["rows"]) == ["good", "bad", "broken", "slow"]
    good = data["rows"]["good"]
    assert good["by"]["one"]["median_s"] == 1e-3 and good["what"] == "paged" and good["took_s"] >= 0
    assert [(each["row"], each["status"]) for each in data["targets"]] == [
        ("good", "PASS"), ("good", "PASS"), ("bad", "FAILED"), ("bad", "FAILED"), ("broken", "FAILED"),
        ("broken", "FAILED"), ("slow", "MISS"), ("slow", "MISS"), ("regret", "MISS"),
    ]  # fmt: skip
    assert data["targets"][0]["reached"] == pytest.approx(0.9)
    assert data["rows"]["broken"]["error"] == "ValueError: this row cannot be built"
    assert data["regret"]["over_goal"] == ["slow"] and "worst beyond noise 2.00" in out
    assert "2 PASS, 3 MISS, 4 FAILED" in out.splitlines()[-2]
    assert data["what"].startswith("headrace bench gpu on Paper GPU, 2")


def test_the_file_has_every_row_as_soon_as_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, seen = tmp_path / "gpu.json", []
    measured = Session.row

    def watched(self: Session, given: GpuRow, left_s: float) -> dict[str, Any]:
        seen.append(list(json.loads(path.read_text())["rows"]))
        return measured(self, given, left_s)

    monkeypatch.setattr(Session, "row", watched)
    run(monkeypatch, capsys, path, row("a"), row("b"), row("c"))
    assert seen == [[], ["a"], ["a", "b"]]


def test_what_there_is_no_time_for_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Budget, "left", property(lambda self: 7.0))
    cases = GpuRow("regret_one", "case", {"name": "one"})
    _, err, data = run(monkeypatch, capsys, tmp_path / "gpu.json", row("a"), row("b"), cases)
    assert data["left_out"] == dict.fromkeys(("a", "b", "regret_one"), "no time was left") and data["rows"] == {}
    assert "no time was left for 2 rows: headrace bench gpu --rows a,..." in err


def test_speeds_are_fitted_and_kept_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(gpu_calibrate, "keep_gpu_speeds", lambda *given: kept.append(given))
    out, _, data = run(monkeypatch, capsys, tmp_path / "gpu.json", row("a"), row("b"), calibrate=True)
    [(device, speeds)] = kept
    assert device == "Paper GPU" and set(speeds) == {"paged_attention/one/bf16", "paged_attention/two/bf16"}
    memory_s, compute_s = 9e-4, 5e-4
    assert speeds["paged_attention/two/bf16"].seconds(memory_s, compute_s) == pytest.approx(2e-3, rel=0.05)
    assert data["calibration"]["paged_attention/one/bf16"]["cases"] == 2 and "paged_attention/one/bf16" in out


@pytest.mark.slow
def test_a_real_worker_measures_real_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(Session.__init__, "__defaults__", (gpu_session.WORKER,))
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16"}
    decode = GpuRow("decode", "paged", {"key_lens": (64, 64), "page_size": 16, **heads}, (Target("copy", 0.0),))
    nothing = GpuRow("nothing", "no such work", {}, (Target("copy", 0.9),))
    monkeypatch.setattr(gpu, "rows_of", lambda plan: (decode, nothing))
    with ProgressLine() as progress:
        data = bench_gpu(GpuBench(path=tmp_path / "gpu.json", warm=False), progress=progress, device="cpu")
    out = capsys.readouterr().out
    assert [each["status"] for each in data["targets"][:2]] == ["PASS", "FAILED"]
    assert data["rows"]["decode"]["chosen"] in out and "torch SDPA" in out and "not installed: flashinfer" in out
    assert data["rows"]["nothing"]["error"].startswith("KeyError") and data["roofs"]["copy"] > 0


def test_without_a_gpu_there_is_one_clear_error() -> None:
    with pytest.raises(UnsupportedError, match="bench gpu: needs a GPU: RuntimeError: torch sees no GPU") as caught:
        bench_gpu(GpuBench(), progress=ProgressLine(), device="no GPU")
    assert "--list" in str(caught.value.hint)


def headrace(*arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from headrace.cli import main; main()"
    command, environment = module_command("bench", "gpu", *arguments, code=code)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_list_needs_neither_torch_nor_native_code() -> None:
    done = headrace("--list", "--rows", "ragged", blocked=("torch", "headrace.kernels.cpu._native"))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["row", "ragged_p64", "ragged_p16"]


def test_the_command_line_says_that_there_is_no_gpu() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = headrace("--rows", "ragged")
    assert done.returncode == 2 and done.stdout == ""
    assert "error: bench gpu: needs a GPU: RuntimeError: torch" in done.stderr and "Traceback" not in done.stderr
