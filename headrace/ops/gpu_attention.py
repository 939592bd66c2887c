"""Triton's attention over dense and ragged keys, and its gradients, as candidates: conditions, plan, cost.

They take every option. Keys in pages are other kernels': these would have to look up a page for each tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from headrace.gpu_machine import LAUNCH_SECONDS, Gpu
from headrace.kernels.gpu_products import arithmetic_of
from headrace.machine import KernelSpeed
from headrace.ops.per_gpu import GENERATION, gpu_kernel, tiled_plan
from headrace.ops.select import Kernel, Plan, Reason, Request

MODULE = "headrace.kernels.triton.attention"
# Shares of the roofs, derived in docs/kernels/attention_gpu.md. Of gradients: of the five products that they need.
FORWARD = KernelSpeed(LAUNCH_SECONDS, arithmetic=0.58, read=0.6)
BACKWARD = KernelSpeed(4 * LAUNCH_SECONDS, arithmetic=0.38, read=0.5)
# tile_s: 64 rows of 128 numbers become zeros, are read and rounded, of one of 132 multiprocessors.
ATOMIC = KernelSpeed(5 * LAUNCH_SECONDS, arithmetic=0.52, read=0.5, tile_s=2.5e-6)
_FEW_ROWS, _ROWS = 16, 128  # of a tile: few of them hold all heads that read the same keys
_WIDEST = 256  # of heads whose gradients are added up in memory
_REDUCES = ("sm_90", "sm_10", "sm_11")  # whose copy engine adds tiles to memory, with 227 KB of shared memory
_TILE_BYTES = 4 * 64 * 128  # of their sums
_MOST_TOKENS = 2**29  # positions are counted in 32 bits


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Of attention."""
    return (gpu_kernel("triton_attention", MODULE, _why_not, _plan, speed=FORWARD),)


@functools.cache
def backward_kernels() -> tuple[Kernel, ...]:
    """Of its gradients."""
    module = f"{MODULE}_backward"
    return (
        gpu_kernel("triton_attention_backward", module, _why_not, _plan_in_order, speed=BACKWARD),
        gpu_kernel(
            "triton_attention_backward_atomic",
            module,
            _why_not_atomic,
            _plan_atomic,
            function="run_atomic",
            speed=ATOMIC,
        ),
    )


def _why_not(request: Request) -> list[Reason]:
    """What these kernels lack."""
    if "page_table" in request.shapes or request.op not in ("attention", "attention_backward"):
        return [Reason("layout", "pages", "dense or ragged keys", "kernels of paged attention take them")]
    if request.dtypes["query"] == "float64":
        return [Reason("dtype of query", "float64", "float32, float16 or bfloat16", "torch_math computes in float64")]
    longest = max(math.prod(request.shapes[name][:-2]) for name in ("query", "key"))
    if longest >= _MOST_TOKENS:
        return [Reason("tokens", str(longest), f"less than {_MOST_TOKENS}", "several calls, merged")]
    return []


def _why_not_atomic(request: Request) -> list[Reason]:
    """The same, and what sums in memory cannot be asked for."""
    found, in_order = list(_why_not(request)), "triton_attention_backward"
    if request.device != "cpu" and not request.arch.startswith(_REDUCES):
        found.append(Reason(GENERATION, request.arch, " or ".join(_REDUCES), f"{in_order} needs no sums in memory"))
    if request.options["deterministic"]:
        found.append(Reason("deterministic", "True", "False", f"{in_order} adds in one order"))
    dim = max(request.shapes[name][-1] for name in ("query", "value"))
    if dim > _WIDEST:
        found.append(Reason("head_dim", str(dim), f"up to {_WIDEST}", f"{in_order} takes them"))
    return found


def _plan_in_order(request: Request, gpu: Gpu) -> Plan:
    """Every sum has one order."""
    return replace(_plan(request, gpu), batch_invariant=True)


def _plan_atomic(request: Request, gpu: Gpu) -> Plan:
    """Queries' gradients are added up in float32, in tiles of rows, as tiles of keys come."""
    plan, query = _plan(request, gpu), request.shapes["query"]
    sums = 4 * math.prod(query)
    tiles = sums / (_TILE_BYTES * gpu.multiprocessors)
    workspace = plan.workspace_bytes + sums
    return replace(plan, deterministic=False, batch_invariant=False, workspace_bytes=workspace, tiles=tiles)


def _plan(request: Request, gpu: Gpu) -> Plan:
    """One program for a tile of rows: nothing is split, so bits never depend on the schedule."""
    dtypes, options = request.dtypes, request.options
    arithmetic = arithmetic_of(dtypes["query"], dtypes["key"], options["precision"])
    if arithmetic == "fp32" and request.device == "cuda":
        arithmetic = "tf32x3"
    notes = (f"mask recognised as {options['mask']}",) if options.get("mask") else ()
    tiles = tiled_plan(request, gpu, rows=_FEW_ROWS, packed=True)
    if _rows(request) > _FEW_ROWS:
        tiles = tiled_plan(request, gpu, rows=_ROWS)
    return replace(tiles, workspace_bytes=_workspace_bytes(request), arithmetic=arithmetic, notes=notes)


def _rows(request: Request) -> int:
    """Query rows of a request that read the same keys."""
    query, heads = request.shapes["query"], request.shapes["key"][-2]
    requests = query[0] if len(query) == 4 else max(request.shapes["query_starts"][0] - 1, 1)
    return math.prod(query[:-2]) // max(requests, 1) * query[-2] // heads


def _workspace_bytes(request: Request) -> int:
    """Bits of a bool mask; of gradients two numbers for each row."""
    shapes = request.shapes
    found = 8 * math.prod(shapes["query"][:-1]) if request.op == "attention_backward" else 0
    if request.dtypes.get("mask") == "bool":
        found += 4 * math.prod(shapes["mask"][:-1]) * -(-shapes["mask"][-1] // 32)
    return found
