"""What every kernel of a GPU says of itself: where it runs, what it needs, its plan and its cost.

A kernel is a module of kernels/triton, kernels/gluon or kernels/torch, imported when it is first run: listing and
explaining kernels needs neither torch nor Triton nor a GPU. With TRITON_INTERPRET=1 Triton's kernels, and torch's own,
take arrays of the CPU as well, where their arithmetic is tested: never chosen, for it takes seconds, but run by name.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from headrace.gpu_machine import LAUNCH_SECONDS, USUAL_ARCH, Gpu, gpu_of
from headrace.machine import KernelSpeed, Machine
from headrace.ops.late import late
from headrace.ops.per_isa import DEVICE
from headrace.ops.select import Kernel, Plan, Reason, Request

LIBRARY = "library"  # the predicate of a missing one
GENERATION = "GPU generation"  # and of another GPU
OLDEST_LIBRARIES = {"torch": "2.9", "triton": "3.6"}

# Of a kernel that was never measured: shares of the roofs of arithmetic and of copying.
DEFAULT_SPEED = KernelSpeed(LAUNCH_SECONDS, arithmetic=0.6, read=0.85)
# NumPy in the place of a GPU: longer than anything that a kernel of the CPU takes.
_INTERPRETER_SECONDS = 1e15
_ALONE = 1.5  # times its share of the bandwidth that one multiprocessor can have where others are idle
_OLDEST = 80  # compute capability of all kernels here: bfloat16 products

Conditions = Callable[[Request], Sequence[Reason]]
Planner = Callable[[Request, Gpu], Plan]


def gpu_kernel(
    name: str,
    module: str,
    why_not: Conditions,
    plan: Planner | None = None,
    *,
    arches: tuple[str, ...] | None = None,
    function: str = "run",
    speed: KernelSpeed = DEFAULT_SPEED,
) -> Kernel:
    """The kernel of that module. `why_not`: its own conditions; arches: beginnings of the generations it is for.

    speed: until it is measured; its call_s where a launch takes LAUNCH_SECONDS, of which a GPU may have its own.
    """
    libraries = ("torch",) if module.startswith("headrace.kernels.torch.") else ("torch", "triton")

    def reasons(request: Request) -> list[Reason]:
        elsewhere = why_not_there(request, arches)
        return elsewhere or why_not_installed(libraries) + list(why_not(request))

    def planned(request: Request, machine: Machine | Gpu) -> Plan:
        return (plan or gpu_plan)(request, _as_gpu(machine))

    def cost(request: Request, machine: Machine | Gpu) -> float:
        gpu = _as_gpu(machine)
        default = replace(speed, call_s=max(speed.call_s + gpu.launch_s - LAUNCH_SECONDS, 0.0))
        seconds = _predicted_seconds(request, gpu, name, default, plan=planned(request, gpu))
        return seconds if request.device != "cpu" else _INTERPRETER_SECONDS + seconds

    generation = arches[0] if arches else "gpu"
    return Kernel(name, reasons, cost, late(module, function), planned, generation, ("cuda", "hip"))


def _as_gpu(machine: Machine | Gpu) -> Gpu:
    """In the interpreter the GPU is the one that stands for the usual generation."""
    return machine if isinstance(machine, Gpu) else gpu_of(USUAL_ARCH["cuda"])


def _predicted_seconds(request: Request, gpu: Gpu, name: str, default: KernelSpeed, *, plan: Plan) -> float:
    """By the kernel's speed as calibrated on that GPU, or by its default."""
    key = f"{request.op}/{name}/{plan.arithmetic or request.traffic.unit}"
    speed = gpu.calibration.get(key, default)
    seconds = speed.seconds(*roof_seconds(request, gpu, plan))
    return seconds + plan.tiles * speed.tile_s + plan.segments * speed.segment_s + plan.merges * speed.merge_s


def roof_seconds(request: Request, machine: Machine | Gpu, plan: Plan) -> tuple[float, float]:
    """Memory's and arithmetic's least time by the roofs, of a kernel that keeps so many multiprocessors busy.

    Of fewer than all each has its share of the arithmetic, and what it can keep under way of the bandwidth.
    """
    traffic = request.traffic
    memory_s, compute_s = machine.seconds(traffic.num_bytes, traffic.flops, plan.arithmetic or traffic.unit)
    if not isinstance(machine, Gpu):
        return memory_s, compute_s
    busy = min(plan.workers / machine.multiprocessors, 1.0)
    return memory_s / min(_ALONE * busy, 1.0), compute_s * plan.padding / busy


# Where it runs


def why_not_there(request: Request, arches: tuple[str, ...] | None) -> list[Reason]:
    """Why no kernel for these generations can run where the arrays are."""
    interpreted = request.device == "cpu" and arches is None and interpreter_asked()
    if request.device not in ("cuda", "hip") and not interpreted:
        return [Reason(DEVICE, request.device, "cuda or hip", "array.cuda(), or one of the kernels for the CPU")]
    if arches is not None and not request.arch.startswith(arches):
        return [Reason(GENERATION, request.arch, " or ".join(arches), "a GPU of it, or one of the portable kernels")]
    if _too_old(request.arch):
        return [Reason(GENERATION, request.arch, f"sm_{_OLDEST} or newer", "an NVIDIA GPU of 2020 or later")]
    return []


def why_not_installed(libraries: Sequence[str]) -> list[Reason]:
    """The first of these libraries that is missing, or older than what kernels are written for."""
    for library in libraries:
        if not _installed(library):
            return [Reason(LIBRARY, f"no {library}", library, "pip install 'headrace[torch]'")]
        if found := _outdated(library):
            needed, fix = f"{library} {OLDEST_LIBRARIES[library]} or newer", "pip install --upgrade 'headrace[torch]'"
            return [Reason(LIBRARY, f"{library} {found}", needed, fix)]
    return []


def interpreter_asked() -> bool:
    """Whether Triton is told to run its kernels in NumPy."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@functools.cache
def _outdated(library: str) -> str:
    """The version that is installed, by whatever name it is distributed under, if it is too old; else ""."""
    for name in (library, f"pytorch-{library}", f"{library}-rocm", f"pytorch-{library}-rocm"):
        with suppress(PackageNotFoundError):
            found = version(name)
            return found if _numbers(found) < _numbers(OLDEST_LIBRARIES[library]) else ""
    return ""


def _numbers(text: str) -> tuple[int, ...]:
    """The first two of a version: 2, 11 of "2.11.0+cu130"."""
    return tuple(int(found) for found in re.findall(r"\d+", text)[:2])


def _too_old(arch: str) -> bool:
    number = arch.removeprefix("sm_").rstrip("af")
    return arch.startswith("sm_") and number.isdigit() and int(number) < _OLDEST


# What it does by default


def gpu_plan(request: Request, gpu: Gpu) -> Plan:
    """All multiprocessors, in the arithmetic that the types and the precision of the call ask for."""
    asked = request.options
    # Ops without a precision have no products: their arithmetic is what the request says.
    arithmetic = arithmetic_of(request.dtypes, asked["precision"], request.device) if "precision" in asked else ""
    invariant = bool(asked.get("deterministic"))
    return Plan(workers=gpu.multiprocessors, arithmetic=arithmetic, batch_invariant=invariant)


def tiled_plan(request: Request, gpu: Gpu, *, rows: int, packed: bool = False) -> Plan:
    """The plan of dense or ragged attention with a program for each tile of so many query rows, keys not divided.

    packed: a tile has rows of all heads that read the same keys.
    """
    query, kv_heads = request.shapes["query"], request.shapes["key"][-2]
    dense = len(query) == 4
    requests = query[0] if dense else max(request.shapes["query_starts"][0] - 1, 1)
    queries, group = query[1] if dense else -(-query[0] // requests), query[-2] // kv_heads
    own, heads = (queries * group, kv_heads) if packed else (queries, query[-2])
    tiles = -(-own // rows)
    workers = min(max(requests * heads * tiles, 1), gpu.multiprocessors)
    return replace(gpu_plan(request, gpu), workers=workers, padding=max(tiles * rows / max(own, 1), 1.0))


def arithmetic_of(dtypes: Mapping[str, str], precision: str, device: str) -> str:
    """What products are computed in on a GPU, by the type of the query (or x).

    16-bit types are multiplied as they are, their sums float32. float32 stays float32: on NVIDIA's tensor cores by
    three products of tf32 parts, elsewhere as it is; "fast" is one product, of tf32 or of bfloat16 parts.
    """
    own = dtypes.get("query", dtypes.get("x", "float32"))
    if own in ("bfloat16", "float16", "float64"):
        return {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}[own]
    if precision == "fast":
        return "bf16" if device == "hip" else "tf32"
    return "tf32x3" if device == "cuda" else "fp32"
