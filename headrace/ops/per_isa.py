"""What every CPU kernel says of itself: one per instruction set, its conditions and its cost.

A native op exists once per instruction set. The higher one wins unless it does not exist for the request. What share of
the arithmetic roof each reaches is measured by `headrace bench ops --calibrate`; until then it is what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace.gpu_machine import Gpu
from headrace.kernels import cpu
from headrace.machine import KernelSpeed, Machine
from headrace.ops.select import Kernel, Plan, Reason, Request

INSTRUCTION_SET = "instruction set"  # the predicate of a missing one
NATIVE_EXTENSION = "native extension"  # and of an installation without any
DEVICE = "device"  # and of arrays that lie elsewhere
CALL_SECONDS = 2e-6

# Of a kernel that was never measured here: the share of the arithmetic roof that its instruction set reaches.
_ARITHMETIC = {"portable": 0.05, "avx2": 0.4, "avx512": 0.8, "avx512_bf16": 0.9, "amx": 1.0}
DEFAULT_SPEEDS = {level: KernelSpeed(CALL_SECONDS, share) for level, share in _ARITHMETIC.items()}

Conditions = Callable[[Request], Sequence[Reason]]
Planner = Callable[[Request, Machine], Plan]


def _no_conditions(request: Request) -> list[Reason]:
    return []


def cpu_kernel(
    level: str, run: Callable[..., Any], why_not: Conditions = _no_conditions, plan: Planner | None = None
) -> Kernel:
    """The kernel of one instruction set. `run(level, ...)` takes the level first, then the op's arguments."""
    name, lower = f"cpu_{level}", frozenset(cpu.ISAS[: cpu.ISAS.index(level)])

    def reasons(request: Request) -> list[Reason]:
        return ([_missing(level)] if level_in_force() in lower else []) + list(why_not(request))

    def cost(request: Request, machine: Machine) -> float:
        planned = plan(request, machine) if plan else None
        return predicted_seconds(request, machine, name, DEFAULT_SPEEDS[level], planned)

    def run_at_level(*args: Any, **options: Any) -> Any:
        return run(level, *args, **options)

    return Kernel(name, native_conditions(reasons), cost, run_at_level, plan, level)


def native_conditions(own: Conditions) -> Callable[[Request], list[Reason]]:
    """A native kernel's own conditions, and those of all: arrays on the CPU, and native code."""

    def reasons(request: Request) -> list[Reason]:
        if request.device != "cpu":
            return [Reason(DEVICE, request.device, "cpu", "array.cpu(), or one of the kernels for GPUs")]
        return ([] if cpu.built() else [_NOT_BUILT]) + list(own(request))

    return reasons


_NOT_BUILT = Reason(NATIVE_EXTENSION, "not built", "built", "pip install headrace, from a wheel or with a compiler")


def level_in_force() -> str:
    """The instruction set kernels are chosen at now; empty without native code."""
    return cpu.isa() if cpu.built() else ""


def predicted_seconds(
    request: Request, machine: Machine | Gpu, kernel: str, default: KernelSpeed, plan: Plan | None = None
) -> float:
    """What a kernel with that plan takes: by its speed as calibrated on this machine, or by its default."""
    traffic = request.traffic
    unit = (plan and plan.arithmetic) or traffic.unit
    speed = machine.calibration.get(f"{request.op}/{kernel}/{unit}", default)
    seconds = speed.seconds(*machine.seconds(traffic.num_bytes, traffic.flops, unit))
    if plan is None:
        return seconds
    return seconds + plan.tiles * speed.tile_s + plan.segments * speed.segment_s + plan.merges * speed.merge_s


def row_by_row(request: Request, machine: Machine) -> Plan:
    """The plan of a kernel that computes each row on its own: its bits depend on nothing else."""
    return Plan(workers=machine.cores, batch_invariant=True)


def _missing(level: str) -> Reason:
    if cpu.ISAS.index(level) > cpu.ISAS.index(cpu.best_isa()):
        return Reason(INSTRUCTION_SET, f"{cpu.best_isa()}, this CPU's best", level, "a CPU that has it")
    return Reason(INSTRUCTION_SET, f"{cpu.isa()}, where limit_isa keeps it", level, "a higher limit_isa, or none")


def per_isa(
    run: Callable[..., Any],
    levels: tuple[str, ...] = cpu.ISAS[:3],
    why_not: Conditions = _no_conditions,
    plan: Planner | None = None,
) -> tuple[Kernel, ...]:
    """One kernel per instruction set for an op whose native code exists in all of them."""
    return tuple(cpu_kernel(level, run, why_not, plan) for level in reversed(levels))
