"""Attention over dense or ragged keys and values: self or cross, any number of query heads to a KV head.

    dense:  query [batch, queries, heads, head_dim], key [batch, keys, kv_heads, head_dim], value [.., value_dim]
    ragged: query [tokens, heads, head_dim], key [key_tokens, kv_heads, head_dim], value [.., value_dim]
            request r: tokens query_starts[r] .. query_starts[r + 1], keys key_starts[r] .. key_starts[r + 1]
        -> out [.., heads, value_dim], lse [.., heads]

    out = softmax_j(cap(scale * q k_j) - slope * |own - j| + mask_j) v_j          attention_formula.py has every detail

A dense bool mask on the CPU is recognised for what it is (masks.py): causal, window, prefix and documents are run as
that. Of arrays on a GPU nothing is looked at before the kernel runs, which then must be able to (no synchronisation).

Dao 2022-2024, "FlashAttention" 1-3 and "Flash-Decoding".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer, device_of, dtype_name, shape_of
from headrace.ops import attention_checks as checks
from headrace.ops.attention_formula import Mix, attend, decoded
from headrace.ops.attention_options import AttentionOptions, AttentionResult, Window, checked_options
from headrace.ops.attention_request import Call, Extent, kernels, launch, outputs, split_arguments
from headrace.ops.masks import Ranges, Segment, ranges_of, recognise, row_ranges
from headrace.ops.tracked import needs_torch

__all__ = ["attention", "kernels", "prepared", "reference"]


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
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
    key_scales: Any = None,
    value_scales: Any = None,
    out_dtype: str | None = None,
    out: Any = None,
    precision: str = "auto",
    deterministic: bool = False,
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> AttentionResult:
    """Each query's mixture of the values it sees, and the log of the sum of its weights; nothing is copied.

    query: float32, float16, bfloat16 or float64; key and value: those, or float8_e4m3fn, int8 or int4 (uint8, two codes
    a byte) with float32 scales [.., kv_heads]. The last dimension is contiguous, the others may be strided.
    starts: int32 [requests + 1], of keys those of the queries when not given; key_lens: int32 [requests] or [batch],
    keys of each that count, by default all. With them key_starts may be [requests]: any ranges, overlapping or not.
    mask: bool (True: seen) or a float added to the scores, [batch or 1, heads or 1, queries or 1, columns], ragged
    [heads or 1, tokens or 1, columns], leading dimensions of 1 left out if you like. Its last column is each request's
    last key. sinks: float32 [heads]; alibi_slopes: [heads] or [requests, heads].
    out: in out_dtype, by default the query's type; written in place when given.
    Other options: attention_options.py; kernel and require: select.py. Gradients of torch tensors: docs/torch.md.
    Raises ArgumentError for whatever does not fit, KernelError when no kernel, or not the one asked for, can run.
    """
    given = {
        "query": query,
        "key": key,
        "value": value,
        "causal": causal,
        "align": align,
        "window": window,
        "softcap": softcap,
        "scale": scale,
        "precision": precision,
        "deterministic": deterministic,
        "query_starts": query_starts,
        "key_starts": key_starts,
        "key_lens": key_lens,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "mask": mask,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    if needs_torch(query, key, value, sinks, mask, alibi_slopes, key_scales, value_scales):
        from headrace.ops import torch_attention

        return torch_attention.attention(given, out=out, out_dtype=out_dtype, kernel=kernel, require=require)
    return run(prepared(**given), out, out_dtype, kernel=kernel, require=require)


def run(
    call: Call, out: Any, out_dtype: str | None, *, kernel: str | None = None, require: Sequence[str] = ()
) -> AttentionResult:
    """The results of a prepared call."""
    result = outputs(call, out, out_dtype)
    for part, place in parts(call, result):
        launch(part, place, kernel=kernel, require=require)
    return result


def _head_dim(query: Any) -> int:
    shape = shape_of(query, "query")
    if len(shape) not in (3, 4) or shape[-1] < 1:
        words = "[batch, queries, heads, head_dim] or [tokens, heads, head_dim]"
        raise ArgumentError(f"query: expected {words}, got {list(shape)}")
    return shape[-1]


def prepared(query: Any, key: Any, value: Any, **given: Any) -> Call:
    """The checked call of `attention` with these arguments, those after value by name."""
    head_dim, dense = _head_dim(query), len(query.shape) == 4
    arrays, options = split_arguments({"query": query, "key": key, "value": value, **given}, head_dim)
    words = "batch, keys, kv_heads, head_dim" if dense else "tokens, kv_heads, head_dim"
    checks.check_rank("key", shape_of(key, "key"), words)
    checks.check_rank("value", shape_of(value, "value"), words.replace("head_dim", "value_dim"))
    checks.check_heads(arrays)
    checks.check_scales(arrays)
    return _dense(arrays, options) if dense else _ragged(arrays, options)


def _dense(given: Mapping[str, Any], options: AttentionOptions) -> Call:
    shapes = {name: shape_of(given[name], name) for name in ("query", "key", "value")}
    (batch, queries, heads, head_dim), keys = shapes["query"], shapes["key"][1]
    for name in ("query_starts", "key_starts"):
        if name in given:
            raise ArgumentError(
                f"{name}: expected None with a query {list(shapes['query'])}", "starts are for ragged arrays"
            )
    if shapes["key"][0] != batch:
        raise ArgumentError(f"key: expected a batch of {batch} as of query, got {list(shapes['key'])}")
    if "key_lens" in given:
        checks.check_int32("key_lens", given["key_lens"], (batch,))
    arrays = {**given, **checks.per_head_values(given, batch)}
    if "mask" in given:
        arrays["mask"] = checks.ranked_mask(given["mask"], (batch, heads, queries))
        if arrays["mask"].shape[-1] > keys:
            raise ArgumentError(f"mask: expected up to {keys} columns, one per key, got {arrays['mask'].shape[-1]}")
    sizes = (heads, shapes["key"][2], head_dim, checks.logical_dim(shapes["value"], dtype_name(given["value"])))
    return Call("attention", arrays, Extent(batch, batch * queries, batch * keys, *sizes), options)


def _ragged(given: Mapping[str, Any], options: AttentionOptions) -> Call:
    if "query_starts" not in given:
        raise ArgumentError("query_starts: ragged arrays need them, got None", "dense arrays have a batch: query[None]")
    (tokens, heads, head_dim), (key_tokens, kv_heads, _) = (shape_of(given[name], name) for name in ("query", "key"))
    starts = given["query_starts"]
    checks.check_int32("query_starts", starts, ("requests + 1",))
    requests = starts.shape[0] - 1
    if requests < 0:
        raise ArgumentError("query_starts: expected at least [0], got []")
    arrays = {**given, **checks.per_head_values(given, requests)}
    arrays["key_starts"], arrays["key_lens"] = _key_ranges(given, requests, key_tokens)
    if "mask" in given:
        arrays["mask"] = checks.ranked_mask(given["mask"], (heads, tokens))
    value_dim = checks.logical_dim(shape_of(given["value"], "value"), dtype_name(given["value"]))
    return Call(
        "attention", arrays, Extent(requests, tokens, key_tokens, heads, kv_heads, head_dim, value_dim), options
    )


def _key_ranges(given: Mapping[str, Any], requests: int, key_tokens: int) -> tuple[Any, Any]:
    """Where each request's keys begin and how many they are, int32 [requests]."""
    name = "key_starts" if "key_starts" in given else "query_starts"
    starts, lens = given[name], given.get("key_lens")
    checks.check_type(name, starts, ("int32",))
    if lens is not None:
        checks.check_int32("key_lens", lens, (requests,))
        if name == "key_starts" and shape_of(starts, name) == (requests,):
            return starts, lens
    checks.check_shape(name, starts, (requests + 1,))
    if isinstance(starts, Buffer):
        raise ArgumentError(
            f"{name}: expected key_starts [requests] with key_lens in a program, got {list(starts.shape)}"
        )
    if device_of(starts) == "cpu":  # what a GPU holds is not waited for: its kernels read nothing outside the arrays
        _check_cumulative(name, starts, key_tokens)
    return starts[:-1], starts[1:] - starts[:-1] if lens is None else lens


def _check_cumulative(name: str, starts: Any, key_tokens: int) -> None:
    host = np.asarray(starts).astype(np.int64)
    if host[0] < 0 or host[-1] > key_tokens or (np.diff(host) < 0).any():
        raise ArgumentError(
            f"{name}: expected numbers from 0 to {key_tokens} that never fall, got {host.tolist()[:16]}"
        )


# Masks that are something else


def parts(call: Call, result: AttentionResult) -> list[tuple[Call, AttentionResult]]:
    """The calls to run in place of this one, and where each writes: with a mask that is recognised, what it is."""
    mask = call.arrays.get("mask")
    if mask is None or not recognisable(call):
        return [(call, result)]
    masks = np.asarray(mask)[:, 0]
    together = row_ranges(masks[:, 0]) if len(masks) > 1 and masks.shape[1] == 1 else None
    if together is not None:  # decoding: one look instead of one a sequence
        text = f"one range of keys for each of {len(masks)} sequences"
        return [(within(replace(call, mask_text=text), [together]), result)]
    found = [recognise(each) for each in masks]
    texts = " / ".join(dict.fromkeys(each.text for each in found))
    plain = replace(call, arrays={k: v for k, v in call.arrays.items() if k != "mask"}, mask_text=texts)
    if all(each.options == found[0].options and each.kind in AS_OPTIONS for each in found):
        return [(replace(plain, options=replace(call.options, **found[0].options)), result)]
    if all(each.segments for each in found):
        return [_as_ragged(plain, result, b, found[b % len(found)].segments) for b in range(call.extent.requests)]
    ranges = [each for each in map(ranges_of, found) if each is not None]
    if len(ranges) == len(found):
        return [(within(plain, ranges), result)]
    if all("columns" in each.options for each in found):
        columns = max(each.options["columns"] for each in found)
        return [(replace(plain, arrays={**call.arrays, "mask": mask[..., -columns:]}), result)]
    return [(replace(call, mask_text=texts), result)]


AS_OPTIONS = ("all", "causal", "causal_top_left", "window")


def recognisable(call: Call) -> bool:
    """Whether all a query sees is in one bool matrix, and its place among the keys does not matter otherwise."""
    arrays, options = call.arrays, call.options
    if any(isinstance(arrays[name], Buffer) for name in ("mask", "query", "key")) or len(arrays["query"].shape) == 3:
        return False
    if call.place[0] != "cpu":  # to look at it would be to wait for the GPU
        return False
    whole = (1, arrays["query"].shape[1], arrays["key"].shape[1])
    if 0 in (*whole, arrays["query"].shape[0]):
        return False
    free = options.left is None and options.right is None and not {"alibi_slopes", "key_lens"} & set(arrays)
    return free and dtype_name(arrays["mask"]) == "bool" and tuple(arrays["mask"].shape[1:]) == whole


def _as_ragged(
    call: Call, result: AttentionResult, b: int, segments: Sequence[Segment]
) -> tuple[Call, AttentionResult]:
    """One of a batch as ragged requests, a document each."""
    names = ("query", "key", "value", "key_scales", "value_scales")
    arrays = {name: array[b] if name in names else array for name, array in call.arrays.items()}
    arrays["query_starts"] = np.array([0, *(segment.row_end for segment in segments)], np.int32)
    arrays["key_starts"] = np.array([segment.key_begin for segment in segments], np.int32)
    arrays["key_lens"] = np.array([segment.key_end - segment.key_begin for segment in segments], np.int32)
    seen, queries = int(arrays["key_lens"].sum()), call.extent.queries // call.extent.requests
    extent = replace(call.extent, requests=len(segments), queries=queries, keys=seen)
    options = replace(call.options, causal=any(segment.causal for segment in segments), align="bottom_right")
    place = AttentionResult(result.out[b], result.lse[b])
    return replace(call, arrays=arrays, extent=extent, options=options), place


def within(call: Call, ranges: Sequence[Ranges]) -> Call:
    """The call with each row's first and last key in place of a mask; ranges of one sequence hold for all."""
    first, last = (np.concatenate([getattr(each, end) for each in ranges]) for end in ("first", "last"))
    times = call.extent.queries // len(first)
    ends = {"first_keys": np.tile(first, times).astype(np.int32), "last_keys": np.tile(last, times).astype(np.int32)}
    return replace(call, arrays={name: array for name, array in call.arrays.items() if name != "mask"} | ends)


# What is exact


def reference(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    query_starts: np.ndarray | None = None,
    key_starts: np.ndarray | None = None,
    key_lens: np.ndarray | None = None,
    key_scales: np.ndarray | None = None,
    value_scales: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    mix: Mix | None = None,
    **options: Any,
) -> AttentionResult:
    """The formula in float64, request by request; `options` are those of attention_options.py."""
    checked = checked_options(query.shape[-1], **options)
    keys, values = decoded(key, key_scales), decoded(value, value_scales)
    places = places_of(query, keys, query_starts=query_starts, key_starts=key_starts, key_lens=key_lens, mask=mask)
    out, lse = np.zeros((*query.shape[:-1], values.shape[-1])), np.zeros(query.shape[:-1])
    for r, (own, theirs, seen) in enumerate(places):
        out[own], lse[own] = attend(
            query[own],
            keys[theirs],
            values[theirs],
            options=checked,
            mask=seen,
            sinks=sinks,
            alibi_slopes=slopes_of(alibi_slopes, r),
            mix=mix,
        )
    return AttentionResult(out, lse)


Place = tuple[Any, Any, np.ndarray | None]  # of a request: where its queries and its keys are, and its mask


def places_of(
    query: np.ndarray,
    keys: np.ndarray,
    *,
    query_starts: np.ndarray | None = None,
    key_starts: np.ndarray | None = None,
    key_lens: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> list[Place]:
    """The place of each request of a call."""
    if query_starts is None:
        return _dense_places(len(query), keys.shape[1], key_lens, mask)
    return _ragged_places(query_starts, query_starts if key_starts is None else key_starts, key_lens, mask)


def _dense_places(batch: int, num_keys: int, key_lens: np.ndarray | None, mask: np.ndarray | None) -> list[Place]:
    lens = [num_keys] * batch if key_lens is None else key_lens
    ranked = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    masks = [None] * batch if ranked is None else [ranked[b % len(ranked)] for b in range(batch)]
    return [(b, (b, slice(length)), seen) for b, (length, seen) in enumerate(zip(lens, masks, strict=True))]


def _ragged_places(
    query_starts: np.ndarray, key_starts: np.ndarray, key_lens: np.ndarray | None, mask: np.ndarray | None
) -> list[Place]:
    lens = np.diff(key_starts) if key_lens is None else key_lens
    keys = [slice(start, start + count) for start, count in zip(key_starts, lens, strict=False)]
    rows = [slice(*ends) for ends in itertools.pairwise(query_starts)]
    seen = [None if mask is None else rows_of(mask, own) for own in rows]
    return list(zip(rows, keys, seen, strict=True))


def rows_of(mask: np.ndarray, own: slice) -> np.ndarray:
    """A request's part of a mask [heads or 1, tokens or 1, columns]."""
    return mask if mask.shape[-2] == 1 else mask[..., own, :]


def slopes_of(alibi_slopes: np.ndarray | None, request: int) -> np.ndarray | None:
    """The slopes of one request, [heads]."""
    return alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[request]
