"""`headrace bench gpu` as text and as a file: a block of lines for each row, a table of targets, one JSON document.

The document is written anew after every row, so that a run that is cut off has lost nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.bench.gpu_rows import GpuRow
from headrace.bench.gpu_targets import OPEN, STATUSES, Roofs, Row, Verdict, judged
from headrace.bench.report import table
from headrace.bench.timing import Spread

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
HEADS = ["  by", "us (min-max, n)", "GB/s", "of copy", "TFLOP/s", "of roof", "error/allowed", "is"]


class Document:
    """The results so far, in a file."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, {**data, "rows": {}, "targets": [], "left_out": {}}

    def put(self, **values: Any) -> None:
        """More of the document's own fields."""
        self.data.update(values)
        self._write()

    def add(self, name: str, what: str, row: Mapping[str, Any], verdicts: Iterable[Verdict]) -> None:
        """A row's results and what became of its targets."""
        self.data["rows"][name] = {"what": what, **row}
        self.data["targets"] += [verdict.data() for verdict in verdicts]
        self._write()

    def leave_out(self, name: str, why: str) -> None:
        """A row that there are no results of."""
        self.data["left_out"][name] = why
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def default_path(device: str, folder: Path = RESULTS) -> Path:
    """Where results go: docs/results of a checkout, else the current folder."""
    name = "".join(letter if letter.isalnum() else "_" for letter in device.lower())
    return (folder if folder.parent.is_dir() else Path()) / f"gpu_{name}.json"


def verdicts_of(row: GpuRow, found: Row, roofs: Roofs) -> list[Verdict]:
    """What became of each target of a row."""
    return [judged(row.name, target, found, roofs) for target in row.targets]


def block(row: GpuRow, found: Row, roofs: Roofs, verdicts: Sequence[Verdict]) -> str:
    """A row's lines: what it is, the least it could take, who took how long, why others did not run, the verdicts."""
    lines = [f"{row.name}: {row}"]
    if "error" in found:
        lines.append(f"  error: {found['error']}")
    if "num_bytes" in found:
        lines.append(f"  {least_text(found, roofs)}")
    if found.get("by"):
        by = sorted(found["by"], key=lambda name: float(found["by"][name]["median_s"]))
        lines.append(table(HEADS, [line(name, found, roofs) for name in by]))
    if "first_s" in found:
        lines.append(f"  {first_text(found)}")
    lines += [f"  cannot: {name}: {why}" for name, why in found.get("cannot", {}).items()]
    lines += [f"  left out: {name}: {why}" for name, why in found.get("failed", {}).items()]
    lines += [f"  {'  '.join(verdict.cells()[1:])}".rstrip() for verdict in verdicts]
    return "\n".join(lines)


def least_text(found: Row, roofs: Roofs) -> str:
    """Bytes and operations over the measured roofs, and what was expected."""
    memory_s, compute_s = least(found, roofs)
    sides = f"{found['num_bytes'] / 1e6:.1f} MB, {found['flops'] / 1e9:.2f} GFLOP {found['unit']}"
    bound = "memory" if memory_s >= compute_s else "compute"
    at_least = f"at least {1e6 * max(memory_s, compute_s):.1f} us ({bound})" if memory_s else "roofs not measured"
    chosen = found.get("chosen")
    expected = f"; {chosen} is predicted to take {1e6 * found['predicted_s'][chosen]:.1f} us" if chosen else ""
    return f"{sides}: {at_least}{expected}"


def least(found: Row, roofs: Roofs) -> tuple[float, float]:
    """Seconds for the bytes at the copy's rate, and for the operations; 0 where the roof is not known."""
    memory_s = found["num_bytes"] / roofs["copy"] if "copy" in roofs else 0.0
    compute_s = found["flops"] / roofs[found["unit"]] if found["unit"] in roofs else 0.0
    return memory_s, compute_s


def line(name: str, found: Row, roofs: Roofs) -> list[str]:
    """One candidate's cells; last how it compares with the chosen kernel."""
    one, chosen = found["by"][name], found["by"].get(found.get("chosen"))
    median = one["median_s"]
    memory_s, compute_s = least(found, roofs)
    spread = Spread(1e6 * median, 1e6 * one["min_s"], 1e6 * one["max_s"], one["n"])
    mark = "" if one["way"] == "graph" else f", {one['way']}"
    known = one.get("error") is not None
    return [
        f"  {name}{mark}",
        str(spread),
        f"{found['num_bytes'] / median / 1e9:.0f}",
        f"{memory_s / median:.1%}",
        f"{found['flops'] / median / 1e12:.1f}",
        f"{max(memory_s, compute_s) / median:.1%}",
        f"{one['error']:.2g}/{one['allowed']:.2g}" if known else "-",
        "chosen" if one is chosen else f"{median / chosen['median_s']:.2f} x" if chosen else "",
    ]


def first_text(found: Row) -> str:
    """The times of first calls."""
    cells = [
        f"first call {1e3 * found['first_s']:.0f} ms in a warm process ({1e3 * found['import_s']:.0f} ms of imports)"
    ]
    cells.append(f"{1e3 * found['cold_first_s']:.0f} ms where nothing is compiled yet")
    cells.append(f"then {1e6 * found['next_s']:.0f} us from Python")
    return "; ".join([*cells, f"{found['cache_files']} files, {found['cache_bytes'] / 1e6:.1f} MB on disk"])


def summary(verdicts: Sequence[Verdict]) -> str:
    """All targets, those that are open last."""
    ordered = sorted(verdicts, key=lambda verdict: verdict.status == OPEN)
    counts = {status: sum(verdict.status == status for verdict in verdicts) for status in STATUSES}
    total = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no targets"
    rows = [[*verdict.cells()[:3], verdict.cells()[3][:80]] for verdict in ordered]
    return "\n".join(([table(["row", "target", "", "reached"], rows)] if rows else []) + [total])
