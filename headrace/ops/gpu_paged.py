"""GPU kernels over the pages of a KV cache as candidates, attention, append and merge: their plans and conditions.

The plan is told from shapes, as kernels/paged_tiles.py decides them: the same tables that a launch goes by.
"""

from __future__ import annotations

import functools

from headrace.gpu_machine import Gpu
from headrace.kernels.chips import chip_like
from headrace.kernels.paged_tiles import Heads, paged_tile, slots_of, units_of, workspace_bytes
from headrace.machine import KernelSpeed
from headrace.ops.kv_formats import FORMAT_OF_DTYPE
from headrace.ops.per_gpu import arithmetic_of, gpu_kernel
from headrace.ops.select import Kernel, Plan, Reason, Request

_FLOATS = ("float32", "float16", "bfloat16")
_MOST = 1 << 30  # of keys of a request, and of query rows: numbers of 32 bits on the device


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Those of attention over pages."""
    speed = KernelSpeed(8e-6, arithmetic=0.45, read=0.9)
    return (gpu_kernel("triton_paged", "headrace.kernels.triton.paged_attention", why_not, plan, speed=speed),)


def why_not(request: Request) -> list[Reason]:
    """The kernel's own conditions."""
    if request.op != "paged_attention" or "page_table" not in request.shapes:
        return [Reason("op", request.op, "paged_attention", "triton_attention is for keys without pages")]
    if request.dtypes["query"] not in _FLOATS:
        got = request.dtypes["query"]
        return [Reason("dtype of query", got, " or ".join(_FLOATS), "GPUs compute float64 slowly: use the CPU")]
    query, key, table = (request.shapes[name] for name in ("query", "key", "page_table"))
    keys, rows = table[1] * key[1], query[0] * query[1]
    if max(keys, rows) >= _MOST:
        return [Reason("keys of a request, query rows", f"{keys}, {rows}", f"fewer than {_MOST} of each", "split it")]
    if request.dtypes.get("mask") == "float64":
        return [Reason("dtype of mask", "float64", "bool or a narrower float", "mask.float()")]
    return []


def plan(request: Request, gpu: Gpu) -> Plan:
    """Workers, parts of the longest item and bytes of partial results, as a launch has them."""
    query, key, table = (request.shapes[name] for name in ("query", "key", "page_table"))
    invariant = bool(request.options["deterministic"])
    arithmetic = _arithmetic(request)
    heads = _heads(request, wide=arithmetic not in ("bf16", "fp16"))
    masked, chip = "mask" in request.shapes, chip_like(request.arch)
    tile = paged_tile(heads, query[0], table[0], invariant=invariant, chip=chip, masked=masked)
    workers, most_keys = gpu.multiprocessors * tile.per_multiprocessor, table[1] * key[1]
    num_items = (query[0] * heads.group // tile.rows + table[0]) * key[2]
    slots = slots_of(tile, workers=workers, num_items=num_items, most_keys=most_keys, invariant=invariant)
    share = max(-(-num_items * units_of(tile, most_keys) * tile.weight // workers), tile.least)
    notes = [f"{tile.rows} query rows and {tile.keys} keys a tile, {tile.num_stages - 1} tiles under way"]
    if invariant:
        notes.append(f"chunks of {tile.unit_keys} keys")
    return Plan(
        splits=min(max(units_of(tile, most_keys) * tile.weight // share, 1), workers),
        workers=workers,
        workspace_bytes=workspace_bytes(tile, heads, slots),
        deterministic=True,
        batch_invariant=invariant,
        arithmetic=arithmetic,
        notes=tuple(notes),
    )


def _arithmetic(request: Request) -> str:
    """Products of what pages hold beside a query of another type, and exact ones, are float32's."""
    query, key, precision = request.dtypes["query"], request.dtypes["key"], request.options["precision"]
    wide = query != "float32" and (precision == "exact" or (key in _FLOATS and key != query))
    dtypes = {**request.dtypes, "query": "float32"} if wide else request.dtypes
    return arithmetic_of(dtypes, precision, request.device)


def _heads(request: Request, *, wide: bool) -> Heads:
    query, key, value = (request.shapes[name] for name in ("query", "key", "value"))
    bits = FORMAT_OF_DTYPE[request.dtypes["key"]].bits
    packed = 2 if request.dtypes["key"] == "uint8" else 1
    return Heads(query[1] // key[2], query[2], value[3] * packed, bits, wide=wide)


# Append and merge


@functools.cache
def append_kernels() -> tuple[Kernel, ...]:
    """Those of append_pages and append_latent_pages; what they take is checked in append_checks.py."""
    speed = KernelSpeed(5e-6, arithmetic=0.1, read=0.5)
    return (gpu_kernel("triton_append", "headrace.kernels.triton.append_pages", _anything, _by_rows, speed=speed),)


def _anything(request: Request) -> list[Reason]:
    return []


@functools.cache
def merge_kernels() -> tuple[Kernel, ...]:
    """Those of merge_attention."""
    speed = KernelSpeed(5e-6, arithmetic=0.1, read=0.7)
    module = "headrace.kernels.triton.merge_attention"
    return (gpu_kernel("triton_merge", module, why_not_merge, _by_rows, speed=speed),)


def why_not_merge(request: Request) -> list[Reason]:
    """The kernel's own conditions."""
    wide = [name for name, dtype in request.dtypes.items() if dtype == "float64"]
    if wide:
        return [Reason(f"dtype of {wide[0]}", "float64", " or ".join(_FLOATS), "merge float64 on the CPU")]
    return []


def _by_rows(request: Request, gpu: Gpu) -> Plan:
    """Each row on its own."""
    return Plan(workers=gpu.multiprocessors, batch_invariant=True)
