"""`headrace bench ops`: the attention ops without an engine, beside what the machine allows and beside torch.

For each case: what it must move and compute, and the least time that takes at this machine's roofs, read bandwidth
measured for a working set of that size; then, all in turns, the times. A case is printed only when a sample of its
results is within the error budget. --calibrate and --regret are calibrate.py and regret.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.bench import calibrate as calibration
from headrace.bench import regret as regrets
from headrace.bench.op_cases import CASES, SpeedCase, Work, build, check
from headrace.bench.op_peers import torch_calls
from headrace.bench.report import document, table
from headrace.bench.roofline import Ceiling, measured_machine
from headrace.bench.subjects import subjects
from headrace.bench.timing import Spread, alternate, call_seconds
from headrace.errors import ArgumentError
from headrace.machine import Machine, keep_calibration, limit_cores
from headrace.options import begun_with
from headrace.talk import ProgressLine

OURS = "headrace"
PLAIN_READ = "a plain read of as many bytes"
_SAMPLE_S = 0.02
# Other runtimes let their threads spin on for up to 0.2 s after the work: whoever is next must not pay for it.
_SETTLE_S = 0.25


@dataclass(frozen=True)
class OpsBench:
    """What to measure. cases: names or their beginnings; none: all."""

    cases: tuple[str, ...] = ()
    repeat: int = 7
    threads: int | None = None
    calibrate: bool = False
    regret: bool = False

    def __post_init__(self) -> None:
        if self.repeat < 5:
            raise ArgumentError(
                f"repeat: expected a whole number >= 5, got {self.repeat}", "medians of fewer say little"
            )
        if self.calibrate and self.regret:
            raise ArgumentError("--regret: expected without --calibrate, got both", "first calibrate, then regret")


def bench_ops(plan: OpsBench, *, json_only: bool, progress: ProgressLine) -> dict[str, Any]:
    """Prints what was asked for, then the JSON document (alone when `json_only`), which is also returned."""
    from headrace.kernels import cpu

    if plan.threads is not None:
        limit_cores(plan.threads)
        cpu.default_pool.cache_clear()
    machine = measured_machine(1 << 28, plan.threads or _cores())
    show: Callable[[str], None] = (lambda text: None) if json_only else (lambda text: print(text, flush=True))
    measure = _calibrate if plan.calibrate else _regret if plan.regret else _speeds
    data = {"machine": machine.cpu_name, "threads": machine.cores, "isa": cpu.isa(), "repeat": plan.repeat}
    data |= measure(plan, machine, show, progress)
    print(document(data))
    return data


def _cores() -> int:
    from headrace.machine import this_machine

    return this_machine().cores


# Speed


def _speeds(plan: OpsBench, machine: Machine, show: Callable[[str], None], progress: ProgressLine) -> dict[str, Any]:
    chosen = begun_with("--cases", plan.cases, [case.name for case in CASES])
    cases, found = [case for case in CASES if case.name in chosen], []
    for number, case in enumerate(cases):
        progress(f"measuring {case.name}", number, len(cases))
        work, ceiling = build(case), ceiling_of(case, machine.cores)
        check(case, work)
        show(heading(case, ceiling, work))
        spreads = measure_case(case, work, machine.cores, plan.repeat, reading=2 * ceiling.memory_s > ceiling.compute_s)
        show(table(HEADS, [row(name, spread, spreads[OURS], ceiling) for name, spread in spreads.items()]) + "\n")
        found.append(case_data(case, ceiling, work, spreads))
    return {"cases": found}


def ceiling_of(case: SpeedCase, threads: int) -> Ceiling:
    """What the machine allows, its read bandwidth measured for the size of the case."""
    machine = measured_machine(case.num_bytes, threads)
    read, product = machine.roof_for(case.num_bytes, threads), machine.product_roof(case.unit, threads)
    assert read and product, "the machine was measured"
    return Ceiling(1, case.num_bytes, case.flops, case.num_bytes / read, case.flops / product)


def heading(case: SpeedCase, ceiling: Ceiling, work: Work) -> str:
    """What is to be measured, and what to expect."""
    sides = (
        f"{ceiling.num_bytes / 1e6:.1f} MB at {ceiling.num_bytes / ceiling.memory_s / 1e9:.1f} GB/s",
        f"{ceiling.flops / 1e9:.2f} GFLOP {case.unit} at {ceiling.flops / ceiling.compute_s / 1e9:.0f} GFLOP/s",
    )
    told = work.explain().chosen
    expected = f"; {told.kernel} is predicted to take {told.predicted_s * 1e3:.3g} ms" if told else ""
    least = f"at least {ceiling.seconds * 1e3:.3g} ms ({ceiling.bound})"
    return f"{case.name}: {case}\n  {sides[0]}, {sides[1]}: {least}{expected}"


def measure_case(case: SpeedCase, work: Work, threads: int, repeat: int, *, reading: bool) -> dict[str, Spread]:
    """Seconds per call, ours and torch's, in turns; `reading`: also of reading as many bytes and no more, for what
    memory gives changes by the minute on a machine that others use, too."""
    calls = {OURS: work.run, **torch_calls(case, work, threads)}
    samplers = {name: _sampler(call) for name, call in calls.items()}
    if reading:
        samplers[PLAIN_READ] = _read_sampler(case.num_bytes, threads)
    settle = (lambda: time.sleep(_SETTLE_S)) if len(calls) > 1 else (lambda: None)
    return {name: Spread.of(seconds) for name, seconds in alternate(samplers, repeat, settle).items()}


def _sampler(call: Callable[[], Any]) -> Callable[[], float]:
    return lambda: call_seconds(call, _SAMPLE_S)


def _read_sampler(num_bytes: int, threads: int) -> Callable[[], float]:
    from headrace.kernels.cpu.roof import plain_read

    read = plain_read(num_bytes, threads)
    passes = max(1, round(_SAMPLE_S / read()))
    return lambda: sum(read() for _ in range(passes)) / passes


HEADS = ["  by", "ms (min-max, n)", "GB/s", "GFLOP/s", "of roof", "headrace is"]


def row(name: str, spread: Spread, ours: Spread, ceiling: Ceiling) -> list[str]:
    """A line of the table."""
    median, low, high = (_milliseconds(seconds) for seconds in (spread.median, spread.low, spread.high))
    text = f"{median} ({low}-{high}, {spread.count})"
    ratio = "" if spread is ours else f"{spread.median / ours.median:.2f} x"
    rates = [f"{amount / spread.median / 1e9:.1f}" for amount in (ceiling.num_bytes, ceiling.flops)]
    return [f"  {name}", text, *rates, f"{ceiling.seconds / spread.median:.1%}", ratio]


def _milliseconds(seconds: float) -> str:
    digits = 3 if seconds < 1e-2 else 1 if seconds < 1 else 0
    return f"{1e3 * seconds:.{digits}f}"


def case_data(case: SpeedCase, ceiling: Ceiling, work: Work, spreads: dict[str, Spread]) -> dict[str, Any]:
    """A case for JSON, times in seconds."""
    times = {
        name: {
            "median_s": spread.median,
            "min_s": spread.low,
            "max_s": spread.high,
            "n": spread.count,
            "roof_fraction": ceiling.seconds / spread.median,
            "ratio": spread.median / spreads[OURS].median,
        }
        for name, spread in spreads.items()
    }
    least = {name: getattr(ceiling, name) for name in ("num_bytes", "flops", "memory_s", "compute_s")}
    told = work.explain().chosen
    explained = {"kernel": told.kernel, "predicted_s": told.predicted_s} if told else {}
    return {"case": case.name, "what": str(case), **least, "bound": ceiling.bound, **explained, "by": times}


# Calibration and regret


def _calibrate(plan: OpsBench, machine: Machine, show: Callable[[str], None], progress: ProgressLine) -> dict[str, Any]:
    found = [each for each in subjects(large=True) if not plan.cases or each.name.startswith(plan.cases)]
    progress("calibrating", 0, None)
    samples = calibration.measure(found, machine, plan.repeat)
    speeds = calibration.fitted(samples)
    keep_calibration({**machine.calibration, **speeds})
    show(table(calibration.HEADS, calibration.rows(samples, speeds)))
    return {"calibration": calibration.data(samples, speeds)}


def _regret(plan: OpsBench, machine: Machine, show: Callable[[str], None], progress: ProgressLine) -> dict[str, Any]:
    found: list[regrets.Regret] = []
    for each in subjects():
        if plan.cases and not each.name.startswith(plan.cases):
            continue
        progress(f"measuring {each.name}", len(found), None)
        measured = regrets.measure(each, plan.repeat)
        if measured:
            found.append(measured)
    show(table(regrets.HEADS, [regrets.row(each) for each in found]))
    total = regrets.summary(found)
    show(
        f"regret over {total['cases']} cases: median {total['median']:.2f}, worst {total['worst']:.2f}, "
        f"worst beyond noise {total['worst_beyond_noise']:.2f}, {len(total['over_goal'])} over {regrets.GOAL}"
    )
    return {"regret": total, "cases": [regrets.data(each) for each in found]}
