"""What the arrays of an attention call must be: ranks, sizes and types, each mistake named by its argument.

`arrays` maps the words of a call to its arrays: query, key, value and what else was given; `pages` is the suffix with
which keys and values are called when they are pages. Contents (lengths, starts, page numbers) are checked natively.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer, dtype_name, shape_of

FLOATS = ("float32", "float16", "bfloat16", "float64")
QUANTIZED = ("float8_e4m3fn", "int8", "uint8")  # uint8: two 4-bit codes
MASKS = ("bool", "float32", "float16", "bfloat16", "float64")  # the last with float64 queries alone

Shape = tuple[int, ...]


def logical_dim(shape: Shape, dtype: str) -> int:
    """Elements of a key or value, of which a byte of int4 holds two."""
    return shape[-1] * (2 if dtype == "uint8" else 1)


def check_rank(name: str, shape: Shape, words: str) -> None:
    """`words`: the dimensions, as in "tokens, heads, head_dim"."""
    if len(shape) != words.count(",") + 1:
        raise ArgumentError(f"{name}: expected [{words}], got {list(shape)}")


def check_heads(arrays: Mapping[str, Any], pages: str = "") -> None:
    """Types, heads and head sizes of query, key and value; their other dimensions are the layout's."""
    shapes = {name: shape_of(arrays[name], name) for name in ("query", "key", "value")}
    dtypes = {name: dtype_name(arrays[name]) for name in shapes}
    _check_types(dtypes, pages)
    head_dim, heads, kv_heads = shapes["query"][-1], shapes["query"][-2], shapes["key"][-2]
    if logical_dim(shapes["key"], dtypes["key"]) != head_dim:
        got = logical_dim(shapes["key"], dtypes["key"])
        raise ArgumentError(f"key{pages}: expected the query's head_dim {head_dim}, got {got}")
    if shapes["value"][:-1] != shapes["key"][:-1]:
        expected = _text((*shapes["key"][:-1], "value_dim"))
        raise ArgumentError(f"value{pages}: expected {expected} as of key{pages}, got {list(shapes['value'])}")
    if min(head_dim, kv_heads, heads, shapes["value"][-1]) < 1:
        raise ArgumentError(
            f"query, key{pages}, value{pages}: expected at least one head and one element, got {shapes}"
        )
    if heads % kv_heads:
        raise ArgumentError(f"query: expected a multiple of {kv_heads} heads, those of key{pages}, got {heads}")


def _check_types(dtypes: Mapping[str, str], pages: str) -> None:
    if dtypes["query"] not in FLOATS:
        raise ArgumentError(f"query: expected {' or '.join(FLOATS)}, got {dtypes['query']}")
    if dtypes["key"] not in FLOATS + QUANTIZED:
        raise ArgumentError(f"key{pages}: expected {' or '.join(FLOATS + QUANTIZED)}, got {dtypes['key']}")
    if dtypes["value"] != dtypes["key"]:
        raise ArgumentError(f"value{pages}: expected {dtypes['key']}, the type of key{pages}, got {dtypes['value']}")
    if (dtypes["query"] == "float64") != (dtypes["key"] == "float64"):
        got = f"{dtypes['query']} and {dtypes['key']}"
        raise ArgumentError(f"query, key{pages}: expected float64 for all or none, got {got}")


def check_scales(arrays: Mapping[str, Any], pages: str = "") -> None:
    """Scales of quantized keys and values: float32, one per token and head, or with pages one per page and head."""
    dtype = dtype_name(arrays["key"])
    for name in ("key", "value"):
        scales = arrays.get(f"{name}_scales")
        if scales is None and dtype in ("int8", "uint8"):
            raise ArgumentError(f"{name}_scales: {dtype} needs them, got None", "float32, one per token and head")
        if scales is None:
            continue
        if dtype in FLOATS:
            raise ArgumentError(f"{name}_scales: expected None with {dtype}, which has no scales")
        check_type(f"{name}_scales", scales, ("float32",))
        whole = shape_of(arrays[name], name)[:-1]
        allowed = [whole, (whole[0], 1, whole[2])] if pages else [whole]
        if shape_of(scales, f"{name}_scales") not in allowed:
            texts = " or ".join(str(list(shape)) for shape in allowed)
            raise ArgumentError(f"{name}_scales: expected {texts}, got {list(scales.shape)}")


def check_type(name: str, array: Any, allowed: tuple[str, ...]) -> None:
    shape_of(array, name)
    if dtype_name(array) not in allowed:
        raise ArgumentError(f"{name}: expected {' or '.join(allowed)}, got {dtype_name(array)}")


def check_shape(name: str, array: Any, expected: tuple[Any, ...]) -> None:
    """`expected`: numbers, or words for sizes that may be any."""
    shape = shape_of(array, name)
    fits = len(shape) == len(expected) and all(n == e for n, e in zip(shape, expected, strict=True) if type(e) is int)
    if not fits:
        raise ArgumentError(f"{name}: expected {_text(expected)}, got {list(shape)}")


def check_int32(name: str, array: Any, expected: tuple[Any, ...]) -> None:
    check_shape(name, array, expected)
    check_type(name, array, ("int32",))


def length_of(name: str, array: Any) -> int:
    """How many there are of int32 [..], one per request."""
    check_int32(name, array, ("requests",))
    return int(array.shape[0])


def per_head_values(arrays: Mapping[str, Any], num_requests: int) -> dict[str, Any]:
    """Sinks [heads] and slopes [requests or 1, heads], of those given."""
    found, heads = {}, shape_of(arrays["query"], "query")[-2]
    sinks, slopes = arrays.get("sinks"), arrays.get("alibi_slopes")
    if sinks is not None:
        check_shape("sinks", sinks, (heads,))
        check_type("sinks", sinks, ("float32",))
        found["sinks"] = sinks
    if slopes is not None:
        check_type("alibi_slopes", slopes, ("float32",))
        if shape_of(slopes, "alibi_slopes") not in [(heads,), (num_requests, heads)]:
            got = list(shape_of(slopes, "alibi_slopes"))
            raise ArgumentError(f"alibi_slopes: expected [{heads}] or [{num_requests}, {heads}], got {got}")
        found["alibi_slopes"] = widened("alibi_slopes", slopes, 2)
    return found


def ranked_mask(mask: Any, expected: tuple[int, ...]) -> Any:
    """The mask with as many dimensions as `expected` and one more, its columns; a dimension of 1 holds for all."""
    check_type("mask", mask, MASKS)
    shape, rank = shape_of(mask, "mask"), len(expected) + 1
    sizes = (1,) * (rank - len(shape)) + shape
    if len(shape) < 2 or len(sizes) > rank or any(n not in (1, e) for n, e in zip(sizes, expected, strict=False)):
        texts = ", ".join(f"{size} or 1" for size in expected)
        raise ArgumentError(f"mask: expected [{texts}, columns], got {list(shape)}")
    return widened("mask", mask, rank)


def widened(name: str, array: Any, rank: int) -> Any:
    """The array with dimensions of 1 put before it."""
    missing = rank - len(array.shape)
    if missing and isinstance(array, Buffer):
        raise ArgumentError(f"{name}: expected {rank} dimensions in a program, got {list(array.shape)}")
    return array[(None,) * missing] if missing else array


def _text(sizes: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"
