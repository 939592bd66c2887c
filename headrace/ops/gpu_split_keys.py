"""Dense attention of few rows on a GPU, its keys divided: a candidate that reads them as paged attention does."""

from __future__ import annotations

import functools
from dataclasses import replace

from headrace.gpu_machine import Gpu
from headrace.kernels.dense_pages import MOST_ROWS, PAGE_LENS, rows_of
from headrace.machine import KernelSpeed
from headrace.ops import gpu_paged
from headrace.ops.per_gpu import gpu_kernel
from headrace.ops.select import Kernel, Plan, Reason, Request

_OTHERS = "triton_attention takes it"


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Of dense attention."""
    module, speed = "headrace.kernels.triton.split_keys", KernelSpeed(10e-6, arithmetic=0.45, read=0.88)
    return (gpu_kernel("triton_split_keys", module, why_not, plan, speed=speed),)


def why_not(request: Request) -> list[Reason]:
    """The kernel's own conditions, then those of paged attention."""
    query, key = request.shapes["query"], request.shapes["key"]
    if request.op != "attention" or len(query) != 4:
        return [Reason("layout", request.op, "dense keys", "query [batch, queries, heads, head_dim]")]
    if rows_of(query, key[-2]) > MOST_ROWS:
        return [Reason("query rows", str(rows_of(query, key[-2])), f"up to {MOST_ROWS} of a KV head", _OTHERS)]
    for name in ("mask", "first_keys", "last_keys", "key_scales", "value_scales"):
        if name in request.shapes:
            return [Reason(name, "given", "none", _OTHERS)]
    if not request.options.get("page_len"):
        needed = f"a multiple of {PAGE_LENS[-1]} keys from one of the batch to the next"
        return [Reason("keys in memory", f"{key[1]} of them, apart otherwise", needed, "a cache with room for more")]
    return gpu_paged.why_not(_as_paged(request))


def plan(request: Request, gpu: Gpu) -> Plan:
    """That of paged attention."""
    return gpu_paged.plan(_as_paged(request), gpu)


def _as_paged(request: Request) -> Request:
    """The request that the pages make."""
    (batch, queries, *inner), (_, keys, *rest) = request.shapes["query"], request.shapes["key"]
    page_len = int(request.options["page_len"])
    columns = -(-keys // page_len)
    shapes = dict(request.shapes) | {
        "query": (batch * queries, *inner),
        "key": (batch * columns, page_len, *rest),
        "value": (batch * columns, page_len, *request.shapes["value"][2:]),
        "page_table": (batch, columns),
    }
    return replace(request, op="paged_attention", shapes=shapes)
