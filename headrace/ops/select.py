"""Choosing a kernel: the cheapest that can run, unless one is asked for by name.

An op lists its kernels in one tuple. Each says why it cannot serve a request (an empty list: it can), what it would
cost on this machine and how it would go about it. `choose` takes the cheapest that can; `explanation.py` prints the
same lists and numbers, so what is said and what is done cannot drift apart. There is no registry and no priority; a
kernel asked for by name, or a property asked for with `require`, is given or raises. `choices` counts what was taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from headrace.errors import ArgumentError, KernelError
from headrace.gpu_machine import Gpu, gpu_of
from headrace.kernels.arrays import arch_of, device_of
from headrace.machine import Machine, this_machine


@dataclass(frozen=True)
class Reason:
    """Why a kernel cannot serve a request: which predicate fails, what it saw, what it needs, how to get there."""

    predicate: str  # a noun: "instruction set", "dtype of key", "head_dim"
    observed: str
    required: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.predicate}: needs {self.required}, got {self.observed}"
        return f"{text} ({self.fix})" if self.fix else text


@dataclass(frozen=True)
class Traffic:
    """What a request must move and compute, whatever the kernel. `unit`: fp64, fp32, bf16 or int8 arithmetic."""

    num_bytes: int
    flops: int
    unit: str = "fp32"


@dataclass(frozen=True)
class Request:
    """Shapes, dtypes and options of one call, without its data. Shapes are in the op's own words."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    traffic: Traffic
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"  # or "cuda", "hip": where its arrays lie
    arch: str = ""  # the GPU's generation: "sm_90", "gfx942"


def placed(request: Request, array: Any) -> Request:
    """The request of arrays that lie where this one does."""
    device = device_of(array)
    return request if device == "cpu" else replace(request, device=device, arch=arch_of(array))


def machine_of(request: Request) -> Machine | Gpu:
    """What prices a request: this machine's CPU, or a GPU of the request's generation."""
    return machine_at(request.device, request.arch)


def machine_at(device: str, arch: str) -> Machine | Gpu:
    """The CPU of this machine, or a GPU of that generation."""
    return this_machine() if device == "cpu" else gpu_of(arch)


@dataclass(frozen=True)
class Plan:
    """How a kernel would serve a request. `tiles`, `segments`, `merges`: of its busiest worker, for the cost model."""

    splits: int = 1  # parts the longest piece of work is cut into
    workers: int = 1
    workspace_bytes: int = 0
    deterministic: bool = True  # the same call on as many threads gives the same bits
    batch_invariant: bool = False  # bits depend on neither neighbours, chunking nor threads
    copies: bool = False  # inputs are converted or repacked in memory first
    arithmetic: str = ""  # what products and sums are done in; empty: the unit of the request's traffic
    padding: float = 1.0  # products computed for each one asked for: tiles are not always full
    tiles: float = 0.0
    segments: float = 0.0
    merges: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op. `run` takes the op's own arguments; `plan` is None where there is nothing to plan.

    cost and plan take the machine that holds the request's arrays: a Machine, or of kernels of a GPU a Gpu.
    """

    name: str
    why_not: Callable[[Request], list[Reason]]
    cost: Callable[[Request, Any], float]
    run: Callable[..., Any]
    plan: Callable[[Request, Any], Plan] | None = None
    isa: str = ""  # the instruction set or GPU generation it is written for
    devices: tuple[str, ...] = ("cpu",)  # whose arrays it takes

    def planned(self, request: Request, machine: Machine | Gpu) -> Plan:
        """How it would serve the request."""
        return self.plan(request, machine) if self.plan else Plan(workers=machine.cores)


@dataclass(frozen=True)
class Requirement:
    """A property a caller may require. `lacking` tells what a kernel with its plan has instead; empty: it has it."""

    required: str
    fix: str
    lacking: Callable[[Kernel, Plan, Request], str]


def _inexact(kernel: Kernel, plan: Plan, request: Request) -> str:
    arithmetic = plan.arithmetic or request.traffic.unit
    return "" if arithmetic in EXACT else f"{arithmetic} arithmetic"


# tf32x3: three products of tf32 parts, whose error is that of float32.
EXACT = ("fp32", "fp64", "tf32x3")


REQUIREMENTS: Mapping[str, Requirement] = {
    "batch_invariant": Requirement(
        "bits that depend on neither neighbours, chunking nor threads",
        "deterministic=True",
        lambda kernel, plan, request: "" if plan.batch_invariant else "a schedule made for this batch",
    ),
    "deterministic": Requirement(
        "the same bits for the same call on as many threads",
        "deterministic=True",
        lambda kernel, plan, request: "" if plan.deterministic else "sums in an order that may change",
    ),
    "exact": Requirement("fp32 or fp64 arithmetic", 'precision="exact"', _inexact),
    "no_copy": Requirement(
        "inputs read where they lie",
        "pass arrays of a type and layout the kernel reads",
        lambda kernel, plan, request: "inputs converted or repacked first" if plan.copies else "",
    ),
    "vectorised": Requirement(
        "vector instructions",
        "a CPU with AVX2, and no limit_isa below it",
        lambda kernel, plan, request: "the portable kernel" if kernel.isa == "portable" else "",
    ),
}


def reasons_against(
    kernel: Kernel, request: Request, require: Sequence[str] = (), machine: Machine | Gpu | None = None
) -> list[Reason]:
    """The kernel's own reasons, and one for each requirement that its plan does not meet."""
    reasons = list(kernel.why_not(request))
    if require and not reasons:
        plan = kernel.planned(request, machine or machine_of(request))
        for name in require:
            wanted = REQUIREMENTS[name]
            if lacking := wanted.lacking(kernel, plan, request):
                reasons.append(Reason(f"require {name}", lacking, wanted.required, wanted.fix))
    return reasons


def choose(kernels: Sequence[Kernel], request: Request, name: str | None = None, require: Sequence[str] = ()) -> Kernel:
    """The cheapest kernel that can run and has all that is required; with a name that one. It is counted.

    What runs in an interpreter of GPU kernels is taken by name alone.
    require: names out of REQUIREMENTS. Raises KernelError with the whole explanation when there is no such kernel.
    """
    require = checked_requirements(require)
    machine = machine_of(request)
    able = [
        kernel
        for kernel in kernels
        if (kernel.name == name or (name is None and request.device in kernel.devices))
        and not reasons_against(kernel, request, require, machine)
    ]
    if not able:
        raise _no_kernel(kernels, request, name, require)
    chosen = able[0] if len(able) == 1 else able[cheapest([kernel.cost(request, machine) for kernel in able])]
    count_choice(request.op, chosen.name)
    return chosen


def cheapest(costs: Sequence[float]) -> int:
    """Which of these costs is the lowest; of those within a hundredth of it the first, for predictions are no better
    than that and an op lists its kernels best first."""
    limit = 1.01 * min(costs)
    return next(i for i, seconds in enumerate(costs) if seconds <= limit)


def checked_requirements(require: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple; ArgumentError for one that is unknown."""
    names = (require,) if isinstance(require, str) else tuple(require)
    for name in names:
        if name not in REQUIREMENTS:
            raise ArgumentError(f"require: expected names among {', '.join(REQUIREMENTS)}, got {name!r}")
    return names


def _no_kernel(kernels: Sequence[Kernel], request: Request, name: str | None, require: Sequence[str]) -> KernelError:
    from headrace.ops.explanation import explain_request

    names = [kernel.name for kernel in kernels]
    if name is not None and name not in names:
        return KernelError(f"kernel: {request.op} has none named {name!r}", f"one of {', '.join(names)}")
    told = explain_request(kernels, request, require=require)
    if name is None:
        return KernelError(f"no kernel can run this {request.op}{_with(require)}\n{told}")
    why = "; ".join(str(rejected.reason) for rejected in told.rejected if rejected.kernel == name)
    return KernelError(f"kernel {name!r} cannot run this {request.op}{_with(require)}: {why}\n{told}")


def _with(require: Sequence[str]) -> str:
    return f" with require={tuple(require)!r}" if require else ""


# Counting. NOTE: the one piece of state here; a recorded program chooses, and counts, once: when it is recorded.

_counts: dict[tuple[str, str], int] = {}
_counts_lock = threading.Lock()


def count_choice(op: str, kernel: str) -> None:
    """One more call that this kernel serves."""
    with _counts_lock:
        _counts[op, kernel] = _counts.get((op, kernel), 0) + 1


def choices() -> Mapping[tuple[str, str], int]:
    """How often each (op, kernel) was chosen in this process since `reset_choices`; a copy that does not change.

    A program that was recorded counts its kernels once, when it is recorded.
    """
    with _counts_lock:
        return MappingProxyType(dict(_counts))


def reset_choices() -> None:
    """Starts counting anew."""
    with _counts_lock:
        _counts.clear()
