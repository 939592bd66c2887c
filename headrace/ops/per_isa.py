"""What every CPU kernel says of itself: one per instruction set, its conditions and its cost.

A native op exists once per instruction set. The higher one wins unless it does not exist for the request; how much of
the machine's arithmetic each reaches is the only number here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.kernels import cpu
from headrace.machine import Machine
from headrace.ops.select import Kernel, Request

# Share of the machine's measured arithmetic roof, per instruction set.
ARITHMETIC = {"portable": 0.05, "avx2": 0.4, "avx512": 0.8, "amx": 1.0}
CALL_SECONDS = 2e-6

Conditions = Callable[[Request], list[str]]


def _no_conditions(request: Request) -> list[str]:
    return []


def cpu_kernel(level: str, run: Callable[..., Any], why_not: Conditions = _no_conditions) -> Kernel:
    """The kernel of one instruction set. `run(level, ...)` takes the level first, then the op's arguments."""

    def reasons(request: Request) -> list[str]:
        missing = cpu.ISAS.index(level) > cpu.ISAS.index(cpu.isa())
        return ([_missing(level)] if missing else []) + why_not(request)

    def cost(request: Request, machine: Machine) -> float:
        traffic = request.traffic
        memory_s, compute_s = machine.seconds(traffic.num_bytes, traffic.flops, traffic.unit)
        return max(memory_s, compute_s / ARITHMETIC[level]) + compute_s * 1e-3 / ARITHMETIC[level] + CALL_SECONDS

    def run_at_level(*args: Any, **options: Any) -> Any:
        return run(level, *args, **options)

    return Kernel(f"cpu_{level}", reasons, cost, run_at_level)


def _missing(level: str) -> str:
    if cpu.ISAS.index(level) > cpu.ISAS.index(cpu.best_isa()):
        return f"needs {level}; this CPU has {cpu.best_isa()}"
    return f"needs {level}; limit_isa keeps this process at {cpu.isa()}"


def per_isa(run: Callable[..., Any], levels: tuple[str, ...] = cpu.ISAS[:3]) -> tuple[Kernel, ...]:
    """One kernel per instruction set for an op whose native code exists in all of them."""
    return tuple(cpu_kernel(level, run) for level in reversed(levels))
