"""What a GPU is and what it reaches: bytes per second, operations per second by type, seconds of a launch.

All on random numbers, through torch: products of zeros run faster, and a copy moves what it reads and what it writes.
The figures are kept (`headrace.gpu_machine.keep_gpu`), and kernels are chosen by them from then on.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

from headrace.bench.asked_process import error_text
from headrace.bench.gpu_clock import timed
from headrace.bench.gpu_work import normal
from headrace.bench.timing import Spread
from headrace.gpu_machine import Gpu, arch_of_gpu, keep_gpu

_REPEAT = 7
_COPIED_BYTES = 4 << 30
_SIDE = 8192  # of the matrices; of those in float32 and float64 half
_LAUNCHES = 256
_TEST_SCALE = 256  # that sizes are divided by without a GPU
_LAUNCH_TIMES = ("launch_s", "graph_launch_s")


def describe(device: str) -> dict[str, Any]:
    """The device and the versions that matter. RuntimeError where there is none."""
    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version(), "triton": _triton_version()}
    if device == "cpu":
        return {"name": platform.processor() or "CPU", "arch": "", **versions}
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    found = torch.cuda.get_device_properties(torch.device(device))
    return {
        "name": found.name,
        "arch": arch_of_gpu(torch.cuda.current_device()),
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda or torch.version.hip,
        **versions,
    }


def _triton_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def measure(device: str) -> dict[str, Any]:
    """Roofs by name, launches, and what could not be measured."""
    scale = _TEST_SCALE if device == "cpu" else 1
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, probe in _probes(device, scale).items():
        try:
            found[name] = probe()
        except Exception as error:  # an old torch, or a type that the device lacks
            failed[name] = error_text(error)
    launches: dict[str, Any] = {name: found.pop(name) for name in _LAUNCH_TIMES if name in found}
    if device != "cpu":
        _keep(describe(device), found, launches)
    return {"roofs": found, **launches, "failed": failed}


def _probes(device: str, scale: int) -> Mapping[str, Callable[[], float]]:
    side, half = _SIDE // scale, _SIDE // 2 // scale
    return {
        "copy": lambda: _copy(device, _COPIED_BYTES // scale**2),
        "read": lambda: _read(device, _COPIED_BYTES // scale**2),
        "bf16": lambda: _product(device, "bfloat16", side),
        "fp16": lambda: _product(device, "float16", side),
        "fp8": lambda: _product_fp8(device, side),
        "int8": lambda: _product_int8(device, side),
        "tf32": lambda: _product(device, "float32", side, tf32=True),
        "fp32": lambda: _product(device, "float32", half),
        "fp64": lambda: _product(device, "float64", half),
        "launch_s": lambda: _launch(device, in_graph=False),
        "graph_launch_s": lambda: _launch(device, in_graph=True),
    }


def _seconds(call: Callable[[int], Any], device: str) -> float:
    ready = timed(call, 1, device)
    return Spread.of([ready.sample() for _ in range(_REPEAT)]).median


def _copy(device: str, num_bytes: int) -> float:
    source = normal((num_bytes // 4,), "float32", device)
    target = source.clone()
    return 2 * num_bytes / _seconds(lambda number: target.copy_(source), device)


def _read(device: str, num_bytes: int) -> float:
    source = normal((num_bytes // 4,), "float32", device)
    return num_bytes / _seconds(lambda number: source.sum(), device)


def _product(device: str, dtype: str, side: int, *, tf32: bool = False) -> float:
    import torch

    a, b = (normal((side, side), dtype, device, seed) for seed in (0, 1))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return 2 * side**3 / _seconds(lambda number: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _product_fp8(device: str, side: int) -> float:
    import torch

    a, b = (normal((side, side), "bfloat16", device, seed).to(torch.float8_e4m3fn) for seed in (0, 1))
    one = torch.ones((), device=device)
    options: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    return 2 * side**3 / _seconds(lambda number: torch._scaled_mm(a, b.t(), **options), device)


def _product_int8(device: str, side: int) -> float:
    import torch

    a, b = (normal((side, side), "bfloat16", device, seed).mul(30).to(torch.int8) for seed in (0, 1))
    return 2 * side**3 / _seconds(lambda number: torch._int_mm(a, b.t()), device)


def _launch(device: str, *, in_graph: bool) -> float:
    """Seconds of one of many small launches: in a graph, and from Python."""
    import time

    one = normal((1,), "float32", device)
    if in_graph:
        return _seconds(lambda number: one.add_(1), device)
    samples = []
    for _ in range(_REPEAT):
        begin = time.perf_counter()
        for _ in range(_LAUNCHES):
            one.add_(1)
        samples.append((time.perf_counter() - begin) / _LAUNCHES)
    return Spread.of(samples).median


def _keep(device: Mapping[str, Any], roofs: Mapping[str, float], launches: Mapping[str, float]) -> None:
    sizes: dict[str, Any] = {"multiprocessors": device["multiprocessors"], "memory_bytes": device["memory_bytes"]}
    own = {name: rate for name, rate in roofs.items() if name != "read"}
    launch: dict[str, Any] = {"launch_s": launches["graph_launch_s"]} if "graph_launch_s" in launches else {}
    keep_gpu(Gpu(name=device["name"], arch=device["arch"], roofs=own, **launch, **sizes))
