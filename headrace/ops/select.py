"""Choosing a kernel, and saying why.

An op lists its kernels in one tuple. Each says why it cannot serve a request (an empty list: it can) and what it would
cost on this machine. `choose` takes the cheapest that can; `explain` prints the same lists and numbers, so what is said
and what is done cannot drift apart. There is no registry and no priority; a kernel asked for by name runs or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import KernelError
from headrace.machine import Machine, this_machine


@dataclass(frozen=True)
class Traffic:
    """What a request must move and compute, whatever the kernel. `unit` names the arithmetic: fp32, bf16 or int8."""

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


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op. `run` takes the op's own arguments."""

    name: str
    why_not: Callable[[Request], list[str]]
    cost: Callable[[Request, Machine], float]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Explanation:
    """What `choose` would do with a request, and why."""

    request: Request
    costs: Mapping[str, float]  # seconds, of the kernels that can run
    rejected: Mapping[str, list[str]]
    bound: str  # the roof that binds: "memory" or "compute"

    @property
    def chosen(self) -> str | None:
        return min(self.costs, key=self.costs.__getitem__, default=None)

    def __str__(self) -> str:
        lines = [f"{self.request.op}: {_shapes_text(self.request)}"]
        for name, seconds in sorted(self.costs.items(), key=lambda item: item[1]):
            mark = "chosen" if name == self.chosen else "can run"
            lines.append(f"  {name:<24} {mark:<8} {seconds * 1e6:10.1f} us predicted, {self.bound}-bound")
        for name, reasons in self.rejected.items():
            lines += [f"  {name:<24} cannot   {reason}" for reason in reasons]
        return "\n".join(lines)


def _shapes_text(request: Request) -> str:
    return ", ".join(f"{name} {request.dtypes.get(name, '')} {list(shape)}" for name, shape in request.shapes.items())


def explain(kernels: Sequence[Kernel], request: Request, machine: Machine | None = None) -> Explanation:
    """Why each kernel can or cannot serve the request, and its predicted seconds. Runs nothing."""
    machine = machine or this_machine()
    reasons = {kernel.name: kernel.why_not(request) for kernel in kernels}
    costs = {kernel.name: kernel.cost(request, machine) for kernel in kernels if not reasons[kernel.name]}
    memory_s, compute_s = machine.seconds(request.traffic.num_bytes, request.traffic.flops, request.traffic.unit)
    rejected = {name: why for name, why in reasons.items() if why}
    return Explanation(request, costs, rejected, "memory" if memory_s >= compute_s else "compute")


def choose(kernels: Sequence[Kernel], request: Request, name: str | None = None) -> Kernel:
    """The cheapest kernel that can run; with a name, that one or a KernelError that says why not."""
    if name is not None:
        return _named(kernels, request, name)
    machine = this_machine()
    able = [kernel for kernel in kernels if not kernel.why_not(request)]
    if not able:
        raise KernelError(f"no kernel can run this\n{explain(kernels, request)}")
    return min(able, key=lambda kernel: kernel.cost(request, machine))


def _named(kernels: Sequence[Kernel], request: Request, name: str) -> Kernel:
    for kernel in kernels:
        if kernel.name == name:
            reasons = kernel.why_not(request)
            if reasons:
                raise KernelError(f"kernel {name!r} cannot run this {request.op}: {'; '.join(reasons)}")
            return kernel
    names = ", ".join(kernel.name for kernel in kernels)
    raise KernelError(f"kernel: {request.op} has none named {name!r}", f"one of {names}")
