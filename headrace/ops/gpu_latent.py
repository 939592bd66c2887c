"""The GPU's kernels of latent attention: what each can do, and how it goes about it.

triton_mla reads a cached row once for scores and values, takes every option and any type. Those of one generation alone
stand in front of it (gpu_hopper.py).
"""

from __future__ import annotations

import functools
import math

from headrace.gpu_machine import LAUNCH_SECONDS, Gpu
from headrace.kernels import mla_tiles
from headrace.kernels.chips import chip_like
from headrace.kernels.mla_tiles import Division
from headrace.machine import KernelSpeed
from headrace.ops.gpu_hopper import latent_kernels
from headrace.ops.per_gpu import gpu_kernel
from headrace.ops.select import Kernel, Plan, Reason, Request

# Expected of an H200 (docs/kernels/mla_triton.md): 430 of 790 TFLOP/s; reading nearly at the rate of copying.
_SPEED = KernelSpeed(2 * LAUNCH_SECONDS, arithmetic=0.55, read=0.92)
_LITTLE_SHARED, _MOST_LITTLE_DIM = ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), 512
_ARITHMETIC = {"float16": "fp16", "bfloat16": "bf16"}


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Best first."""
    portable = gpu_kernel("triton_mla", "headrace.kernels.triton.mla_attention", why_not_mla, mla_plan, speed=_SPEED)
    return (*latent_kernels(), portable)


def why_not_mla(request: Request) -> list[Reason]:
    """What the latent kernel does not do."""
    if request.op != "mla_attention":
        return [Reason("op", request.op, "mla_attention", "")]
    if request.dtypes["query"] == "float64":
        wanted = "float32, float16 or bfloat16"
        return [Reason("dtype of query", "float64", wanted, "the CPU's kernels compute in float64")]
    return [
        reason for reason in (_widths(request), _shared_memory(request), _room(request), _workspace(request)) if reason
    ]


def _widths(request: Request) -> Reason | None:
    value_dim, rest = _dims(request)
    if mla_tiles.width_of(value_dim, rest) <= mla_tiles.MOST_WIDTH:
        return None
    most = f"up to {mla_tiles.MOST_WIDTH}, each as a power of two"
    return Reason(
        "value_dim + rest of the latent",
        f"{value_dim} + {rest}",
        most,
        "paged_attention, of the pages as keys and values",
    )


def _shared_memory(request: Request) -> Reason | None:
    """A tile of float32 takes 104 KB, which multiprocessors for graphics have not."""
    dim = request.shapes["query"][-1]
    if request.arch in _LITTLE_SHARED and dim > _MOST_LITTLE_DIM and _kind(request)[0] == "wide":
        return Reason(
            "latent + rope in float32", str(dim), f"up to {_MOST_LITTLE_DIM} on {request.arch}", "16-bit types"
        )
    return None


def _room(request: Request) -> Reason | None:
    keys = _capacity(request)
    if keys <= mla_tiles.MOST_KEYS:
        return None
    return Reason("keys a request has room for", str(keys), f"up to {mla_tiles.MOST_KEYS}", "a narrower page_table")


def _workspace(request: Request) -> Reason | None:
    num_bytes = _division(request, 132).workspace_bytes(_dims(request)[0])
    if num_bytes <= mla_tiles.MOST_WORKSPACE_BYTES:
        return None
    most = f"up to {mla_tiles.MOST_WORKSPACE_BYTES >> 20} MiB"
    return Reason("workspace", f"{num_bytes >> 20} MiB", most, "deterministic=False, or a narrower page_table")


def _dims(request: Request) -> tuple[int, int]:
    """Numbers of a row that are values, and the others."""
    dim, codes = request.shapes["query"][-1], request.shapes["value"][-1]
    value_dim = codes * (2 if request.dtypes["value"] == "uint8" else 1)
    return value_dim, dim - value_dim


def _capacity(request: Request) -> int:
    return request.shapes["page_table"][1] * request.shapes["key"][1]


def _kind(request: Request) -> tuple[str, str]:
    return mla_tiles.kind_of(request.dtypes["query"], request.dtypes["key"], request.options["precision"])


def _division(request: Request, multiprocessors: int) -> Division:
    (tokens, heads, _), requests = request.shapes["query"], request.shapes["page_table"][0]
    return mla_tiles.division(
        tokens,
        requests,
        heads,
        _capacity(request),
        chip=_chip(request),
        kind=_kind(request)[0],
        multiprocessors=multiprocessors,
        invariant=bool(request.options["deterministic"]),
    )


def _chip(request: Request) -> str:
    """Whose tiles are used; in the interpreter those of the usual GPU."""
    return "gfx942" if request.device == "hip" else chip_like(request.arch)


def mla_plan(request: Request, gpu: Gpu) -> Plan:
    """Tiles, parts of the longest item, and what they take."""
    cut = _division(request, gpu.multiprocessors)
    invariant = bool(request.options["deterministic"])
    wide = mla_tiles.float32_products(request.device, request.options["precision"]).replace("ieee", "fp32")
    tile = f"tiles of {cut.tile.rows} rows x {cut.tile.keys} keys"
    side = f", {cut.members} of them over the same keys at once" if cut.members > 1 else ""
    return Plan(
        splits=_splits(request, cut),
        workers=math.prod(cut.grid) if not cut.workers else cut.workers * cut.members,
        workspace_bytes=cut.workspace_bytes(_dims(request)[0]),
        batch_invariant=invariant,
        padding=_padding(request, cut),
        arithmetic=_ARITHMETIC.get(_kind(request)[1], wide),
        notes=(tile + side,),
    )


def _padding(request: Request, cut: Division) -> float:
    """Rows of tiles for each row there is, as if all requests had equally many."""
    rows = request.shapes["query"][1] * max(request.shapes["query"][0] // max(request.shapes["page_table"][0], 1), 1)
    return -(-rows // cut.tile.rows) * cut.tile.rows / rows


def _splits(request: Request, cut: Division) -> int:
    """Parts of an item, as if all requests had equally many keys."""
    requests = max(request.shapes["page_table"][0], 1)
    keys = -(-int(request.options["num_keys"]) // requests)
    if not cut.workers:
        return max(1, min(cut.units, -(-keys // (cut.unit_tiles * cut.tile.keys))))
    most = keys // (16 * mla_tiles.LEAST)
    return max(1, min(-(-cut.workers // max(cut.items - requests, requests)), most))
