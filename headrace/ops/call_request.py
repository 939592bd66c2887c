"""What a call would ask of the kernels, from its arrays, or from shapes alone: `explain` without a launch.

    explain("attention", (1, 1, 32, 128), (1, 32768, 8, 128), (1, 32768, 8, 128), dtype="bfloat16", causal=True)
    explain("paged_attention", query, key_pages, value_pages, page_table, sequence_lens, query_starts=starts)
    explain("linear", (1, 4096), (4096, 4096), dtype={"weight": "Q4_0"})

The arguments are those of the op, checked as the op checks them, any array given as a tuple: its shape. A shape stands
for an array of zeros that takes no memory. Lengths and starts given as shapes share tokens and keys out evenly.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.ops.explanation import Explanation, explain_request
from headrace.ops.select import Kernel, Request

Dtypes = str | Mapping[str, str]

# Arrays that are not of the call's own type.
_OTHER_DTYPES = {
    "page_table": "int32",
    "sequence_lens": "int32",
    "query_starts": "int32",
    "key_starts": "int32",
    "key_lens": "int32",
    "key_scales": "float32",
    "value_scales": "float32",
    "latent_scales": "float32",
    "sinks": "float32",
    "alibi_slopes": "float32",
    "mask": "bool",
}
_LENGTHS = ("sequence_lens", "key_lens")
_STARTS = {"query_starts": "query", "key_starts": "key"}


def explain(
    op: str, *arrays: Any, dtype: Dtypes = "float32", require: Sequence[str] = (), **options: Any
) -> Explanation:
    """Which kernel would serve a call and why, which others could, and why not the rest. Nothing is computed.

    arrays and options: those of the op, or a single Request. dtype: of arrays given as shapes, by argument where they
    differ; weights of linear have the name of a format. require: see select.py.
    Raises ArgumentError for an op there is not and for arguments that the op would not take.
    """
    kernels = kernels_of(op)
    if len(arrays) == 1 and isinstance(arrays[0], Request):
        return explain_request(kernels, arrays[0], require=require)
    requests = requests_of(op, *arrays, dtype=dtype, **options)
    request = max(requests, key=lambda each: each.traffic.flops)
    told = explain_request(kernels, request, require=require)
    if told.chosen is None or len(requests) == 1:
        return told
    note = f"the largest of {len(requests)} launches"
    return replace(told, chosen=replace(told.chosen, notes=(*told.chosen.notes, note)))


def kernels_of(op: str) -> tuple[Kernel, ...]:
    """The kernels of an op."""
    if op not in _OPS:
        raise ArgumentError(f"op: expected one of {', '.join(sorted(_OPS))}, got {op!r}")
    found: tuple[Kernel, ...] = importlib.import_module(_OPS[op].module).kernels()
    return found


def requests_of(op: str, *arrays: Any, dtype: Dtypes = "float32", **options: Any) -> list[Request]:
    """What a call asks of the kernels, one request per launch: more than one where a mask makes it several."""
    if op not in _OPS:
        raise ArgumentError(f"op: expected one of {', '.join(sorted(_OPS))}, got {op!r}")
    return _OPS[op].requests(arrays, dtype, options)


# Attention


def _attention_requests(arrays: Sequence[Any], dtype: Dtypes, options: dict[str, Any]) -> list[Request]:
    from headrace.ops import attention

    call = _call(attention, _bound(attention.attention, arrays, dtype, options))
    request_dtype = options.get("out_dtype")
    if "mask" not in call.arrays or not isinstance(options.get("mask"), np.ndarray):
        return [call.request(request_dtype)]
    place = attention.AttentionResult(call.arrays["query"], call.arrays["query"][..., 0])  # only sliced, never written
    return [part.request(request_dtype) for part, _ in attention.parts(call, place)]


def _paged_requests(arrays: Sequence[Any], dtype: Dtypes, options: dict[str, Any]) -> list[Request]:
    from headrace.ops import paged_attention

    given = _bound(paged_attention.paged_attention, arrays, dtype, options)
    return [_call(paged_attention, given).request(options.get("out_dtype"))]


def _mla_requests(arrays: Sequence[Any], dtype: Dtypes, options: dict[str, Any]) -> list[Request]:
    from headrace.ops import mla_attention as mla
    from headrace.ops import paged_attention

    given = _bound(mla.mla_attention, arrays, dtype, options)
    query = mla.joined(given.pop("query"), given.pop("query_rope"))
    pages, scales, value_dim = (given.pop(name) for name in ("latent_pages", "latent_scales", "value_dim"))
    cached = mla.as_keys_and_values(pages, scales, value_dim)
    given |= {"query": query, "key_pages": cached.pop("key"), "value_pages": cached.pop("value"), **cached}
    return [replace(_call(paged_attention, given), op="mla_attention").request(options.get("out_dtype"))]


# Arguments that say nothing of what is asked.
_ASIDE = {"out", "out_dtype", "kernel", "require", "cascade"}


def _call(module: Any, given: Mapping[str, Any]) -> Any:
    """The op's own checked call."""
    return module.prepared(**{name: v for name, v in given.items() if name not in _ASIDE and v is not None})


# Others


def _linear_requests(arrays: Sequence[Any], dtype: Dtypes, options: dict[str, Any]) -> list[Request]:
    from headrace.ops import linear

    given = _bound(linear.linear, arrays, dtype, options)
    weight, precision = given["weight"], given["precision"]
    if precision not in linear.PRECISIONS:
        raise ArgumentError(f"precision: expected one of {', '.join(linear.PRECISIONS)}, got {precision!r}")
    name = weight.format if isinstance(weight, linear.PackedWeight) else _format(weight, dtype)
    request = linear.request(given["x"].shape[0], [(name, *weight.shape)], str(given["x"].dtype), precision)
    return [request]


def _format(weight: Any, dtype: Dtypes) -> str:
    from headrace.ops.formats import get_format

    named = dtype.get("weight", "F32") if isinstance(dtype, Mapping) else "F32"
    return get_format(named).name


def _norm_requests(arrays: Sequence[Any], dtype: Dtypes, options: dict[str, Any]) -> list[Request]:
    from headrace.ops import norm

    given = _bound(norm.rms_norm, arrays, dtype, options)
    own = str(given["x"].dtype)
    return [norm.request(given["x"].shape, own, given["out_dtype"] or own)]


@dataclass(frozen=True)
class _Op:
    module: str
    requests: Callable[[Sequence[Any], Dtypes, dict[str, Any]], list[Request]]


_OPS = {
    "attention": _Op("headrace.ops.attention", _attention_requests),
    "linear": _Op("headrace.ops.linear", _linear_requests),
    "mla_attention": _Op("headrace.ops.paged_attention", _mla_requests),
    "paged_attention": _Op("headrace.ops.paged_attention", _paged_requests),
    "rms_norm": _Op("headrace.ops.norm", _norm_requests),
}


# Shapes in place of arrays


def _bound(
    function: Callable[..., Any], arrays: Sequence[Any], dtype: Dtypes, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by name, defaults included, each shape as an array."""
    try:
        found = inspect.signature(function).bind(*arrays, **options)
    except TypeError as error:
        raise ArgumentError(f"{function.__name__}: {error}") from error
    found.apply_defaults()
    shapes = {name: value for name, value in found.arguments.items() if _is_shape(name, value)}
    given = dict(found.arguments)
    for name, shape in shapes.items():
        if name not in (*_LENGTHS, *_STARTS):
            given[name] = _zeros(shape, _dtype_of(name, dtype))
    return given | {name: _shared_out(name, shape[0], given) for name, shape in shapes.items() if given[name] is shape}


def _is_shape(name: str, value: Any) -> bool:
    return isinstance(value, tuple) and name != "window" and all(isinstance(n, int) for n in value)


def _dtype_of(name: str, dtype: Dtypes) -> str:
    if name in _OTHER_DTYPES and not (isinstance(dtype, Mapping) and name in dtype):
        return _OTHER_DTYPES[name]
    found = dtype if isinstance(dtype, str) else dtype.get(name, "float32")
    return "float32" if name == "weight" else found


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of that shape and type without memory of its own."""
    from headrace.kernels.cpu.arrays import numpy_dtype

    return np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape)


def _shared_out(name: str, count: int, given: Mapping[str, Any]) -> np.ndarray:
    """Starts that cut the tokens evenly, or lengths that leave nothing out."""
    if name in _STARTS:
        return np.linspace(0, given[_STARTS[name]].shape[0], count).astype(np.int32)
    pages = given.get("key_pages", given.get("latent_pages"))
    if pages is not None:
        return np.full(count, given["page_table"].shape[1] * pages.shape[1], np.int32)
    keys = given["key"].shape[1] if len(given["key"].shape) == 4 else given["key"].shape[0] // max(count, 1)
    return np.full(count, keys, np.int32)
