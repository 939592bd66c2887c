"""`headrace bench gpu`: every GPU kernel's row checked, timed and judged in one run that ends in time.

It measures the device's roofs, compiles in several processes at once, then takes the rows one after the other in a
process of its own (gpu_session.py, gpu_worker.py); what is left of the time goes to the regret of the choice over the
named cases of headrace.check. docs/gpu.md says how to read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from headrace.bench.asked_process import ProcessFailed
from headrace.bench.gpu_calibrate import calibrated
from headrace.bench.gpu_first import measure_first
from headrace.bench.gpu_report import Document, block, default_path, summary, verdicts_of
from headrace.bench.gpu_rows import GpuRow, regret_rows, target_rows
from headrace.bench.gpu_session import Budget, Session, warm_up
from headrace.bench.gpu_targets import Roofs, Target, Verdict, judged
from headrace.bench.regret import GOAL, Regret
from headrace.bench.regret import summary as regret_summary
from headrace.bench.report import table
from headrace.errors import ArgumentError, UnsupportedError
from headrace.machine import usable_cores
from headrace.options import begun_with
from headrace.talk import ProgressLine, say

REGRET = "regret"  # the row of all choices together
_ROOFS_S = 90.0
_WARM_SHARE, _WARM_S = 0.3, 120.0  # of the time there is, and at most
_WARM_PROCESSES = 8
_MOST_WARM_KEYS = 1 << 21  # of a row that several processes may have in memory at once
_LEAST_S = 8.0  # with less no row is begun
_REGRET_S = 45.0  # with less the named cases are not begun


@dataclass(frozen=True)
class GpuBench:
    """What to measure. rows: names or their beginnings, none: all; peers: others' packages, none: those installed."""

    rows: tuple[str, ...] = ()
    quick: bool = False
    path: Path | None = None
    peers: tuple[str, ...] = ()
    repeat: int = 7
    seconds: float = 460.0
    warm: bool = True
    calibrate: bool = False

    def __post_init__(self) -> None:
        if self.repeat < 5:
            raise ArgumentError(
                f"repeat: expected a whole number >= 5, got {self.repeat}", "medians of fewer say little"
            )
        if self.seconds < _LEAST_S:
            raise ArgumentError(f"budget: expected at least {_LEAST_S:g} seconds, got {self.seconds:g}")


def rows_of(plan: GpuBench) -> tuple[GpuRow, ...]:
    """The rows that are asked for, those of regret behind all others."""
    rows = (*target_rows(), *regret_rows())
    if plan.quick:
        rows = tuple(row for row in rows if row.quick)
    wanted = begun_with("--rows", plan.rows, [row.name for row in rows])
    return tuple(row for row in rows if row.name in wanted)


def list_rows(plan: GpuBench) -> str:
    """The rows and their targets; needs no GPU."""
    lines = [[row.name, str(row), "; ".join(map(str, row.targets))] for row in rows_of(plan)]
    return table(["row", "what", "targets"], lines)


def bench_gpu(plan: GpuBench, *, progress: ProgressLine, device: str = "cuda") -> dict[str, Any]:
    """Prints every row as it is measured, then all targets; returns what the file holds.

    Raises UnsupportedError where there is no GPU, ArgumentError for a row there is not.
    """
    rows, budget = rows_of(plan), Budget(plan.seconds)
    asking = {"repeat": plan.repeat, "peers": list(plan.peers)}
    with Session(device, asking) as session:
        machine = _described(session)
        when = datetime.now(timezone.utc)
        what = f"headrace bench gpu on {machine['name']}, {when:%Y-%m-%d}"
        document = Document(plan.path or default_path(machine["name"]), {"what": what, "at": when.isoformat()})
        run = Run(session, document, budget, device, progress)
        run.begin(machine, plan)
        for stage in ([row for row in rows if row.work != "case"], [row for row in rows if row.work == "case"]):
            run.measure_all(stage, warm=plan.warm)
        if plan.calibrate:
            run.calibrate(machine["name"])
        run.end()
    return document.data


def _described(session: Session) -> dict[str, Any]:
    hint = "a machine with an NVIDIA or AMD GPU and torch; `headrace bench gpu --list` shows the rows anywhere"
    try:
        found: dict[str, Any] = session.ask("describe", _ROOFS_S)
    except ProcessFailed as error:
        raise UnsupportedError(f"bench gpu: needs a GPU: {error}", hint) from error
    return found


@dataclass
class Run:
    """One run: its rows are measured, printed and written as they come."""

    session: Session
    document: Document
    budget: Budget
    device: str
    progress: ProgressLine
    roofs: Roofs = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    regrets: list[Regret] = field(default_factory=list)

    def begin(self, machine: Mapping[str, Any], plan: GpuBench) -> None:
        """Measures what the device reaches."""
        self.progress("measuring the device", 0, None)
        try:
            found = self.session.ask("roofs", min(_ROOFS_S, self.budget.left))
        except ProcessFailed as error:
            found = {"roofs": {}, "failed": {"all": str(error)}}
        self.roofs = found["roofs"]
        self.document.put(machine=dict(machine), **found, repeat=plan.repeat, budget_s=plan.seconds)
        print(machine_text(machine, found), flush=True)

    def measure_all(self, rows: Sequence[GpuRow], *, warm: bool) -> None:
        """Rows in their order, for as long as there is time."""
        if not rows or (rows[0].work == "case" and self.budget.left < _REGRET_S):
            self._leave_out(rows)
            return
        if warm:
            self._warm_up(rows)
        for number, row in enumerate(rows):
            self.progress(f"measuring {row.name}", number, len(rows))
            if self.budget.left < _LEAST_S:
                self._leave_out(rows[number:])
                return
            self._measure(row)

    def _leave_out(self, rows: Sequence[GpuRow]) -> None:
        for row in rows:
            self.document.leave_out(row.name, "no time was left")
        if rows:
            say(f"no time was left for {len(rows)} rows: headrace bench gpu --rows {rows[0].name},... measures them")

    def _warm_up(self, rows: Sequence[GpuRow]) -> None:
        light = [row for row in rows if row.work != "first" and sum(row.sizes.get("key_lens", ())) <= _MOST_WARM_KEYS]
        processes = max(1, min(_WARM_PROCESSES, usable_cores() // 2, len(light)))
        if processes == 1:
            return  # compiling beforehand gains nothing where it cannot be done side by side
        self.progress("compiling", 0, None)
        begin = self.budget.spent
        done = warm_up(light, self.device, min(_WARM_S, _WARM_SHARE * self.budget.left), processes)
        say(f"compiled for {done} of {len(light)} rows in {self.budget.spent - begin:.0f} s")

    def _measure(self, row: GpuRow) -> None:
        begin = self.budget.spent
        found = self._found(row)
        found["took_s"] = round(self.budget.spent - begin, 2)
        verdicts = verdicts_of(row, found, self.roofs)
        self.verdicts += verdicts
        if found.get("regret"):
            self.regrets.append(_regret(row.name, found))
        self.document.add(row.name, str(row), found, verdicts)
        print(block(row, found, self.roofs, verdicts) + "\n", flush=True)

    def _found(self, row: GpuRow) -> dict[str, Any]:
        if row.work != "first":
            return self.session.row(row, self.budget.left)
        try:
            return measure_first(row.sizes["op"], self.device, min(row.limit_s, self.budget.left))
        except RuntimeError as error:
            return {"error": str(error)}

    def calibrate(self, device: str) -> None:
        """Keeps what the rows tell of the kernels' speeds."""
        found, text = calibrated(self.document.data["rows"], device)
        self.document.put(calibration=found)
        print(f"{text}\n")

    def end(self) -> None:
        """Regret, and all targets."""
        total = regret_summary(self.regrets)
        if self.regrets:
            worst = {"regret": total["worst_beyond_noise"]}
            verdict = judged(REGRET, Target("regret", GOAL), worst, self.roofs)
            self.verdicts.append(verdict)
            self.document.data["targets"].append(verdict.data())
            print(regret_text(total))
        self.document.put(regret=total, took_s=round(self.budget.spent, 1))
        print(summary(self.verdicts))
        print(f"{self.budget.spent:.0f} s; all of it is in {self.document.path}", flush=True)


def _regret(name: str, found: Mapping[str, Any]) -> Regret:
    return Regret(name, found["chosen"], found["fastest"], found["regret"], found["beyond_noise"], {})


def machine_text(machine: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The device and its roofs."""
    roofs = found["roofs"]
    rates = [f"{name} {roofs[name] / 1e9:.0f} GB/s" for name in ("copy", "read") if name in roofs]
    rates += [f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in roofs.items() if name not in ("copy", "read")]
    launches = [
        f"a launch {1e6 * found[key]:.1f} us {where}"
        for key, where in (("launch_s", "from Python"), ("graph_launch_s", "in a graph"))
        if key in found
    ]
    failed = [f"  not measured: {name}: {why}" for name, why in found.get("failed", {}).items()]
    head = f"{machine['name']} {machine.get('arch', '')}, torch {machine['torch']}, triton {machine['triton']}"
    return "\n".join([head, f"  {', '.join(rates)}", *([f"  {'; '.join(launches)}"] if launches else []), *failed, ""])


def regret_text(total: Mapping[str, Any]) -> str:
    """The choice over all that was measured, in a line."""
    over = f": {', '.join(total['over_goal'])}" if total["over_goal"] else ""
    return (
        f"regret over {total['cases']} cases: median {total['median']:.2f}, worst {total['worst']:.2f}, "
        f"worst beyond noise {total['worst_beyond_noise']:.2f}, {len(total['over_goal'])} over {GOAL}{over}"
    )
