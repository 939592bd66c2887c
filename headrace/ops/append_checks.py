"""What the arrays of an append must be, for kernels of GPUs, which check nothing: ranks, sizes, types, by their names.

The native kernels check the same as they take their arrays (op_append.cpp). Contents are looked at by neither: a GPU's
kernel writes nothing for a slot outside the pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import ArgumentError
from headrace.kernels.arrays import dtype_name, shape_of
from headrace.ops.attention_checks import check_shape, check_type
from headrace.ops.kv_formats import FORMAT_OF_DTYPE, FORMATS

DTYPES = ("float32", "float16", "bfloat16")


def check_append(arrays: Mapping[str, Any]) -> None:
    """ArgumentError for arrays, by the words of the native side, that do not fit each other."""
    latent = "latent" in arrays
    rows, lead = shape_of(arrays["key"], "key"), (1,) if latent else ()
    name = "rope_key" if latent else "key"
    _check_rows(name, arrays["key"], 2 if latent else 3)
    tokens, heads, dim = rows[0], 1 if latent else rows[1], rows[-1]
    check_type("slots", arrays["slots"], ("int32",))
    check_shape("slots", arrays["slots"], (tokens,))
    if "query" in arrays:
        _check_query(arrays, tokens)
    if latent:
        _check_rows("latent", arrays["latent"], 2)
        check_shape("latent", arrays["latent"], (tokens, "latent_dim"))
    whole = dim + (shape_of(arrays["latent"], "latent")[-1] if latent else 0)
    _check_table(arrays, tokens, dim)
    _check_norm(arrays, "key_norm", dim)
    names = ("latent_pages", "scales") if latent else ("key_pages", "key_scales")
    _check_pages(names, arrays["key_pages"], arrays.get("key_scales"), heads=heads, dim=whole, lead=lead)
    if "value" in arrays:
        _check_rows("value", arrays["value"], 3)
        check_shape("value", arrays["value"], (tokens, heads, "value_dim"))
        value_dim = shape_of(arrays["value"], "value")[-1]
        pages = arrays["value_pages"]
        _check_pages(("value_pages", "value_scales"), pages, arrays.get("value_scales"), heads=heads, dim=value_dim)
        check_shape("value_pages", pages, (*shape_of(arrays["key_pages"], "key_pages")[:2], "kv_heads", "items"))


def _check_rows(name: str, array: Any, rank: int) -> None:
    shape = shape_of(array, name)
    if len(shape) != rank:
        words = "[tokens, heads, dim]" if rank == 3 else "[tokens, dim]"
        raise ArgumentError(f"{name}: expected {words}, got {list(shape)}")
    check_type(name, array, DTYPES)
    check_packed(name, array)


def check_packed(name: str, array: Any) -> None:
    """Of tensors: elements of the last dimension lie side by side."""
    shape = shape_of(array, name)
    if 0 not in shape and shape[-1] > 1 and hasattr(array, "stride") and array.stride(-1) != 1:
        raise ArgumentError(f"{name}: expected a contiguous last dimension, got {list(shape)} with other strides")


def _check_query(arrays: Mapping[str, Any], tokens: int) -> None:
    _check_rows("query", arrays["query"], 3)
    shape = shape_of(arrays["query"], "query")
    check_shape("query", arrays["query"], (tokens, "heads", "dim"))
    check_shape("out", arrays["out"], shape)
    _check_rows("out", arrays["out"], 3)
    _check_norm(arrays, "query_norm", shape[-1])
    _check_table(arrays, tokens, shape[-1])


def _check_table(arrays: Mapping[str, Any], tokens: int, dim: int) -> None:
    if "table" not in arrays:
        return
    shape = shape_of(arrays["table"], "table")
    check_type("table", arrays["table"], ("float32",))
    if len(shape) != 2 or shape[0] != tokens or shape[1] % 2 or shape[1] > dim:
        text = f"[tokens, rotary_dim], rotary_dim even and at most {dim}"
        raise ArgumentError(f"table: expected {text}, got {list(shape)}")
    check_packed("table", arrays["table"])


def _check_norm(arrays: Mapping[str, Any], name: str, dim: int) -> None:
    if name in arrays:
        check_type(name, arrays[name], ("float32",))
        check_shape(name, arrays[name], (dim,))
        check_packed(name, arrays[name])


def _check_pages(
    names: tuple[str, str], pages: Any, scales: Any, *, heads: int, dim: int, lead: tuple[int, ...] = ()
) -> None:
    """Pages of rows of `heads` times `dim`; lead: the heads are left out."""
    pages_name, scales_name = names
    check_type(pages_name, pages, tuple(FORMAT_OF_DTYPE))
    kv_format = FORMAT_OF_DTYPE[dtype_name(pages)]
    items = kv_format.num_items(dim) if kv_format.name == "int4" else dim
    check_shape(pages_name, pages, ("pages", "page_size", *((heads,) if not lead else ()), items))
    check_packed(pages_name, pages)
    of = f"for pages of {kv_format.name}"
    if scales is None:
        if FORMATS[kv_format.name].needs_scales:
            raise ArgumentError(f"{scales_name}: expected an array {of}, got none")
        return
    if not kv_format.largest:
        raise ArgumentError(f"{scales_name}: expected none {of}, got {list(shape_of(scales, scales_name))}")
    check_type(scales_name, scales, ("float32",))
    num_pages, page_size = shape_of(pages, pages_name)[:2]
    given = shape_of(scales, scales_name)
    check_shape(scales_name, scales, (num_pages, 1 if given[1:2] == (1,) else page_size, heads))
