"""What a kernel written in NumPy says of itself: it runs wherever arrays lie on the CPU, at a fraction of the roofs."""

from __future__ import annotations

from headrace.machine import KernelSpeed, Machine
from headrace.ops.late import late
from headrace.ops.per_isa import DEVICE, predicted_seconds
from headrace.ops.select import Kernel, Plan, Reason, Request

# Guesses, until `headrace bench ops --calibrate` measures them: passes over temporary arrays, products of one thread.
DEFAULT_SPEED = KernelSpeed(call_s=40e-6, arithmetic=0.3, read=0.1)
NOTE = "NumPy: correct, not fast"


def numpy_kernel(name: str, module: str, function: str = "run") -> Kernel:
    """The kernel of that module of kernels/numpy."""

    def cost(request: Request, machine: Machine) -> float:
        return predicted_seconds(request, machine, name, DEFAULT_SPEED, plan(request, machine))

    return Kernel(name, why_not, cost, late(module, function), plan, "portable")


def why_not(request: Request) -> list[Reason]:
    """Arrays elsewhere, and packed weights."""
    if "packed" in request.dtypes.values():
        return [Reason("table", "a packed weight", "an array", "a native kernel")]
    if request.device == "cpu":
        return []
    return [Reason(DEVICE, request.device, "cpu", "array.cpu(), or a kernel for the GPU")]


def plan(request: Request, machine: Machine) -> Plan:
    """In float32, on copies of it. NumPy divides products by their size, so bits may depend on it."""
    return Plan(workers=machine.cores, arithmetic="fp32", copies=True, notes=(NOTE,))
