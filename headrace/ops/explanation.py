"""What the choice of a kernel would be, and why: the same lists and numbers that `choose` goes by. Nothing runs.

told = explain_request(kernels, request)
told.chosen      the kernel that would run: its plan, predicted seconds, and the share of the roof that makes
told.able        the others that could run
told.rejected    the rest, one entry per reason: predicate, observed, required, how to fix
told.as_dict()   the same for JSON;  str(told) the same as a table
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.gpu_machine import USUAL_ARCH, Gpu, gpu_of
from headrace.machine import Machine
from headrace.ops.select import Kernel, Reason, Request, cheapest, checked_requirements, machine_of, reasons_against


@dataclass(frozen=True)
class Candidate:
    """A kernel that can run a request: how it would, and how long it is predicted to take."""

    kernel: str
    isa: str
    splits: int
    workers: int
    workspace_bytes: int
    deterministic: bool
    batch_invariant: bool
    arithmetic: str
    predicted_s: float
    bound: str  # the roof that binds: "memory" or "compute"
    roof_fraction: float  # expected share of that roof
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rejection:
    """One reason why one kernel cannot run a request."""

    kernel: str
    reason: Reason

    @property
    def predicate(self) -> str:
        return self.reason.predicate

    @property
    def observed(self) -> str:
        return self.reason.observed

    @property
    def required(self) -> str:
        return self.reason.required

    @property
    def fix(self) -> str:
        return self.reason.fix


@dataclass(frozen=True)
class Explanation:
    """What `choose` would do with a request, and why."""

    request: Request
    chosen: Candidate | None
    able: tuple[Candidate, ...]  # the others that can run, cheapest first
    rejected: tuple[Rejection, ...]
    memory_s: float  # the least time for the bytes
    compute_s: float  # and for the arithmetic
    measured: bool  # whether these come from measured roofs
    gpu: str = ""  # the product whose roofs these are; empty: this machine's CPU

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        request = self.request
        asked = {"op": request.op, "shapes": _lists(request.shapes), "dtypes": dict(request.dtypes)}
        asked |= {"device": request.device, "arch": request.arch}
        asked |= {"options": {name: _plain(value) for name, value in request.options.items()}}
        return {
            "request": asked | {"traffic": asdict(request.traffic)},
            "chosen": self.chosen and _candidate_dict(self.chosen),
            "able": [_candidate_dict(candidate) for candidate in self.able],
            "rejected": [{"kernel": rejected.kernel, **asdict(rejected.reason)} for rejected in self.rejected],
            "roof": {
                "memory_s": self.memory_s,
                "compute_s": self.compute_s,
                "measured": self.measured,
                "gpu": self.gpu,
            },
        }

    def __str__(self) -> str:
        lines = [f"{self.request.op}: {_shapes_text(self.request)}", f"  {self._roof_text()}"]
        candidates = [("chosen", self.chosen)] if self.chosen else []
        candidates += [("able", candidate) for candidate in self.able]
        rows = [[mark, *_cells(candidate)] for mark, candidate in candidates]
        lines += _aligned(_HEADS, rows) if rows else ["  no kernel can run this"]
        lines += [f"  note: {note}" for note in (self.chosen.notes if self.chosen else ())]
        refused = [["cannot", rejected.kernel, *asdict(rejected.reason).values()] for rejected in self.rejected]
        return "\n".join(lines + (_aligned(_REFUSED_HEADS, refused) if refused else []))

    def _roof_text(self) -> str:
        traffic = self.request.traffic
        which = "measured" if self.measured else "guessed"
        command = "headrace bench gpu" if self.gpu else "headrace doctor"
        hint = "" if self.measured else f"; `{command}` measures them"
        which += f" roofs of {self.gpu}" if self.gpu else " roofs"
        work = f"{_bytes_text(traffic.num_bytes)}, {traffic.flops / 1e9:.3g} GFLOP {traffic.unit}"
        least = f"at least {_time_text(self.memory_s)} for memory, {_time_text(self.compute_s)} for arithmetic"
        return f"{work}: {least} ({which}{hint})"


def explain_request(
    kernels: Sequence[Kernel], request: Request, machine: Machine | Gpu | None = None, require: Sequence[str] = ()
) -> Explanation:
    """Why each kernel can or cannot serve the request, and its predicted seconds. Runs nothing."""
    machine, require = machine or machine_of(request), checked_requirements(require)
    reasons = [(kernel, reasons_against(kernel, request, require, machine)) for kernel in kernels]
    unrefused = [kernel for kernel, against in reasons if not against]
    able = [_candidate(kernel, request, machine) for kernel in unrefused if request.device in kernel.devices]
    chosen = able.pop(cheapest([candidate.predicted_s for candidate in able])) if able else None
    # In an interpreter, by name alone; as if on the usual GPU, for the CPU has no roofs of its arithmetic.
    usual, others = gpu_of(USUAL_ARCH["cuda"]), [k for k in unrefused if request.device not in k.devices]
    able += [_candidate(kernel, request, usual) for kernel in others]
    able.sort(key=lambda candidate: candidate.predicted_s)
    rejected = tuple(Rejection(kernel.name, reason) for kernel, against in reasons for reason in against)
    memory_s, compute_s = _least_seconds(request, machine)
    gpu = machine.name if isinstance(machine, Gpu) else ""
    return Explanation(request, chosen, tuple(able), rejected, memory_s, compute_s, machine.measured, gpu)


def _least_seconds(request: Request, machine: Machine | Gpu, unit: str = "") -> tuple[float, float]:
    traffic = request.traffic
    return machine.seconds(traffic.num_bytes, traffic.flops, unit or traffic.unit)


def _candidate(kernel: Kernel, request: Request, machine: Machine | Gpu) -> Candidate:
    plan, seconds = kernel.planned(request, machine), kernel.cost(request, machine)
    memory_s, compute_s = _least_seconds(request, machine, plan.arithmetic)
    return Candidate(
        kernel=kernel.name,
        isa=kernel.isa,
        splits=plan.splits,
        workers=plan.workers,
        workspace_bytes=plan.workspace_bytes,
        deterministic=plan.deterministic,
        batch_invariant=plan.batch_invariant,
        arithmetic=plan.arithmetic or request.traffic.unit,
        predicted_s=seconds,
        bound="memory" if memory_s >= compute_s else "compute",
        roof_fraction=max(memory_s, compute_s) / seconds if seconds > 0 else 0.0,
        notes=plan.notes,
    )


# Text

_HEADS = (
    "",
    "kernel",
    "isa",
    "predicted",
    "bound by",
    "of roof",
    "arithmetic",
    "splits",
    "workers",
    "workspace",
    "deterministic",
    "batch-invariant",
)
_REFUSED_HEADS = ("", "kernel", "predicate", "observed", "required", "how to fix")


def _cells(candidate: Candidate) -> list[str]:
    return [
        candidate.kernel,
        candidate.isa,
        _time_text(candidate.predicted_s),
        candidate.bound,
        f"{candidate.roof_fraction:.0%}",
        candidate.arithmetic,
        str(candidate.splits),
        str(candidate.workers),
        _bytes_text(candidate.workspace_bytes),
        "yes" if candidate.deterministic else "no",
        "yes" if candidate.batch_invariant else "no",
    ]


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return [f"  {'  '.join(cells)}".rstrip() for cells in padded]


def _time_text(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _bytes_text(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 10 * size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def _shapes_text(request: Request) -> str:
    return ", ".join(f"{name} {request.dtypes.get(name, '')} {list(shape)}" for name, shape in request.shapes.items())


def _lists(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: [int(n) for n in shape] for name, shape in shapes.items()}


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    return asdict(candidate) | {"notes": list(candidate.notes)}


def _plain(value: Any) -> Any:
    """The value if JSON has it, else its text."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
