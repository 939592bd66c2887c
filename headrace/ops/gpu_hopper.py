"""Kernels for Hopper alone, in Gluon: attention where products bind, MLA decode with a whole tile of heads.

They take fewer options than Triton's, which stand behind them: what a request asks for beyond is a Reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headrace.gpu_machine import LAUNCH_SECONDS, Gpu
from headrace.machine import KernelSpeed
from headrace.ops.per_gpu import gpu_kernel, gpu_plan, tiled_plan
from headrace.ops.select import Kernel, Plan, Reason, Request

TYPES = ("bfloat16", "float16")
_PORTABLE = "Triton's kernels take it"
# Shares of the measured roofs that the schedules are expected to reach: 650 of 790 TFLOP/s, 600 of them in MLA.
_ATTENTION_SPEED = KernelSpeed(LAUNCH_SECONDS, arithmetic=0.82, read=0.85)
_MLA_SPEED = KernelSpeed(2 * LAUNCH_SECONDS, arithmetic=0.76, read=0.9)
_ATTENTION_ROWS = 128
_ATTENTION_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
_ATTENTION_LACKS = ("mask", "first_keys", "last_keys", "key_scales", "value_scales")
_MOST_PACKED = 64  # heads that lie in one tile
_MOST_TOKENS = 2**29  # positions are counted in 32 bits
_MLA_MOST_ROWS = 1 << 20  # its work list is made by one program
_MLA_TILE, _MLA_KEY_DIM, _MLA_VALUE_DIM, _MLA_BLOCK = 64, 576, 512, 64


def kernels() -> tuple[Kernel, ...]:
    """Of dense and ragged attention, in front of the portable ones."""
    return (
        gpu_kernel(
            "gluon_attention",
            "headrace.kernels.gluon.attention",
            why_not_attention,
            _attention_plan,
            arches=("sm_90",),
            speed=_ATTENTION_SPEED,
        ),
    )


def latent_kernels() -> tuple[Kernel, ...]:
    """Of latent attention alone."""
    return (
        gpu_kernel(
            "gluon_mla",
            "headrace.kernels.gluon.mla_attention",
            why_not_mla,
            _mla_plan,
            arches=("sm_90",),
            speed=_MLA_SPEED,
        ),
    )


def why_not_attention(request: Request) -> list[Reason]:
    """Dense and ragged calls in 16 bits with heads of the usual sizes; every option but masks."""
    if request.op != "attention":
        return [Reason("layout", request.op, "dense or ragged keys", "kernels of paged attention take pages")]
    dims = (request.shapes["query"][-1], request.shapes["value"][-1])
    if dims not in _ATTENTION_DIMS:
        wanted = "64, 128, 256, both alike, or 192 and 128"
        return [Reason("head_dim and value_dim", str(dims), wanted, _PORTABLE)]
    tokens = max(math.prod(request.shapes[name][:-2]) for name in ("query", "key"))
    if tokens >= _MOST_TOKENS:
        return [Reason("tokens", str(tokens), f"less than {_MOST_TOKENS}", "several calls, merged")]
    return _why_not_types(request) or _why_not_given(request, _ATTENTION_LACKS)


def why_not_mla(request: Request) -> list[Reason]:
    """Latents of 512 and 64 in 16 bits, in pages of whole blocks, with a schedule made for the batch."""
    if request.op != "mla_attention":
        return [Reason("op", request.op, "mla_attention", "another kernel is for it")]
    key, value = request.shapes["key"], request.shapes["value"]
    if (key[-1], value[-1]) != (_MLA_KEY_DIM, _MLA_VALUE_DIM):
        got = f"{key[-1]}, values {value[-1]}"
        return [Reason("latent and value_dim", got, f"{_MLA_KEY_DIM}, values {_MLA_VALUE_DIM}", _PORTABLE)]
    if key[1] % _MLA_BLOCK:
        return [Reason("page_size", str(key[1]), f"a multiple of {_MLA_BLOCK}", "larger pages, or Triton's kernel")]
    if request.shapes["query"][0] * request.shapes["query"][1] > _MLA_MOST_ROWS:
        got = f"{request.shapes['query'][0]} x {request.shapes['query'][1]}"
        return [Reason("query tokens x heads", got, f"up to {_MLA_MOST_ROWS}", "prompts are for the expanded form")]
    if request.options["deterministic"]:
        return [Reason("deterministic", "True", "False", "its schedule depends on the batch; Triton's kernels take it")]
    return _why_not_types(request) or _why_not_options(request)


def _why_not_types(request: Request) -> list[Reason]:
    query, key = request.dtypes["query"], request.dtypes["key"]
    if unaligned := request.options.get("unaligned"):
        return [Reason(f"memory of {unaligned}", "other strides", "rows that begin at whole 16 bytes", _PORTABLE)]
    if query not in TYPES:
        return [Reason("dtype of query", query, " or ".join(TYPES), _PORTABLE)]
    if key != query:
        return [Reason("dtype of key", key, f"{query}, the query's", _PORTABLE)]
    if request.options["precision"] == "exact":
        return [
            Reason("precision", "exact", "auto or fast", "weights are rounded to 16 bits; Triton's kernels are exact")
        ]
    return []


def _why_not_given(request: Request, names: Sequence[str]) -> list[Reason]:
    return [Reason(name, "given", "none", _PORTABLE) for name in names if name in request.shapes][:1]


def _why_not_options(request: Request) -> list[Reason]:
    if given := _why_not_given(request, (*_ATTENTION_LACKS, "sinks", "alibi_slopes")):
        return given
    if request.options["window"][0] is not None:
        return [Reason("window", str(request.options["window"]), "no bound on the left", _PORTABLE)]
    if request.options["softcap"] is not None:
        return [Reason("softcap", str(request.options["softcap"]), "none", _PORTABLE)]
    return []


def _attention_plan(request: Request, gpu: Gpu) -> Plan:
    """A tile of 128 rows for each program: of one head, or of the heads of a KV head where their number is even."""
    group = request.shapes["query"][-2] // request.shapes["key"][-2]
    one = tiled_plan(request, gpu, rows=_ATTENTION_ROWS)
    if group & (group - 1) or group > _MOST_PACKED:
        return one
    packed = tiled_plan(request, gpu, rows=_ATTENTION_ROWS, packed=True)
    return packed if packed.padding < one.padding else one


def _mla_plan(request: Request, gpu: Gpu) -> Plan:
    """Workers share the keys of all requests; partial results in float32, room for two of each worker."""
    usual = gpu_plan(request, gpu)
    requests = max(request.shapes["page_table"][0], 1)
    tokens, heads = request.shapes["query"][:2]
    rows = max(-(-tokens // requests) * heads, 1)  # of a request
    row_tiles = -(-rows // _MLA_TILE)
    together = min(row_tiles, 4)
    workers = max(gpu.multiprocessors // together, 1)
    room = 2 * workers * together * _MLA_TILE * (_MLA_VALUE_DIM + 1) * 4
    return Plan(
        splits=max(-(-workers // requests), 1),
        workers=workers * together,
        workspace_bytes=room,
        padding=row_tiles * _MLA_TILE / rows,
        arithmetic=usual.arithmetic,
        notes=(f"{together} row tiles read the same keys together",),
    )
