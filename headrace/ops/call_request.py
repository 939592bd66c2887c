"""What a call would ask of the kernels, from its arrays, or from shapes alone: `explain` without a launch.

    explain("attention", (1, 1, 32, 128), (1, 32768, 8, 128), (1, 32768, 8, 128), dtype="bfloat16", causal=True)
    explain("paged_attention", query, key_pages, value_pages, page_table, sequence_lens, query_starts=starts)
    explain("linear", (1, 4096), (4096, 4096), dtype={"weight": "Q4_0"})
    explain("attention", (1, 8192, 32, 128), *[(1, 8192, 8, 128)] * 2, dtype="bfloat16", device="cuda", arch="sm_90")

The arguments are those of the op, checked as the op checks them, any array given as a tuple: its shape. A shape stands
for an array of zeros that takes no memory (some, with indices). Lengths and starts given as shapes share tokens and
keys out evenly. device and arch: of a GPU that need not be there; by default where the arrays lie.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from headrace.errors import ArgumentError
from headrace.gpu_machine import USUAL_ARCH, arch_in_use
from headrace.kernels import cpu
from headrace.kernels.arrays import Buffer, dtype_name, numpy_dtype
from headrace.kernels.device_weight import DeviceWeight
from headrace.ops.explanation import Candidate, Explanation, explain_request
from headrace.ops.gpu_linear import device_request
from headrace.ops.select import Kernel, Request, placed

Dtypes = str | Mapping[str, str]
Place = tuple[str, str]  # device and generation: "cuda", "sm_90"
_GENERATIONS = {"cuda": r"sm_\d{2,3}[af]?", "hip": r"gfx\d+[0-9a-f]*"}

# Arrays that are not of the call's own type.
_LENGTHS, _STARTS = ("sequence_lens", "key_lens"), {"query_starts": "query", "key_starts": "key"}
_INTEGERS = (*_LENGTHS, *_STARTS, "page_table", "indices", "page_indices", "slots", "tokens")
_FLOATS = ("key_scales", "value_scales", "latent_scales", "sinks", "table", "query_norm", "key_norm", "alibi_slopes")
_OTHER_DTYPES = dict.fromkeys(_INTEGERS, "int32") | dict.fromkeys(_FLOATS, "float32") | {"mask": "bool"}


class Given(NamedTuple):
    """The arguments of `explain`. place: of arrays given as shapes, where it is not the CPU."""

    arrays: Sequence[Any]
    dtype: Dtypes
    options: Mapping[str, Any]
    place: Place | None = None

    def on_gpu(self) -> bool:
        return self.place is not None and self.place[0] != "cpu"


def explain(
    op: str,
    *arrays: Any,
    dtype: Dtypes = "float32",
    device: str | None = None,
    arch: str = "",
    require: Sequence[str] = (),
    **options: Any,
) -> Explanation:
    """Which kernel would serve a call and why, which others could, and why not the rest. Nothing is computed.

    arrays and options: those of the op, or a single Request. dtype: of arrays given as shapes, by argument where they
    differ; weights of linear have the name of a format. device: "cpu", "cuda" or "hip", where arrays given as shapes
    would lie, and arch its generation, by default that of the GPU in use, else "sm_90" or "gfx942". require: select.py.
    Raises ArgumentError for an op there is not and for arguments that the op would not take.
    """
    kernels = kernels_of(op)
    if len(arrays) == 1 and isinstance(arrays[0], Request):
        return explain_request(kernels, arrays[0], require=require)
    found = _asked(op, Given(arrays, dtype, options, _place(device, arch)))
    largest = max(found, key=lambda each: each.request.traffic.flops)
    told = explain_request(kernels, largest.request, require=require)
    if largest.call is not None and largest.request.device == "cpu":
        able = tuple(_divided(candidate, largest) for candidate in told.able)
        told = replace(told, chosen=told.chosen and _divided(told.chosen, largest), able=able)
    notes = [f"the largest of {len(found)} launches"] if len(found) > 1 else []
    notes += [largest.request.options["cascade"]] if "cascade" in largest.request.options else []
    if told.chosen is None:
        return told
    return replace(told, chosen=replace(told.chosen, notes=(*told.chosen.notes, *notes)))


class Asked(NamedTuple):
    """One launch: what is asked of the kernels, and the checked call where the op has one."""

    request: Request
    call: Any = None


def kernels_of(op: str) -> tuple[Kernel, ...]:
    """The kernels of an op."""
    if op not in _OPS:
        raise ArgumentError(f"op: expected one of {', '.join(sorted(_OPS))}, got {op!r}")
    found: tuple[Kernel, ...] = importlib.import_module(_OPS[op].module).kernels()
    return found


def requests_of(
    op: str, *arrays: Any, dtype: Dtypes = "float32", device: str | None = None, arch: str = "", **options: Any
) -> list[Request]:
    """What a call asks of the kernels, one request per launch: more than one where a mask makes it several."""
    return [each.request for each in _asked(op, Given(arrays, dtype, options, _place(device, arch)))]


def _place(device: str | None, arch: str) -> Place | None:
    if device not in (None, "cpu", "cuda", "hip"):
        raise ArgumentError(f"device: expected cpu, cuda or hip, got {device!r}")
    if arch and device in (None, "cpu"):
        raise ArgumentError(f"arch: expected none without a GPU as device, got {arch!r}", 'device="cuda" or "hip"')
    if device is not None and arch and not re.fullmatch(_GENERATIONS[device], arch):
        raise ArgumentError(f"arch: expected a generation of {device}, got {arch!r}", f'such as "{USUAL_ARCH[device]}"')
    if device is None:
        return None
    return device, "" if device == "cpu" else arch or arch_in_use(device)


def _asked(op: str, given: Given) -> list[Asked]:
    if op not in _OPS:
        raise ArgumentError(f"op: expected one of {', '.join(sorted(_OPS))}, got {op!r}")
    return [_at(given.place, each) for each in _OPS[op].asked(given)]


def _at(place: Place | None, asked: Asked) -> Asked:
    """The same of arrays that lie there."""
    if place is None or (asked.request.device, asked.request.arch) == place:
        return asked
    return asked._replace(request=replace(asked.request, device=place[0], arch=place[1]))


# Attention


def _of_attention(asked: Given) -> list[Asked]:
    from headrace.ops import attention_dense

    call = _call(attention_dense, _bound(attention_dense.attention, asked), asked.place)
    out_dtype, known = asked.options.get("out_dtype"), isinstance(asked.options.get("mask"), np.ndarray)
    if "mask" not in call.arrays or not known or asked.on_gpu():
        return [Asked(call.request(out_dtype), call)]
    query = call.arrays["query"]
    place = attention_dense.AttentionResult(query, query[..., 0])  # only sliced, never written
    return [Asked(part.request(out_dtype), part) for part, _ in attention_dense.parts(call, place)]


def _of_attention_backward(asked: Given) -> list[Asked]:
    from headrace.ops import attention_gradients

    given = _bound(attention_gradients.attention_backward, asked)
    named = {name: value for name, value in given.items() if name not in ("kernel", "require") and value is not None}
    call = attention_gradients.prepared(**named)
    call = replace(call, stands_for=asked.place)
    known = isinstance(asked.options.get("mask"), np.ndarray)
    return [Asked(attention_gradients.request_of(attention_gradients.simplified(call) if known else call))]


def _of_paged_attention(asked: Given) -> list[Asked]:
    from headrace.ops import attention_paged

    return _with_cascade(attention_paged, _bound(attention_paged.paged_attention, asked), asked.place)


def _of_mla_attention(asked: Given) -> list[Asked]:
    from headrace.ops import attention_latent

    return _with_cascade(attention_latent, _bound(attention_latent.mla_attention, asked), asked.place)


def _with_cascade(module: Any, given: Mapping[str, Any], place: Place | None) -> list[Asked]:
    """The request, and what equal beginnings of its page table are worth."""
    from headrace.ops.cascade import cascade_of

    call = _call(module, given, place)
    request: Request = call.request(given["out_dtype"])
    listed = given["indices"] is not None or given["page_indices"] is not None
    found = None if listed else cascade_of(call, given["cascade"])
    return [Asked(replace(request, options={**request.options, "cascade": str(found)}) if found else request, call)]


def _divided(candidate: Candidate, asked: Asked) -> Candidate:
    """The candidate with the division of work that it would make, where the arrays are known or can be stood in for."""
    if candidate.isa not in cpu.ISAS and candidate.arithmetic != "fp64":
        return candidate  # a kernel of a GPU, in the interpreter
    from headrace.kernels.cpu.attention import division

    call, level = asked.call, candidate.isa if candidate.isa in cpu.ISAS else cpu.isa()
    arrays, rows = call.arrays, call.arrays["query"].shape[:-1]
    if any(isinstance(array, Buffer) for array in arrays.values()):
        return candidate
    try:
        real = {name: _with_memory(array) for name, array in arrays.items()}
        real["out"] = np.empty((*rows, call.extent.value_dim), numpy_dtype(asked.request.dtypes["out"]))
    except MemoryError:
        return replace(candidate, notes=(*candidate.notes, "splits are not known: too large for this machine"))
    real["lse"] = np.empty(rows, np.float64 if candidate.arithmetic == "fp64" else np.float32)
    options = call.options.native()
    splits, _, num_bytes = division(candidate.workers, level, real, options, arithmetic=candidate.arithmetic)
    return replace(candidate, splits=splits, workspace_bytes=num_bytes)


def _with_memory(array: Any) -> Any:
    """The array, or in place of one that stands for a shape one that could be read: addresses, not yet memory."""
    stand_in = isinstance(array, np.ndarray) and 0 in array.strides and array.size > 1
    return np.empty(array.shape, array.dtype) if stand_in else array


# Arguments that say nothing of what is asked.
_ASIDE = {"out", "out_dtype", "kernel", "require", "cascade"}


def _call(module: Any, given: Mapping[str, Any], place: Place | None) -> Any:
    """The op's own checked call, of arrays that lie at that place."""
    call = module.prepared(**{name: v for name, v in given.items() if name not in _ASIDE and v is not None})
    return replace(call, stands_for=place)


# Others


def _of_linear(asked: Given) -> list[Asked]:
    from headrace.ops import linear

    given = _bound(linear.linear, asked)
    weight, precision = given["weight"], given["precision"]
    if precision not in linear.PRECISIONS:
        raise ArgumentError(f"precision: expected one of {', '.join(linear.PRECISIONS)}, got {precision!r}")
    tokens, own = given["x"].shape[0], dtype_name(given["x"])
    if isinstance(weight, DeviceWeight):
        return [Asked(placed(device_request(tokens, [weight], own, precision), given["x"]))]
    packed = getattr(weight, "format", None)
    name = packed or _format(weight, asked.dtype)
    request = linear.request(tokens, [(name, *weight.shape)], own, precision, "cpu" if packed else "")
    return [Asked(placed(request, given["x"]))]


def _format(weight: Any, dtype: Dtypes) -> str:
    from headrace.ops.formats import get_format

    named = dtype.get("weight", "F32") if isinstance(dtype, Mapping) else "F32"
    return get_format(named).name


def _of_norm(asked: Given) -> list[Asked]:
    from headrace.ops import norm

    given = _bound(norm.rms_norm, asked)
    own = dtype_name(given["x"])
    return [Asked(placed(norm.request(given["x"].shape, own, given["out_dtype"] or own), given["x"]))]


def _of_experts(asked: Given) -> list[Asked]:
    """The routing may be given as its shape, [tokens, top_k]."""
    from headrace.ops import moe

    given = _bound(moe.mixture_of_experts, asked)
    named = ("x", "gate", "up", "down", "residual", "out")
    arrays = {name: given[name] for name in named if given[name] is not None}
    dtypes = {"experts": "int32", "weights": "float32"} | {name: dtype_name(array) for name, array in arrays.items()}
    dtypes["out"] = given["out_dtype"] or dtypes.get("out", dtypes["x"])
    pairs = tuple(getattr(given["routing"], "experts", given["routing"]).shape)
    options = {name: given[name] for name in ("activation", "precision", "deterministic")}
    request = moe.request(_shapes(arrays) | {"experts": pairs, "weights": pairs}, dtypes, options)
    return [Asked(placed(request, given["x"]))]


def _of_sample(asked: Given) -> list[Asked]:
    from headrace.ops import sampling

    logits = asked.arrays[0]
    logits = _zeros(logits, _dtype_of("logits", asked.dtype)) if isinstance(logits, tuple) else logits
    return [Asked(placed(sampling.request(tuple(logits.shape), dtype_name(logits)), logits))]


def _of_logprobs(asked: Given) -> list[Asked]:
    from headrace.ops import logprobs

    given = _bound(logprobs.token_logprobs, asked)
    shape, dtype = given["logits"].shape, dtype_name(given["logits"])
    return [Asked(placed(logprobs.request(tuple(shape), given["num_top"], dtype), given["logits"]))]


def _of_append(asked: Given) -> list[Asked]:
    from headrace.ops import page_append

    given = _bound(page_append.append_pages, asked)
    found = {name: array for name, array in given.items() if hasattr(array, "shape")}
    dtypes = {name: dtype_name(array) for name, array in found.items()}
    return [Asked(placed(page_append.request(_shapes(found), dtypes), found["key"]))]


def _of_merge(asked: Given) -> list[Asked]:
    from headrace.ops import attention_merge

    given = _bound(attention_merge.merge_attention, asked)
    outs = [
        _zeros(part, _dtype_of("parts", asked.dtype)) if _is_shape("parts", part) else _out(part)
        for part in given["parts"]
    ]
    shapes, dtypes = list(_shapes(dict(enumerate(outs))).values()), [dtype_name(out) for out in outs]
    return [Asked(placed(attention_merge.request(shapes, dtypes, given["out_dtype"] or dtypes[0]), outs[0]))]


def _out(part: Any) -> Any:
    return part[0] if isinstance(part, tuple) else part.out


def _shapes(arrays: Mapping[Any, Any]) -> dict[Any, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


@dataclass(frozen=True)
class _Op:
    module: str
    asked: Callable[[Given], list[Asked]]


_OPS = {
    "append_pages": _Op("headrace.ops.page_append", _of_append),
    "attention": _Op("headrace.ops.attention_dense", _of_attention),
    "attention_backward": _Op("headrace.ops.attention_gradients", _of_attention_backward),
    "linear": _Op("headrace.ops.linear", _of_linear),
    "merge_attention": _Op("headrace.ops.attention_merge", _of_merge),
    "mixture_of_experts": _Op("headrace.ops.moe", _of_experts),
    "mla_attention": _Op("headrace.ops.attention_latent", _of_mla_attention),
    "paged_attention": _Op("headrace.ops.attention_paged", _of_paged_attention),
    "rms_norm": _Op("headrace.ops.norm", _of_norm),
    "sample": _Op("headrace.ops.sampling", _of_sample),
    "token_logprobs": _Op("headrace.ops.logprobs", _of_logprobs),
}


# Shapes in place of arrays


def _bound(function: Callable[..., Any], asked: Given) -> dict[str, Any]:
    """The arguments by name, defaults included, each shape as an array."""
    try:
        found = inspect.signature(function).bind(*asked.arrays, **asked.options)
    except TypeError as error:
        raise ArgumentError(f"{function.__name__}: {error}") from error
    found.apply_defaults()
    shapes = {name: value for name, value in found.arguments.items() if _is_shape(name, value)}
    given = dict(found.arguments)
    listed = any(given.get(name) is not None for name in ("indices", "page_indices"))  # then pages are cut anew
    for name, shape in shapes.items():
        if name not in (*_LENGTHS, *_STARTS, "page_table"):
            zeros = _zeros(shape, _dtype_of(name, asked.dtype))
            given[name] = zeros.copy() if listed else zeros
    return given | {name: _shared_out(name, shape, given) for name, shape in shapes.items() if given[name] is shape}


def _is_shape(name: str, value: Any) -> bool:
    return isinstance(value, tuple) and name != "window" and all(isinstance(n, int) for n in value)


def _dtype_of(name: str, dtype: Dtypes) -> str:
    if name in _OTHER_DTYPES and not (isinstance(dtype, Mapping) and name in dtype):
        return _OTHER_DTYPES[name]
    if name in ("lse", "d_lse") and not (isinstance(dtype, Mapping) and name in dtype):
        return "float64" if _dtype_of("query", dtype) == "float64" else "float32"
    found = dtype if isinstance(dtype, str) else dtype.get(name, "float32")
    return "float32" if name == "weight" else found


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of that shape and type without memory of its own."""
    return np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape)


def _shared_out(name: str, shape: tuple[int, ...], given: Mapping[str, Any]) -> np.ndarray:
    """Starts that cut the tokens evenly, lengths that leave nothing out, and pages for each."""
    pages, count = given.get("key_pages", given.get("latent_pages")), shape[0]
    if name in _STARTS:
        return np.linspace(0, given[_STARTS[name]].shape[0], count).astype(np.int32)
    if name == "page_table":
        return (np.arange(math.prod(shape)) % max(pages.shape[0], 1)).astype(np.int32).reshape(shape)
    if pages is not None:
        return np.full(count, _columns(given["page_table"]) * pages.shape[1], np.int32)
    keys = given["key"].shape[1] if len(given["key"].shape) == 4 else given["key"].shape[0] // max(count, 1)
    return np.full(count, keys, np.int32)


def _columns(table: Any) -> int:
    columns: int = (table if isinstance(table, tuple) else table.shape)[-1]
    return columns
