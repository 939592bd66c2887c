"""`headrace bench gpu --calibrate`: how far the predictions of GPU kernels are off, fitted and kept for later choices.

Every kernel of every row is a sample: what it had to move and compute by the measured roofs, and how long it took.
Fitting is that of the CPU's kernels (calibrate.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from headrace.bench import calibrate
from headrace.bench.calibrate import Sample
from headrace.bench.report import table
from headrace.gpu_machine import keep_gpu_speeds
from headrace.machine import KernelSpeed
from headrace.ops.per_gpu import roof_seconds

_COUNTS = ("memory_s", "compute_s", "tiles", "segments", "merges")


def told_of(kernel: Any, request: Any, machine: Any) -> dict[str, Any]:
    """What a kernel's prediction is made of, as a worker tells it: the key of its speed, and counts."""
    plan = kernel.planned(request, machine)
    unit = plan.arithmetic or request.traffic.unit
    memory_s, compute_s = roof_seconds(request, machine, plan)
    counts = (memory_s, compute_s, plan.tiles, plan.segments, plan.merges)
    return {"key": f"{request.op}/{kernel.name}/{unit}", **dict(zip(_COUNTS, counts, strict=True))}


def samples_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Sample]]:
    """Samples by "op/kernel/unit", out of the results of rows."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for name, row in rows.items():
        for kernel, told in row.get("predictions", {}).items():
            if kernel in row["by"]:
                seconds = row["by"][kernel]["median_s"]
                counts = {of: told[of] for of in _COUNTS}
                found[told["key"]].append(Sample(name, seconds=seconds, **counts))
    return dict(found)


def calibrated(rows: Mapping[str, Mapping[str, Any]], device: str) -> tuple[dict[str, Any], str]:
    """Fits the speeds, keeps them for the device of that name; as data, and as a table."""
    samples = samples_of(rows)
    speeds: dict[str, KernelSpeed] = calibrate.fitted(samples)
    keep_gpu_speeds(device, speeds)
    return calibrate.data(samples, speeds), table(calibrate.HEADS, calibrate.rows(samples, speeds))
