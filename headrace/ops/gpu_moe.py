"""The GPU kernels of mixture_of_experts and route, and torch's grouped products beside them."""

from __future__ import annotations

from headrace.machine import KernelSpeed
from headrace.ops.gpu_rows import converts_float8
from headrace.ops.per_gpu import GENERATION, arithmetic_of, gpu_kernel
from headrace.ops.select import Kernel, Plan, Reason, Request

# Five launches; of the arithmetic roof what Triton's products reach with gathered rows, not measured yet.
SPEED = KernelSpeed(call_s=15e-6, arithmetic=0.55, read=0.85)
# A sort, copies of rows and some twenty launches.
TORCH_SPEED = KernelSpeed(call_s=120e-6, arithmetic=0.6, read=0.6)
DIRECT_TOKENS = 4  # as kernels/triton/moe.py has it


def kernels() -> tuple[Kernel, ...]:
    """mixture_of_experts."""
    return (
        gpu_kernel("triton_moe", "headrace.kernels.triton.moe", _why_not_float8, _plan, speed=SPEED),
        gpu_kernel("torch_moe", "headrace.kernels.torch.moe", _why_not_torch, _torch_plan, speed=TORCH_SPEED),
    )


def routing_kernels() -> tuple[Kernel, ...]:
    """route."""
    return (gpu_kernel("triton_route", "headrace.kernels.triton.moe_routing", _nothing, _routing_plan),)


def _nothing(request: Request) -> list[Reason]:
    return []


def _why_not_float8(request: Request) -> list[Reason]:
    if request.dtypes["gate"] != "float8_e4m3fn" or converts_float8(request.arch):
        return []
    return [Reason(GENERATION, request.arch, "one that converts float8", "int8 experts")]


def _why_not_torch(request: Request) -> list[Reason]:
    found = []
    if "gate_scales" in request.shapes:
        found.append(Reason("dtype of gate", request.dtypes["gate"], "floats", "dequantized experts"))
    elif request.device != "cpu" and {request.dtypes[name] for name in ("x", "gate")} != {"bfloat16"}:
        hint = "other types would wait for the GPU"
        found.append(Reason("dtype", f"{request.dtypes['x']} and {request.dtypes['gate']}", "bfloat16", hint))
    if request.device != "cpu" and any(n % 8 for n in request.shapes["gate"][1:]):
        found.append(Reason("ffn_dim, dim", str(request.shapes["gate"][1:]), "multiples of 8"))
    return found


def _plan(request: Request, gpu: object) -> Plan:
    invariant = bool(request.options["deterministic"])
    direct = request.shapes["x"][0] <= DIRECT_TOKENS and not invariant
    arithmetic = arithmetic_of(request.dtypes, request.options["precision"], request.device)
    if direct and arithmetic.startswith("tf32"):
        arithmetic = "fp32"
    note = "a program per row, nothing sorted" if direct else "tokens sorted by expert on the device"
    workers = getattr(gpu, "multiprocessors", 1)
    return Plan(workers=workers, arithmetic=arithmetic, batch_invariant=invariant, notes=(note,))


def _torch_plan(request: Request, gpu: object) -> Plan:
    arithmetic = arithmetic_of(request.dtypes, request.options["precision"], request.device)
    return Plan(workers=getattr(gpu, "multiprocessors", 1), arithmetic=arithmetic, copies=True)


def _routing_plan(request: Request, gpu: object) -> Plan:
    return Plan(workers=getattr(gpu, "multiprocessors", 1), batch_invariant=True)
