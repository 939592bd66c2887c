"""`headrace bench roofline`: the ops of a model's steps under this machine's measured roofs, drawn.

Across, how much an op computes per byte it must move; upwards, how much it computes per second. Read bandwidth is a
slope, arithmetic a level: no op can be above both. A point is one op of a prefill or a decode step, and its distance
from the roof above it is what could be gained. Ops that only move bytes have no place in such a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.bench.figure import check_target, new_figure, save
from headrace.bench.model import ModelBench, check_model
from headrace.bench.roofline import measured_machine
from headrace.bench.step import ExplainedStep, OpTime, Roofs, explained_steps, roofs_of
from headrace.machine import Machine
from headrace.talk import ProgressLine

if TYPE_CHECKING:
    from headrace.llm import LLM

_SAME_RATE = 0.2  # lines closer than this would be one
_MARKS = {"prefill": "^", "decode": "o"}


def bench_roofline(
    model: str, plan: ModelBench, out: Path, *, threads: int | None, progress: ProgressLine
) -> list[ExplainedStep]:
    """Measures the steps of the plan and draws them to `out`; the kind of file is that of its ending.

    Raises ArgumentError for another ending or a folder that cannot be written to, HeadraceError without matplotlib.
    """
    check_target(out)
    from headrace.llm import LLM

    llm = LLM(model, threads=threads, context_len=plan.context_len, kv_dtype=plan.kv_dtype, progress=progress)
    machine = measured_machine(llm.bytes_per_token, llm.threads)
    check_model(llm)
    steps = []
    for step in explained_steps(llm, plan, roofs_of(llm, machine)):
        steps.append(step)
        progress("measuring", len(steps), 2 * len(plan.depths))
    draw(steps, roofs_of(llm, machine), out, title=_title(llm, machine), slopes=_slopes(llm, machine))
    return steps


def draw(
    steps: Sequence[ExplainedStep],
    roofs: Roofs,
    out: Path,
    *,
    title: str,
    slopes: Mapping[str, float] | None = None,
) -> None:
    """Draws the steps under the roofs. slopes: read bandwidths in bytes/s by what they are called."""
    figure = new_figure(figsize=(11, 7))
    axes = figure.add_subplot()
    points = {step.title: [op for op in step.ops if op.part.traffic.flops and op.measured_s] for step in steps}
    across = _span(points.values(), roofs)
    axes.set(xscale="log", yscale="log", title=title, xlabel="FLOP per byte moved", ylabel="FLOP/s")
    axes.grid(True, which="major", lw=0.3)
    _draw_roofs(axes, across, roofs, slopes or {"read": roofs.read})
    _scatter(axes, steps, points)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, out)


def _draw_roofs(axes: Any, across: np.ndarray, roofs: Roofs, slopes: Mapping[str, float]) -> None:
    top = max(roofs.products.values())
    for number, (name, rate) in enumerate(slopes.items()):
        axes.plot(across, np.minimum(across * rate, top), lw=1, color="0.3")
        at = across[8 * number]  # a little further for each, or their names would overlap
        _name(axes, (at, at * rate), f"{name}: {rate / 1e9:.1f} GB/s")
    for unit, rate in roofs.products.items():
        axes.plot(across, np.full_like(across, rate), lw=1, ls="--", color="0.3")
        _name(axes, (across[-1], rate), f"{unit}: {rate / 1e9:.0f} GFLOP/s", ha="right")


def _span(points: Any, roofs: Roofs) -> np.ndarray:
    """Intensities from left of all points to right of them and of where the slope meets the highest level."""
    found = [_intensity(op) for ops in points for op in ops]
    found += [rate / roofs.read for rate in roofs.products.values()]
    return np.geomspace(min(found) / 2, max(found) * 4, 200)


def _intensity(op: OpTime) -> float:
    return op.part.traffic.flops / op.part.traffic.num_bytes


def _scatter(axes: Any, steps: Sequence[ExplainedStep], points: dict[str, list[OpTime]]) -> None:
    """One point per op; a colour is what an op is for, a mark the kind of step."""
    roles = list(dict.fromkeys(op.part.role for ops in points.values() for op in ops))
    for step in steps:
        for role in roles:
            ops = [op for op in points[step.title] if op.part.role == role]
            if ops:
                axes.scatter(
                    [_intensity(op) for op in ops],
                    [op.part.traffic.flops / op.measured_s for op in ops],
                    s=18,
                    alpha=0.6,
                    marker=_MARKS[step.phase],
                    color=f"C{roles.index(role) % 10}",
                    label=f"{role}, {step.title}",
                )


def _name(axes: Any, place: tuple[float, float], text: str, **options: Any) -> None:
    """A line's name on the line."""
    axes.text(*place, text, fontsize="small", va="bottom", **options)


def _title(llm: LLM, machine: Machine) -> str:
    threads = f"{llm.threads} thread{'s' * (llm.threads > 1)}"
    return f"{llm.path.name}, {threads}, {machine.cpu_name}"


def _slopes(llm: LLM, machine: Machine) -> dict[str, float]:
    """Read bandwidth of the model's own working set, and of what fits a cache and of memory where they differ."""
    threads, measured = llm.threads, machine.reads.get(llm.threads, {})
    found: dict[str, float] = {}
    for size in (llm.bytes_per_token, min(measured, default=0), max(measured, default=0)):
        rate = machine.roof_for(size, threads) if size else None
        if rate and all(abs(rate / other - 1) > _SAME_RATE for other in found.values()):
            found[f"read {size / 1e6:.3g} MB"] = rate
    return found
