"""Attention by torch's own kernels, as candidates beside ours: what each takes, and what it is thought to cost.

What torch checks in silence, and falls back from to another backend, is a `Reason` here. Of one more kind: what torch's
kernels do but return no lse for, or align otherwise. They are dense attention's alone, and never wait for the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from headrace.gpu_machine import Gpu, gpu_of
from headrace.machine import KernelSpeed
from headrace.ops.per_gpu import Planner, gpu_kernel, gpu_plan, tiled_plan
from headrace.ops.select import Kernel, Plan, Reason, Request

MODULE = "headrace.kernels.torch.attention"
_HALF = ("float16", "bfloat16")
_ANY_FLOAT = (*_HALF, "float32", "float64")
# Of the scores of the whole matrix: times each is written or read in memory, 4 bytes, at an H200's rate.
_SCORE_SECONDS = 8 * 4 / 4.3e12
_FLEX_QUERIES = 128  # fewer are decode, whose shapes change at every step, and each would be compiled

Said = Iterator[Reason]
Check = Callable[[Request], Said]


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Those of dense attention."""
    return (
        _fused_kernel("cudnn", _why_not_cudnn, _tiles_of_128, KernelSpeed(20e-6, arithmetic=0.7, read=0.6)),
        _fused_kernel("flash", _why_not_flash, _flash_plan, KernelSpeed(15e-6, arithmetic=0.48, read=0.6)),
        _fused_kernel("efficient", _why_not_efficient, _tiles_of_64, KernelSpeed(15e-6, arithmetic=0.3, read=0.5)),
        gpu_kernel(
            "torch_flex",
            "headrace.kernels.torch.flex_attention",
            _all_of(_dense, _plain, _why_not_flex),
            _tiles_of_128,
            speed=KernelSpeed(60e-6, arithmetic=0.45, read=0.5),
        ),
        gpu_kernel(
            "torch_math",
            MODULE,
            _all_of(_dense, _why_not_math),
            _whole_matrix,
            function="run_math",
            speed=KernelSpeed(100e-6, arithmetic=0.7, read=0.5, tile_s=_SCORE_SECONDS),
        ),
    )


def _fused_kernel(backend: str, check: Check, plan: Planner, speed: KernelSpeed) -> Kernel:
    """One of SDPA's fused backends."""
    why_not = _all_of(_dense, _plain, _fused, check)
    return gpu_kernel(f"torch_{backend}", MODULE, why_not, plan, function=f"run_{backend}", speed=speed)


def _all_of(*checks: Check) -> Callable[[Request], list[Reason]]:
    """All reasons of the first of these checks that has any: later ones build on what earlier ones make sure of."""

    def reasons(request: Request) -> list[Reason]:
        return next((found for check in checks if (found := list(check(request)))), [])

    return reasons


# What all of them need


def _dense(request: Request) -> Said:
    rank = len(request.shapes["query"])
    if request.op != "attention" or rank != 4:
        layout = "ragged" if request.op == "attention" else request.op
        yield Reason("layout", layout, "dense", "query [batch, queries, heads, head_dim]")
    elif request.dtypes["key"] not in _ANY_FLOAT:
        yield Reason("dtype of key", request.dtypes["key"], "floats", "quantized keys are other kernels'")
    elif request.options["deterministic"]:
        yield Reason("deterministic", "True", "False", "torch's kernels divide work by the size of the batch")


def _plain(request: Request) -> Said:
    """No arrays beside query, key and value."""
    extra = {"mask", "sinks", "alibi_slopes", "key_lens", "first_keys", "last_keys"} & set(request.shapes)
    for name in sorted(extra):
        yield Reason(name, "an array", "none", "torch_math takes it")
    own = request.dtypes["query"]
    for name in ("key", "value", "out"):
        if request.dtypes[name] != own:
            yield Reason(f"dtype of {name}", request.dtypes[name], own, "one type for all")
    if own in _HALF and request.options["precision"] == "exact":
        yield Reason("precision", "exact", "auto or fast", f"weights are rounded to {own}")
    if 0 in (*request.shapes["query"], *request.shapes["key"]):
        yield Reason("shape", "an empty array", "one of everything at least", "torch_math takes it")


def _fused(request: Request) -> Said:
    """What SDPA's fused backends have in common."""
    query, key, options = request.shapes["query"], request.shapes["key"], request.options
    if options["softcap"] is not None:
        yield Reason("softcap", str(options["softcap"]), "None", "torch_flex takes it")
    left, right = options["window"]
    if (left, right) not in ((None, None), (None, 0)):
        yield Reason("window", str(options["window"]), "None", "torch_flex takes it")
    causal = options["causal"] or right == 0
    aligned = query[1] == key[1] or (query[1] == 1 and options["align"] == "bottom_right")
    if causal and not aligned:
        yield Reason("causal", f"{query[1]} queries, {key[1]} keys", "as many of both", "torch aligns at the top left")
    if request.shapes["value"][-1] != query[-1]:
        yield Reason("value_dim", str(request.shapes["value"][-1]), str(query[-1]), "torch_math takes any")


# What each needs


def _why_not_flash(request: Request) -> Said:
    on_cpu = request.device == "cpu"
    yield from _dtype_among(
        request, ("float32", "float64") if on_cpu else _HALF
    )  # there, 16-bit types get a rough exponential
    yield from _head_dim(request, 256, 8)
    if on_cpu and request.shapes["query"][2] != request.shapes["key"][2]:
        yield Reason("heads", "fewer of keys", "as many of both", "torch's kernel for the CPU repeats none")


def _why_not_efficient(request: Request) -> Said:
    yield from _on_gpu(request, ("cuda", "hip"))
    yield from _dtype_among(request, (*_HALF, "float32"))
    yield from _head_dim(request, math.inf, 4 if request.dtypes["query"] == "float32" else 8)
    if request.shapes["query"][2] != request.shapes["key"][2]:
        yield Reason("heads", "fewer of keys", "as many of both", "it would need them repeated in memory")


def _why_not_cudnn(request: Request) -> Said:
    yield from _on_gpu(request, ("cuda",))
    yield from _dtype_among(request, _HALF)
    yield from _head_dim(request, 128, 8)
    if request.shapes["key"][1] < 2:
        yield Reason("keys", "1", "2 or more", "")


def _why_not_flex(request: Request) -> Said:
    yield from _dtype_among(request, (*_HALF, "float32"))
    if request.device != "cpu" and request.shapes["query"][1] < _FLEX_QUERIES:
        text = f"{_FLEX_QUERIES} or more"
        yield Reason("queries", str(request.shapes["query"][1]), text, "it is compiled for each shape")
    if request.dtypes["query"] == "float32" and request.options["precision"] != "fast" and request.device != "cpu":
        yield Reason("precision", request.options["precision"], "fast", "its float32 products may be of tf32 parts")
    if min(request.shapes["query"][-1], request.shapes["value"][-1]) < 16:
        yield Reason("head_dim", str(request.shapes["query"][-1]), "16 or more", "torch_math takes any")


def _why_not_math(request: Request) -> Said:
    if "mask" in request.shapes and "key_lens" in request.shapes:
        yield Reason("mask", "with key_lens", "one of them", "its columns would end at each length")
    if "mask" in request.shapes and request.shapes["mask"][-1] > request.shapes["key"][1]:
        yield Reason("mask", "more columns than keys", "as many at most", "")
    num_bytes, most = 12 * _scores(request), gpu_of(request.arch).memory_bytes // 2
    if request.device != "cpu" and num_bytes > most:
        yield Reason("scores", f"{num_bytes / 1e9:.0f} GB", f"at most {most / 1e9:.0f} GB", "a kernel that keeps none")


def _on_gpu(request: Request, devices: Sequence[str]) -> Said:
    if request.device not in devices:
        yield Reason("device", request.device, " or ".join(devices), "torch has it nowhere else")


def _dtype_among(request: Request, allowed: Sequence[str]) -> Said:
    if request.dtypes["query"] not in allowed:
        yield Reason("dtype of query", request.dtypes["query"], " or ".join(allowed), "torch_math takes any")


def _head_dim(request: Request, most: float, multiple: int) -> Said:
    head_dim = request.shapes["query"][-1]
    if head_dim > most:
        yield Reason("head_dim", str(head_dim), f"{most} at most", "")
    if head_dim % multiple and request.device != "cpu":
        yield Reason("head_dim", str(head_dim), f"a multiple of {multiple}", "torch would pad it, which is a copy")


# How they go about it


def _flash_plan(request: Request, gpu: Gpu) -> Plan:
    """One query is decode: heads of a group share a tile, and keys are divided over all multiprocessors."""
    if request.shapes["query"][1] > 1:
        return _tiles_of_128(request, gpu)
    return replace(tiled_plan(request, gpu, rows=64, packed=True), workers=gpu.multiprocessors)


_tiles_of_128 = functools.partial(tiled_plan, rows=128)
_tiles_of_64 = functools.partial(tiled_plan, rows=64)


def _scores(request: Request) -> int:
    """How many there are."""
    batch, queries, heads, _ = request.shapes["query"]
    return batch * queries * heads * request.shapes["key"][1]


def _whole_matrix(request: Request, gpu: Gpu) -> Plan:
    """In float32, whatever the type: operands are converted first."""
    wide = "fp64" if request.dtypes["query"] == "float64" else "fp32"
    plan = gpu_plan(request, gpu)
    copies = request.dtypes["query"] in _HALF
    return Plan(
        workers=plan.workers,
        workspace_bytes=8 * _scores(request),
        arithmetic=wide,
        tiles=_scores(request),
        copies=copies,
    )
