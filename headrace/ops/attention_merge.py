"""Partial attentions over parts of the keys, merged into the attention over all of them.

    parts: each out [..., heads, value_dim] and lse [..., heads]   ->   out, lse of the same shapes

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p) out_p / (exp(lse) + exp(sink))

The log-sum-exp says how much weight a part's out stands for, so any split of the keys can be computed apart and joined,
in any grouping: the merge is associative. A part that saw no key (lse -inf) counts nothing and its out is not read; a
row that no part saw is 0, -inf. Sinks take weight once, so they are left out of the parts and given here.

Dao 2023, "Flash-Decoding"; Ye et al. 2024, "Cascade Inference".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import (
    as_torch,
    check_same_device,
    check_writable,
    dtype_name,
    empty_like,
    numpy_dtype,
    shape_of,
)
from headrace.ops.append_checks import check_packed
from headrace.ops.attention_checks import check_shape, check_type
from headrace.ops.attention_options import AttentionResult
from headrace.ops.late import late
from headrace.ops.per_isa import per_isa
from headrace.ops.select import Kernel, Request, Traffic, choose, placed
from headrace.ops.tracked import needs_torch

Part = AttentionResult | tuple[Any, Any]
DTYPES = ("float32", "float16", "bfloat16", "float64")


def merge_attention(
    parts: Sequence[Part],
    *,
    sinks: Any = None,
    out: AttentionResult | None = None,
    out_dtype: str | None = None,
    kernel: str | None = None,
) -> AttentionResult:
    """The attention over the keys of all parts, each an AttentionResult or (out, lse); any number, one at least.

    Each part's out: float32, float16 or bfloat16, beside lse float32; or both float64 in all parts. sinks: float32
    [heads], which the parts must not contain. out: written in place when given, and may be one of the parts; else
    arrays of the first part's kind, in out_dtype, by default the widest of the parts'. Raises ArgumentError for parts
    that do not fit each other.
    """
    outs, lses = _split(parts)
    if needs_torch(*outs, *lses, sinks):
        from headrace.ops import torch_merge

        return torch_merge.merge_attention(outs, lses, sinks, out=out, out_dtype=out_dtype, kernel=kernel)
    return merge(outs, lses, sinks=sinks, out=out, out_dtype=out_dtype, kernel=kernel)


def merge(
    outs: Sequence[Any],
    lses: Sequence[Any],
    *,
    sinks: Any = None,
    out: AttentionResult | None = None,
    out_dtype: str | None = None,
    kernel: str | None = None,
) -> AttentionResult:
    """`merge_attention` of parts whose outs and lses are given apart."""
    _check_parts(outs, lses)
    dtypes = [dtype_name(part) for part in outs]
    if out is not None and not isinstance(out, AttentionResult):
        raise ArgumentError(f"out: expected an AttentionResult, got {type(out).__name__}")
    out_dtype = out_dtype or (max(dtypes, key=_width) if out is None else dtype_name(out.out))
    if out_dtype not in DTYPES:
        raise ArgumentError(f"out_dtype: expected one of {', '.join(DTYPES)}, got {out_dtype!r}")
    shape = shape_of(outs[0], "parts[0].out")
    if out is not None:
        check_writable(out.out, "out.out")
        check_writable(out.lse, "out.lse")
    else:
        lse_dtype = "float64" if out_dtype == "float64" else "float32"
        out = AttentionResult(empty_like(outs[0], shape, out_dtype), empty_like(outs[0], shape[:-1], lse_dtype))
    others = {"sinks": sinks, "out.out": out.out, "out.lse": out.lse}
    check_same_device({"parts[0].out": outs[0]} | {name: array for name, array in others.items() if array is not None})
    asked = placed(request([shape] * len(outs), dtypes, out_dtype), outs[0])
    chosen = choose(kernels(), asked, kernel)
    if "cpu" not in chosen.devices:
        _check_alike(outs, lses, out, sinks)
        outs, lses = ([as_torch(part, "parts") for part in parts] for parts in (outs, lses))
        whole, logarithm = as_torch(out.out, "out"), as_torch(out.lse, "lse")
        sinks = None if sinks is None else as_torch(sinks, "sinks")
        chosen.run(outs, lses, out=whole, lse=logarithm, sinks=sinks)
        return out
    chosen.run(outs, lses, out=out.out, lse=out.lse, sinks=sinks)
    return out


def reference(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], sinks: np.ndarray | None = None, dtype: Any = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64 (or `dtype`: the straightforward computation)."""
    lses = np.stack([lse.astype(dtype) for _, lse in parts])
    top = np.max(lses, axis=0)
    top = np.where(np.isneginf(top), dtype(0), top)
    weights = np.exp(lses - top)
    with np.errstate(divide="ignore"):
        lse = top + np.log(weights.sum(axis=0))
    total = weights.sum(axis=0) + (0 if sinks is None else np.exp(sinks.astype(dtype) - top))
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    out = np.zeros(parts[0][0].shape, dtype)
    for (part, _), share in zip(parts, shares, strict=True):
        out += np.where(share[..., None] > 0, share[..., None] * part.astype(dtype), dtype(0))
    return out, lse


def request(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], out_dtype: str) -> Request:
    """The request of a call: every part is read once and the whole written, two operations per element read."""
    elements = sum(math.prod(shape) for shape in shapes)
    num_bytes = sum(math.prod(s) * _width(d) + 4 * math.prod(s[:-1]) for s, d in zip(shapes, dtypes, strict=True))
    num_bytes += math.prod(shapes[0]) * _width(out_dtype) + 4 * math.prod(shapes[0][:-1])
    named = {f"parts[{i}]": shape for i, shape in enumerate(shapes)}
    types = dict(zip(named, dtypes, strict=True)) | {"out": out_dtype}
    unit = "fp64" if out_dtype == "float64" else "fp32"
    return Request("merge_attention", named, types, Traffic(num_bytes, 2 * elements, unit))


def _width(dtype: str) -> int:
    return numpy_dtype(dtype).itemsize if dtype in DTYPES else 4


def _split(parts: Sequence[Part]) -> tuple[list[Any], list[Any]]:
    outs, lses = [], []
    for i, part in enumerate(parts):
        try:
            out, lse = (part.out, part.lse) if isinstance(part, AttentionResult) else part
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"parts[{i}]: expected an AttentionResult or (out, lse), got {type(part).__name__}"
            ) from error
        outs.append(out)
        lses.append(lse)
    if not outs:
        raise ArgumentError("parts: expected one at least, got none")
    return outs, lses


def _check_parts(outs: Sequence[Any], lses: Sequence[Any]) -> None:
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        out_shape, lse_shape = shape_of(out, f"parts[{i}].out"), shape_of(lse, f"parts[{i}].lse")
        if len(out_shape) < 3 or out_shape[:-1] != lse_shape:
            text = f"{list(out_shape)} and {list(lse_shape)}"
            raise ArgumentError(f"parts[{i}]: expected out [..., heads, value_dim] and lse [..., heads], got {text}")
    words = (("out", outs), ("lse", lses))
    check_same_device({f"parts[{i}].{word}": part for word, parts in words for i, part in enumerate(parts)})


def _check_alike(outs: Sequence[Any], lses: Sequence[Any], out: AttentionResult, sinks: Any) -> None:
    """What kernels of GPUs do not check: that all parts are of one shape, and of types that are read."""
    shape = shape_of(outs[0], "parts[0].out")
    for i, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        check_shape(f"parts[{i}].out", part, shape)
        check_type(f"parts[{i}].out", part, DTYPES[:3])
        check_type(f"parts[{i}].lse", lse, ("float32",))
        check_packed(f"parts[{i}].out", part)
    check_shape("out.out", out.out, shape)
    check_shape("out.lse", out.lse, shape[:-1])
    check_type("out.lse", out.lse, ("float32",))
    check_packed("out.out", out.out)
    if sinks is not None:
        check_shape("sinks", sinks, (shape[-2],))
        check_type("sinks", sinks, ("float32",))


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first run."""
    from headrace.ops import gpu_paged

    return (*gpu_paged.merge_kernels(), *per_isa(late("headrace.kernels.cpu.merge_attention")))
