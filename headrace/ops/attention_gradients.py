"""Gradients of attention, dense and ragged: of queries, keys, values and sinks, from those of its out and lse.

    d_out, out [.., heads, value_dim] and lse, d_lse [.., heads] beside query, key, value of attention_dense.py
        -> query, key, value of the shapes and types of theirs, sinks [heads]

    total[i]     = log(exp(lse[i]) + exp(sink))           weight[i, j] = exp(score[i, j] - total[i])
    delta[i]     = d_out[i] . out[i] - d_lse[i] exp(total[i] - lse[i])
    slope[i, j]  = weight[i, j] (d_out[i] . v[j] - delta[i]) (1 - tanh(scale q[i] . k[j] / softcap)^2) scale
    d_query[i]   = sum_j slope[i, j] k[j]               d_key[j] = sum_i slope[i, j] q[i]
    d_value[j]   = sum_i weight[i, j] d_out[i]          d_sink   = - sum_i exp(sink - total[i]) d_out[i] . out[i]

d_key and d_value are of all query heads that read the KV head together. Weights are computed again from lse: what is
kept between forward and backward, and the memory that this takes, grow with the tokens alone.

Dao et al. 2022, "FlashAttention", appendix B; docs/kernels/attention_backward.md derives it with sinks and lse.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, dtype_name, empty_like, is_torch, shape_of
from headrace.ops import attention_checks as checks
from headrace.ops import attention_dense
from headrace.ops.attention_formula import capped, log_sum_exp, per_head, position_bias
from headrace.ops.attention_options import AttentionOptions, Window, checked_options
from headrace.ops.attention_request import WIDTHS, Call, kernels_over, run_kernel, seen_of, unit_of
from headrace.ops.late import late
from headrace.ops.masks import ranges_of, recognise
from headrace.ops.select import Kernel, Request, Traffic, choose

__all__ = ["AttentionGradients", "attention_backward", "kernels", "prepared", "reference"]


@dataclass(frozen=True)
class AttentionGradients:
    """Each of its array's shape and type. sinks: float32 [heads], None without sinks."""

    query: Any
    key: Any
    value: Any
    sinks: Any = None


def attention_backward(
    d_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    *,
    lse: Any,
    d_lse: Any = None,
    causal: bool = False,
    align: str = "bottom_right",
    window: Window = (None, None),
    softcap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    mask: Any = None,
    scale: float | None = None,
    query_starts: Any = None,
    key_starts: Any = None,
    key_lens: Any = None,
    precision: str = "auto",
    deterministic: bool = False,
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> AttentionGradients:
    """The gradients of query, key, value and sinks, from those of out (and of lse, when given).

    out, lse: what `attention` returned for these arguments, which are its own; keys and values are floats. d_out: of
    out's shape, in any of its types. Rows that see no key and keys that no row sees: 0. mask and alibi_slopes are given
    no gradient. deterministic: one call has one result, bit for bit, whatever else is in its batch; so it is on CPUs,
    on any number of threads, and of tensors where torch.use_deterministic_algorithms is on.
    Raises ArgumentError for whatever does not fit, KernelError when no kernel, or not the one asked for, can run.
    """
    call = prepared(
        d_out,
        query,
        key,
        value,
        out,
        lse=lse,
        d_lse=d_lse,
        causal=causal,
        align=align,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        mask=mask,
        scale=scale,
        query_starts=query_starts,
        key_starts=key_starts,
        key_lens=key_lens,
        precision=precision,
        deterministic=deterministic,
    )
    call, found = simplified(call), outputs(call)
    places = {"d_query": found.query, "d_key": found.key, "d_value": found.value, "d_sinks": found.sinks}
    chosen = choose(kernels(), request_of(call), kernel, require)
    run_kernel(chosen, {**call.arrays, "d_out": _packed(d_out), **places}, call.options)
    return found


# Checks


def prepared(
    d_out: Any, query: Any, key: Any, value: Any, out: Any, *, lse: Any, d_lse: Any = None, **given: Any
) -> Call:
    """The checked call of `attention_backward` with these arguments."""
    call = attention_dense.prepared(query, key, value, **given)
    _check_floats(call)
    rows, exact = shape_of(query, "query")[:-1], dtype_name(query) == "float64"
    for name, array in (("d_out", d_out), ("out", out)):
        checks.check_shape(name, array, (*rows, call.extent.value_dim))
        checks.check_type(name, array, ("float64",) if exact else checks.FLOATS[:3])
    arrays = {**call.arrays, "d_out": d_out, "out": out, "lse": lse}
    arrays |= {} if d_lse is None else {"d_lse": d_lse}
    for name in ("lse", "d_lse"):
        if name in arrays:
            checks.check_shape(name, arrays[name], rows)
            checks.check_type(name, arrays[name], ("float64",) if exact else ("float32",))
    check_same_device(arrays)
    options = replace(call.options, deterministic=call.options.deterministic or _one_order_asked(query))
    return replace(call, op="attention_backward", arrays=arrays, options=options)


def _one_order_asked(array: Any) -> bool:
    """Whether torch was told to give the same bits always, of its tensors."""
    if not is_torch(array):
        return False
    import torch

    return torch.are_deterministic_algorithms_enabled()


def _check_floats(call: Call) -> None:
    got = dtype_name(call.arrays["key"])
    if got not in checks.FLOATS:
        raise ArgumentError(
            f"key: expected {' or '.join(checks.FLOATS)}, got {got}", "quantized keys and values have no gradients"
        )


def _packed(d_out: Any) -> Any:
    """With its last dimension contiguous: that of a sum, say, is one number seen from everywhere."""
    if is_torch(d_out):
        return d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    if isinstance(d_out, np.ndarray) and d_out.strides[-1] != d_out.itemsize:
        return np.ascontiguousarray(d_out)
    return d_out


def simplified(call: Call) -> Call:
    """The same call with options or ranges of keys in place of a mask that says no more than these."""
    mask = call.arrays.get("mask")
    if mask is None or not attention_dense.recognisable(call):
        return call
    masks = np.asarray(mask)[:, 0]
    found = [recognise(each) for each in masks]
    named = replace(call, mask_text=" / ".join(dict.fromkeys(each.text for each in found)))
    plain = {name: array for name, array in call.arrays.items() if name != "mask"}
    if all(each.options == found[0].options and each.kind in attention_dense.AS_OPTIONS for each in found):
        return replace(named, arrays=plain, options=replace(call.options, **found[0].options))
    ranges = [each for each in map(ranges_of, found) if each is not None]
    return attention_dense.within(named, ranges) if len(ranges) == len(found) else named


def outputs(call: Call) -> AttentionGradients:
    """Arrays for the gradients, not yet written."""

    def like(name: str) -> Any:
        array = call.arrays[name]
        return empty_like(array, shape_of(array, name), dtype_name(array))

    sinks = like("sinks") if "sinks" in call.arrays else None
    return AttentionGradients(like("query"), like("key"), like("value"), sinks)


# What it takes


def request_of(call: Call) -> Request:
    """What the choice of a kernel goes by."""
    shapes = {name: shape_of(array, name) for name, array in call.arrays.items()}
    dtypes = {name: dtype_name(array) for name, array in call.arrays.items()}
    options = call.options
    names = ("causal", "align", "window", "softcap", "precision", "deterministic")
    said = {name: getattr(options, name) for name in names} | {"num_keys": call.extent.keys}
    said |= {"mask": call.mask_text} if call.mask_text else {}
    return Request(call.op, shapes, dtypes, traffic(call, shapes, dtypes), said, *call.place)


def traffic(call: Call, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> Traffic:
    """All arrays read once and all gradients written once; five products over the keys that each row sees."""
    read = ("query", "key", "value", "out", "d_out", "lse", "d_lse", "mask")
    moved = [name for name in read if name in shapes] + ["query", "key", "value"]
    num_bytes = sum(math.prod(shapes[name]) * WIDTHS[dtypes[name]] for name in moved)
    extent = call.extent
    seen, _ = seen_of(extent, call.options)
    flops = 2 * seen * extent.heads * (3 * extent.head_dim + 2 * extent.value_dim)
    return Traffic(num_bytes, flops, unit_of(dtypes, call.options, call.place[0]))


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first run."""
    from headrace.ops import gpu_attention

    return (*gpu_attention.backward_kernels(), *kernels_over(late("headrace.kernels.cpu.attention_backward")))


# What is exact


def reference(
    d_out: np.ndarray,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    d_lse: np.ndarray | None = None,
    query_starts: np.ndarray | None = None,
    key_starts: np.ndarray | None = None,
    key_lens: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    differentiate: Any = None,
    **options: Any,
) -> AttentionGradients:
    """The gradients in float64, request by request, by `differentiate` (the exact `mixture_gradients`).

    What the forward returned is computed again: these are the gradients of the formula.
    """
    checked = checked_options(query.shape[-1], **options)
    found = AttentionGradients(*(np.zeros(array.shape) for array in (query, key, value)))
    d_sinks = None if sinks is None else np.zeros(sinks.shape)
    places = attention_dense.places_of(
        query, key, query_starts=query_starts, key_starts=key_starts, key_lens=key_lens, mask=mask
    )
    for r, (own, theirs, seen) in enumerate(places):
        parts = query[own], key[theirs], value[theirs]
        slopes = attention_dense.slopes_of(alibi_slopes, r)
        one = (differentiate or mixture_gradients)(
            *parts,
            d_out[own],
            bias=position_bias(len(parts[0]), len(parts[1]), checked, mask=seen, alibi_slopes=slopes),
            options=checked,
            sinks=sinks,
            d_lse=None if d_lse is None else d_lse[own],
            own=own,
        )
        found.query[own] += one.query
        found.key[theirs] += one.key
        found.value[theirs] += one.value
        d_sinks = None if d_sinks is None else d_sinks + one.sinks
    return replace(found, sinks=d_sinks)


def mixture_gradients(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    d_out: np.ndarray,
    *,
    bias: np.ndarray,
    options: AttentionOptions,
    sinks: np.ndarray | None = None,
    d_lse: np.ndarray | None = None,
    own: Any = None,
) -> AttentionGradients:
    """The formula for one request, given the bias [heads or 1, queries, keys]. own: where its rows are, unused here."""
    group = query.shape[1] // keys.shape[1]
    query, d_out = query.astype(np.float64), d_out.astype(np.float64)
    keys, values = (per_head(array, group).astype(np.float64) for array in (keys, values))
    products = capped(options.scale * np.einsum("qhd,khd->hqk", query, keys, optimize=True), options.softcap)
    growth = 1.0 if options.softcap is None else 1 - (products / options.softcap) ** 2
    scores = np.where(np.isneginf(bias), -np.inf, products + bias)
    lse = log_sum_exp(scores)
    total = lse if sinks is None else np.logaddexp(lse, sinks.astype(np.float64)[:, None])
    total = np.where(np.isneginf(lse), 0, total)  # where nothing is seen, weights are 0 whatever it is
    weights = np.exp(scores - total[..., None])
    flows = np.einsum("qhd,khd->hqk", d_out, values, optimize=True)
    shared = (weights * flows).sum(axis=-1)
    delta = shared if d_lse is None else shared - d_lse.T * np.exp(np.where(np.isneginf(lse), 0, total - lse))
    slopes = weights * (flows - delta[..., None]) * growth * options.scale
    d_sinks = None if sinks is None else -(np.exp(sinks[:, None] - total) * shared).sum(axis=1)
    return AttentionGradients(
        np.einsum("hqk,khd->qhd", slopes, keys, optimize=True),
        of_groups(np.einsum("hqk,qhd->khd", slopes, query, optimize=True), group),
        of_groups(np.einsum("hqk,qhd->khd", weights, d_out, optimize=True), group),
        d_sinks,
    )


def of_groups(gradients: np.ndarray, group: int) -> np.ndarray:
    """[keys, heads, dim] summed over the query heads of each KV head."""
    keys, heads, dim = gradients.shape
    return gradients.reshape(keys, heads // group, group, dim).sum(axis=2)
