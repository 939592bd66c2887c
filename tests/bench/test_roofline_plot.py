"""`bench roofline`: a whole picture with every roof and every op that computes, or one clear error and no file."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headrace import cli
from headrace.bench import figure, roofline_plot
from headrace.bench.model import ModelBench
from headrace.bench.roofline_plot import bench_roofline, draw
from headrace.bench.step import ExplainedStep, OpTime, Roofs
from headrace.bench.step_parts import Part, StepSize
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.errors import ArgumentError, HeadraceError
from headrace.machine import Machine
from headrace.ops.select import Traffic
from headrace.talk import ProgressLine

pytest.importorskip("matplotlib")

UNITS = ("fp32", "bf16", "int8")
ROOFS = Roofs(read=2e9, products=dict(zip(UNITS, (1e10, 2e10, 4e10), strict=True)))
MACHINE = Machine(
    {},
    measured=True,
    cpu_name="some CPU",
    reads={1: {1000: 8e9, 10**9: 1e9}},
    products={unit: {1: 1e10} for unit in UNITS},
)
PLAN = ModelBench(prompt_len=4, new_tokens=2, depths=(3,), repeat=1)


@pytest.fixture(autouse=True)
def svg_with_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import matplotlib

    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters as text, to be read here


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline_plot, "measured_machine", lambda num_bytes, threads: MACHINE)


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter() if element.tag.endswith("}text")]


def marks(path: Path) -> int:
    """Points drawn: every use of a mark inside a collection."""
    collections = [e for e in ElementTree.parse(path).iter() if e.get("id", "").startswith("PathCollection")]
    return sum(child.tag.endswith("}use") for collection in collections for child in collection.iter())


def explained(phase: str, ops: list[tuple[str, Traffic, float]]) -> ExplainedStep:
    timed = tuple(OpTime(Part(role, role, traffic), 1.0, 1.0, seconds) for role, traffic, seconds in ops)
    return ExplainedStep(phase, StepSize(1, 0), timed, 1.0, 1.0, 1)


def test_one_point_for_each_op_that_computes(tmp_path: Path) -> None:
    ops = [("down", Traffic(100, 200), 1e-6)] * 3 + [("embedding", Traffic(100, 0), 1e-6)]
    steps = [explained("decode", ops), explained("prefill", [*ops, ("norms", Traffic(10, 2), 1e-6)])]
    out = tmp_path / "drawn.svg"
    draw(steps, ROOFS, out, title="the title")
    found = texts(out)
    assert marks(out) == 3 + 3 + 1 + len([text for text in found if " of 1 at depth 0" in text])  # the legend's own
    assert {"the title", "read: 2.0 GB/s", "fp32: 10 GFLOP/s", "bf16: 20 GFLOP/s", "int8: 40 GFLOP/s"} <= set(found)
    legend = [text for text in found if " of 1 at depth 0" in text]
    assert legend == [
        "down, decode of 1 at depth 0",
        "down, prefill of 1 at depth 0",
        "norms, prefill of 1 at depth 0",
    ]


@pytest.mark.parametrize("ending", figure.FORMATS)
def test_the_ending_says_what_is_written(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"drawn.{ending}"
    draw([explained("decode", [("down", Traffic(100, 200), 1e-6)])], ROOFS, out, title="x")
    assert {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending] == out.read_bytes()[:5].rstrip(b"\r-")[:5]


@pytest.mark.usefixtures("measured")
def test_a_models_steps_are_drawn_with_all_its_ops(tmp_path: Path) -> None:
    path, out = write_tiny_model(tmp_path / "tiny.gguf", TinyModel(num_layers=1)), tmp_path / "roofline.svg"
    steps = bench_roofline(str(path), PLAN, out, threads=1, progress=ProgressLine())
    assert [step.phase for step in steps] == ["prefill", "decode"]
    found = texts(out)
    computing = {op.part.role for step in steps for op in step.ops if op.part.traffic.flops}
    assert {text.partition(",")[0] for text in found if " at depth 3" in text} == computing
    assert "tiny.gguf, 1 thread, some CPU" in found
    # The roof of this size lies between; that of a cache and that of memory are lines of their own.
    assert sum(text.startswith("read ") for text in found) == 3


@pytest.mark.usefixtures("measured")
def test_the_command_draws_and_prints_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_tiny_model(tmp_path / "tiny.gguf"), tmp_path / "roofline.svg"
    given = ["-m", str(path), "--out", str(out), "--prompt-len", "4", "--repeat", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["headrace", "bench", "roofline", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and out.exists()
    assert capsys.readouterr().out == f"{out}\n"


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HeadraceError, match=r"matplotlib is not installed(.|\n)*headrace\[plot\]"):
        bench_roofline("no such model", PLAN, tmp_path / "roofline.svg", threads=1, progress=ProgressLine())
    assert not (tmp_path / "roofline.svg").exists()


def test_a_place_that_cannot_be_drawn_to_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    for name, text in (("roofline.txt", r"one of \.svg, \.png, \.pdf"), ("nowhere/roofline.svg", "no folder")):
        with pytest.raises(ArgumentError, match=text):
            bench_roofline("no such model", PLAN, tmp_path / name, threads=1, progress=ProgressLine())
