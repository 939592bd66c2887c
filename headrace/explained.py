"""`headrace explain`: an op's request built from a few numbers, and what `choose` would do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from headrace.errors import ArgumentError
from headrace.ops.call_request import explain
from headrace.ops.explanation import Explanation
from headrace.options import ExplainOptions

DTYPES = {
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "int4": "uint8",
}
_SCALED = ("int8", "uint8")  # formats that need scales
MLA_ROPE_DIM = 64


def explain_op(op: str, asked: ExplainOptions) -> Explanation:
    """The kernels of an op for shapes made of these numbers; starts, lengths and pages as full as they can be."""
    if op not in _OPS:
        raise ArgumentError(f"op: expected one of {', '.join(sorted(_OPS))}, got {op!r}")
    for name, number in asdict(asked).items():
        least = {"value_dim": 0, "window_left": -1}.get(name, 1)
        if isinstance(number, int) and not isinstance(number, bool) and number < least:
            raise ArgumentError(f"--{name.replace('_', '-')}: expected a whole number >= {least}, got {number}")
    return _OPS[op](asked)


def _linear(asked: ExplainOptions) -> Explanation:
    types = {"weight": asked.weight}
    shapes = (asked.tokens, asked.dim), (asked.rows, asked.dim)
    return explain("linear", *shapes, dtype=types, precision=asked.precision, **_chosen_by(asked))


def _rms_norm(asked: ExplainOptions) -> Explanation:
    return explain("rms_norm", (asked.tokens, asked.dim), (asked.dim,), **_chosen_by(asked))


def _attention(asked: ExplainOptions) -> Explanation:
    kv_shape = (asked.batch, asked.kv_len, asked.kv_heads)
    query = (asked.batch, asked.query_len, asked.query_heads, asked.head_dim)
    key, value = (*kv_shape, _stored(asked, asked.head_dim)), (*kv_shape, _stored(asked, _value_dim(asked)))
    scales: dict[str, Any] = {"key_scales": kv_shape, "value_scales": kv_shape} if _kv_dtype(asked) in _SCALED else {}
    causal = not asked.full
    return explain(
        "attention", query, key, value, dtype=_dtypes(asked, "key", "value"), causal=causal, **scales, **_options(asked)
    )


def _paged_attention(asked: ExplainOptions) -> Explanation:
    rows, kv_shape = _rows(asked), (*_pages(asked), asked.kv_heads)
    keys, values = (*kv_shape, _stored(asked, asked.head_dim)), (*kv_shape, _stored(asked, _value_dim(asked)))
    tables: dict[str, Any] = {"page_table": (asked.batch, _pages_each(asked)), "sequence_lens": (asked.batch,)}
    if _kv_dtype(asked) in _SCALED:
        tables |= {"key_scales": kv_shape, "value_scales": kv_shape}
    types = _dtypes(asked, "key_pages", "value_pages")
    return explain("paged_attention", rows, keys, values, dtype=types, **tables, **_starts(asked), **_options(asked))


def _mla_attention(asked: ExplainOptions) -> Explanation:
    value_dim = asked.value_dim or max(1, asked.head_dim - MLA_ROPE_DIM)
    pages = (*_pages(asked), _stored(asked, asked.head_dim))
    tables: dict[str, Any] = {"page_table": (asked.batch, _pages_each(asked)), "sequence_lens": (asked.batch,)}
    if _kv_dtype(asked) in _SCALED:
        tables |= {"latent_scales": pages[:2]}
    options = _options(asked) | _starts(asked) | {"value_dim": value_dim, "scale": asked.head_dim**-0.5}
    return explain("mla_attention", _rows(asked), pages, dtype=_dtypes(asked, "latent_pages"), **tables, **options)


_OPS: dict[str, Callable[[ExplainOptions], Explanation]] = {
    "attention": _attention,
    "linear": _linear,
    "mla_attention": _mla_attention,
    "paged_attention": _paged_attention,
    "rms_norm": _rms_norm,
}


def _rows(asked: ExplainOptions) -> tuple[int, int, int]:
    return (asked.batch * asked.query_len, asked.query_heads, asked.head_dim)


def _pages_each(asked: ExplainOptions) -> int:
    return -(-asked.kv_len // asked.page_size)


def _pages(asked: ExplainOptions) -> tuple[int, int]:
    return (asked.batch * _pages_each(asked), asked.page_size)


def _starts(asked: ExplainOptions) -> dict[str, Any]:
    return {"query_starts": (asked.batch + 1,)}


def _options(asked: ExplainOptions) -> dict[str, Any]:
    window = (None if asked.window_left < 0 else asked.window_left, None)
    options = {"precision": asked.precision, "deterministic": asked.deterministic, "window": window}
    return options | _chosen_by(asked)


def _chosen_by(asked: ExplainOptions) -> dict[str, Any]:
    """Where the arrays would lie, and what the kernel must have."""
    return {"device": asked.device, "arch": asked.arch, "require": asked.require}


def _value_dim(asked: ExplainOptions) -> int:
    return asked.value_dim or asked.head_dim


def _stored(asked: ExplainOptions, dim: int) -> int:
    """Elements of an array that holds `dim` numbers: a byte of int4 holds two."""
    return dim // 2 if _kv_dtype(asked) == "uint8" else dim


def _kv_dtype(asked: ExplainOptions) -> str:
    return _named(asked.kv_dtype or asked.dtype, "--kv-dtype")


def _dtypes(asked: ExplainOptions, *cached: str) -> dict[str, str]:
    return {"query": _named(asked.dtype, "--dtype")} | dict.fromkeys(cached, _kv_dtype(asked))


def _named(name: str, option: str) -> str:
    found = DTYPES.get(name, name)
    if found not in (*DTYPES.values(), "int8"):
        raise ArgumentError(f"{option}: expected one of {', '.join([*DTYPES, 'int8'])}, got {name!r}")
    return found
