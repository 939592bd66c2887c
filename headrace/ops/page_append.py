"""A step's keys and values into the pages of the KV cache: rotated, normalized, converted or quantized on the way.

    key [tokens, kv_heads, head_dim], value [tokens, kv_heads, value_head_dim], slots [tokens]
        -> key_pages, value_pages [pages, page_size, kv_heads, ...]
           key_scales, value_scales [pages, page_size, kv_heads]

Slot s is page s // page_size, place s % page_size. With a rope table, pair (a, b) of each key and query head becomes
(a cos - b sin, b cos + a sin); pairs are (2i, 2i + 1) when interleaved, else (i, i + rotary_dim / 2), and elements
from rotary_dim on stay. With norms, each head is rms-normalized before. What pages hold: `kv_formats.py`.

With spread, queries and keys are then multiplied by the Hadamard matrix of head_dim over its root (of the largest power
of two that divides it, block by block). It is orthogonal, so scores stay; but what was in a few large channels of every
key, as rotary models have them, is now in all of them, and a scale per token and head wastes fewer codes.

Scales of one per token and head are computed and written; scales of one per page and head, [pages, 1, kv_heads], are
the caller's and read. (In pages of one token the two have the same shape: there they are computed.)

`append_latent_pages` does the same for the latent cache of DeepSeek's attention: a token's latent and its rotated key
lie side by side in one page.

Su et al. 2021, "RoFormer"; DeepSeek-AI 2024, "DeepSeek-V2"; Ashkboos et al. 2024, "QuaRot".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import as_torch, check_same_device, check_writable, dtype_name, numpy_dtype, shape_of
from headrace.ops import norm
from headrace.ops.append_checks import check_append
from headrace.ops.kv_formats import FORMAT_OF_DTYPE, quantize
from headrace.ops.late import late
from headrace.ops.per_isa import per_isa
from headrace.ops.rope import rotate_reference
from headrace.ops.select import Kernel, Request, Traffic, choose, placed
from headrace.ops.tracked import mark_changed, needs_torch

DTYPES = ("float32", "float16", "bfloat16")


def append_pages(
    key: Any,
    value: Any,
    key_pages: Any,
    value_pages: Any,
    *,
    slots: Any,
    query: Any = None,
    table: Any = None,
    interleaved: bool = True,
    query_norm: Any = None,
    key_norm: Any = None,
    eps: float = 1e-6,
    spread: bool = False,
    key_scales: Any = None,
    value_scales: Any = None,
    out: Any = None,
    kernel: str | None = None,
) -> Any:
    """The queries, normalized and rotated as the keys are, or None without; keys and values are written to the pages.

    key, value, query [tokens, heads, head_dim]: float32, float16 or bfloat16; value and value_pages may both be None.
    Pages: float32, float16, bfloat16, float8_e4m3fn (scales may be given), int8 or int4 (uint8, two codes a byte;
    scales must be). Pages and scales may have any strides, the last dimension of pages packed. slots: int32 [tokens],
    no two the same: of two, either may remain. table: from rope_table; norms: float32 [head_dim]. out: where queries
    go, `query` itself when None. Raises ArgumentError for shapes and types that do not fit; when it runs, for a slot
    outside the pages, which is never written to, for a caller's scale that is not finite and above 0, and for NaN
    where it belongs to one and the type has no code for it.
    """
    if (value is None) != (value_pages is None):
        raise ArgumentError("value, value_pages: expected both or neither", "keys alone: None for both")
    arrays = {"key": key, "value": value, "key_pages": key_pages, "value_pages": value_pages, "slots": slots}
    arrays |= {"key_scales": key_scales, "value_scales": value_scales, "table": table, "key_norm": key_norm}
    arrays |= {"query": query, "query_norm": query_norm, "out": out}
    return _append(arrays, interleaved=interleaved, eps=eps, spread=spread, kernel=kernel)


def append_latent_pages(
    latent: Any,
    rope_key: Any,
    latent_pages: Any,
    *,
    slots: Any,
    table: Any = None,
    query_rope: Any = None,
    interleaved: bool = True,
    scales: Any = None,
    out: Any = None,
    kernel: str | None = None,
) -> Any:
    """The rotated part of the queries, or None without; latents and rotated keys are written to the pages.

    latent: [tokens, latent_dim], normalized before; rope_key: [tokens, rope_dim]; latent_pages: [pages, page_size,
    latent_dim + rope_dim]; query_rope: [tokens, heads, rope_dim]; scales: [pages, page_size, 1] or [pages, 1, 1], of a
    token's latent and key together. Types, slots and errors are those of `append_pages`.
    """
    arrays = {"key": rope_key, "latent": latent, "key_pages": latent_pages, "slots": slots, "table": table}
    for name, array in (("rope_key", rope_key), ("latent", latent), ("latent_pages", latent_pages)):
        shape_of(array, name)
    arrays |= {"key_scales": scales, "query": query_rope, "out": out}
    return _append(arrays, interleaved=interleaved, eps=0.0, spread=False, kernel=kernel)


def _append(given: Mapping[str, Any], **options: Any) -> Any:
    if given["query"] is None and not (given["out"] is None and given.get("query_norm") is None):
        raise ArgumentError("out, query_norm: expected none without query", "pass query")
    if needs_torch(given["key"], *given.values()):
        from headrace.ops import torch_append

        return torch_append.append(given, **options)
    rotated = run(given, **options)
    mark_changed(rotated, *(given.get(name) for name in ("key_pages", "value_pages", "key_scales", "value_scales")))
    return rotated


def run(given: Mapping[str, Any], *, interleaved: bool, eps: float, spread: bool, kernel: str | None = None) -> Any:
    """The rotated queries, by the words of the native side: `key` is what is rotated, `latent` what lies before it."""
    arrays = {name: array for name, array in given.items() if array is not None}
    if "query" in arrays:
        arrays.setdefault("out", arrays["query"])
    for name in ("key", "key_pages", "slots"):
        shape_of(given[name], name)
    shapes = {name: shape_of(array, name) for name, array in arrays.items()}
    for name in ("key_pages", "value_pages", "key_scales", "value_scales", "out"):
        if name in arrays and not (name.endswith("scales") and shapes[name][1:2] == (1,)):
            check_writable(arrays[name], name)
    if not (math.isfinite(eps) and eps >= 0):
        raise ArgumentError(f"eps: expected a finite number >= 0, got {eps}")
    check_same_device(arrays)
    asked = placed(request(shapes, {name: dtype_name(array) for name, array in arrays.items()}), arrays["key"])
    chosen = choose(kernels(), asked, kernel)
    rotated = arrays.get("out")
    if "cpu" not in chosen.devices:
        check_append(arrays)
        arrays = {name: as_torch(array, name) for name, array in arrays.items()}
    chosen.run(arrays, bool(interleaved), float(eps), bool(spread))
    return rotated


def request(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> Request:
    """The request of a call: everything is read once, and written once as what keeps it."""
    rows = {name: shape for name, shape in shapes.items() if name in ("key", "latent", "value", "query")}
    elements = {name: math.prod(shape) for name, shape in rows.items()}
    read = sum(count * _width(dtypes[name]) for name, count in elements.items())
    written = sum(count * _bits(dtypes, name) / 8 for name, count in elements.items())
    written += sum(4 * math.prod(shape[:-1]) for name, shape in rows.items() if f"{name}_scales" in shapes)
    rotated = elements.get("key", 0) + elements.get("query", 0)
    scaled = sum(count for name, count in elements.items() if f"{name}_scales" in shapes)
    return Request("append_pages", shapes, dtypes, Traffic(round(read + written), 3 * rotated + 2 * scaled))


def _width(dtype: str) -> int:
    return numpy_dtype(dtype).itemsize if dtype in DTYPES else 4


def _bits(dtypes: Mapping[str, str], name: str) -> int:
    kept = dtypes.get({"query": "out", "value": "value_pages"}.get(name, "key_pages"), "")
    return FORMAT_OF_DTYPE[kept].bits if kept in FORMAT_OF_DTYPE else 32


def reference(
    rows: np.ndarray, pages: np.ndarray, slots: np.ndarray, scales: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """What pages and scales hold after rows [tokens, kv_heads, dim] were written to them; copies."""
    pages, scales = pages.copy(), None if scales is None else scales.copy()
    page, place = np.divmod(slots, pages.shape[1])
    name = FORMAT_OF_DTYPE[str(pages.dtype)].name
    per_page = scales is not None and scales.shape[1] != pages.shape[1]
    given = scales[page, 0] if scales is not None and per_page else None
    codes, computed = quantize(rows, name, scales=given, scaled=scales is not None)
    pages[page, place] = codes
    if scales is not None and computed is not None and not per_page:
        scales[page, place] = computed
    return pages, scales


def head_reference(
    x: np.ndarray, table: Any, interleaved: bool, weight: Any = None, eps: float = 1e-6, *, spread: bool = False
) -> np.ndarray:
    """Heads normalized when there is a weight, rotated when there is a table, then spread, in float64."""
    x = x.astype(np.float64) if weight is None else norm.reference(x, weight, eps)
    x = x if table is None else rotate_reference(x, table, interleaved)
    return spread_reference(x) if spread else x


def spread_reference(x: np.ndarray) -> np.ndarray:
    """x [..., dim] times the Hadamard matrix over the root of its size, block by block; its own inverse."""
    dim = x.shape[-1]
    size = dim & -dim
    hadamard = np.ones((1, 1), x.dtype)
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return (x.reshape(*x.shape[:-1], dim // size, size) @ (hadamard / x.dtype.type(size**0.5))).reshape(x.shape)


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first run."""
    from headrace.ops import gpu_paged

    return (*gpu_paged.append_kernels(), *per_isa(late("headrace.kernels.cpu.append_pages")))
