"""The arguments of an attention call for a named case, and what a straightforward computation makes of them.

Everything that a kernel must not read is NaN, or garbage where the type has no NaN: slots of a page past a sequence's
end, keys past a length, scales of either, page numbers past the pages in use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.check.attention_cases import AttentionCase
from headrace.check.compare import rounded
from headrace.check.pages import paged_arrays, unwritten, written, written_scales
from headrace.ops import attention_dense, attention_paged
from headrace.ops.attention_formula import capped, per_head
from headrace.ops.attention_options import AttentionOptions, AttentionResult


def op_of(case: AttentionCase) -> Any:
    """The function that the case is of."""
    return attention_paged.paged_attention if case.layout == "paged" else attention_dense.attention


def attention_batch(
    case: AttentionCase, dtype: str = "float32", query_dtype: str = "float32", seed: int = 0
) -> dict[str, Any]:
    """All arguments of the call by name, options included. dtype: of keys and values, unless the case has its own."""
    random = np.random.default_rng(seed)
    kept_in = case.kv_format or dtype
    build = paged_arrays if case.layout == "paged" else _dense_keys if case.dense else _ragged_keys
    arrays = build(case, kept_in, random)
    query = rounded(random.standard_normal((*case.out_shape[:-1], case.head_dim)), query_dtype)
    arrays["query"] = _heads_first(query) if case.layout == "heads_first" else query
    if not case.dense:
        arrays["query_starts"] = np.cumsum([0, *case.query_lens], dtype=np.int32)
    if case.mask:
        arrays["mask"] = _mask(case, random)
    if case.sinks:
        arrays["sinks"] = random.standard_normal(case.heads).astype(np.float32)
    if case.alibi:
        shape = (len(case.query_lens), case.heads) if case.alibi == "requests" else (case.heads,)
        arrays["alibi_slopes"] = random.uniform(0, 0.3, shape).astype(np.float32)
    return arrays | case.options


def latent_batch(
    case: AttentionCase, dtype: str = "float32", query_dtype: str = "float32", scale: float = 0.17
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of mla_attention, and the same as those of paged_attention."""
    batch = attention_batch(case, dtype, query_dtype) | {"scale": scale}
    keys = batch["key_pages"]
    dim = case.value_dim // 2 if keys.dtype == np.uint8 else case.value_dim
    as_paged = batch | {"value_pages": np.ascontiguousarray(keys[..., :dim])}
    if case.scales:
        as_paged["value_scales"] = batch["key_scales"]
    latents = {k: v for k, v in batch.items() if not k.startswith(("key_", "value_"))}
    latents |= {"latent_pages": keys[:, :, 0], "value_dim": case.value_dim}
    return latents | ({"latent_scales": batch["key_scales"][..., 0]} if case.scales else {}), as_paged


def reference(case: AttentionCase, batch: dict[str, Any], mix: Any = None) -> AttentionResult:
    """The case's op by its formula, in float64."""
    module = attention_paged if case.layout == "paged" else attention_dense
    return module.reference(**batch, mix=mix)


def _dense_keys(case: AttentionCase, dtype: str, random: np.random.Generator) -> dict[str, Any]:
    keys = max(case.key_lens, default=0)
    arrays: dict[str, Any] = {}
    for name, dim in (("key", case.head_dim), ("value", case.value_dim or case.head_dim)):
        array = unwritten((len(case.key_lens), keys, case.kv_heads), dim, dtype)
        for row, length in zip(array, case.key_lens, strict=True):
            row[:length] = written((length, case.kv_heads), dim, dtype, random)
        arrays[name] = _heads_first(array) if case.layout == "heads_first" else array
        if case.scales:
            arrays[f"{name}_scales"] = written_scales(array.shape[:3], dtype, random)
    if set(case.key_lens) - {keys}:
        arrays["key_lens"] = np.array(case.key_lens, np.int32)
    return arrays


def _ragged_keys(case: AttentionCase, dtype: str, random: np.random.Generator) -> dict[str, Any]:
    shape = (sum(case.key_lens), case.kv_heads)
    arrays: dict[str, Any] = {"key_starts": np.cumsum([0, *case.key_lens], dtype=np.int32)}
    for name, dim in (("key", case.head_dim), ("value", case.value_dim or case.head_dim)):
        arrays[name] = written(shape, dim, dtype, random)
        if case.scales:
            arrays[f"{name}_scales"] = written_scales(shape, dtype, random)
    return arrays


def _heads_first(array: np.ndarray) -> np.ndarray:
    """The same array, lying in memory as [batch, heads, tokens, dim]."""
    return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


# Masks


def _mask(case: AttentionCase, random: np.random.Generator) -> np.ndarray:
    if case.dense:
        one = [_dense_mask(case, b, random) for b in range(len(case.query_lens))]
        return np.stack(one if case.mask in ("bool", "float", "document", "padded") else one[:1])
    if case.mask == "tree":
        return _forest(case, random)
    return _random_mask(case, (case.mask_heads, sum(case.query_lens), max(case.key_lens, default=1)), random)


def _random_mask(case: AttentionCase, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    seen = random.random(shape) < 0.6
    seen[..., 1:2, :] = False  # a row that sees nothing
    if case.mask == "bool":
        return seen
    return np.where(seen, 2 * random.standard_normal(shape), -np.inf).astype(np.float32)


def _dense_mask(case: AttentionCase, b: int, random: np.random.Generator) -> np.ndarray:
    """[mask_heads, queries, keys]"""
    queries, keys = case.query_lens[0], case.key_lens[0]
    ahead = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
    if case.mask in ("bool", "float"):
        return _random_mask(case, (case.mask_heads, queries, keys), random)
    if case.mask == "document":
        ids = [np.searchsorted([9 + b, 11 + b, 40], np.arange(n), side="right") for n in (queries, keys)]
        return (ids[0][:, None] == ids[1])[None]
    if case.mask == "tree":
        return np.concatenate([np.ones((queries, keys - queries), bool), _ancestors(queries, random)], axis=1)[None]
    named = {
        "all": ahead < keys,
        "causal": ahead <= 0,
        "window": (ahead >= -9) & (ahead <= 4),
        "prefix": (ahead <= 0) | (np.arange(keys) < 11),
        "padded": (ahead <= 0) & (np.arange(keys) >= (0, 7, 3)[b % 3]),
    }
    return named[case.mask][None]


def _forest(case: AttentionCase, random: np.random.Generator) -> np.ndarray:
    """[mask_heads, tokens, columns]: each request's tree at the end of its rows."""
    columns = max(case.query_lens)
    mask = np.ones((case.mask_heads, sum(case.query_lens), columns), bool)
    for h in range(case.mask_heads):
        for start, count in zip(np.cumsum([0, *case.query_lens]), case.query_lens, strict=False):
            mask[h, start : start + count, columns - count :] = _ancestors(count, random)
    return mask


def _ancestors(count: int, random: np.random.Generator) -> np.ndarray:
    """Which earlier ones each node of a random tree descends from, itself included."""
    seen = np.eye(count, dtype=bool)
    for i in range(1, count):
        seen[i] |= seen[random.integers(0, i)]
    return seen


# The straightforward computation


def straightforward(
    case: AttentionCase, batch: dict[str, Any], exact: AttentionResult, arithmetic: str = "fp32"
) -> AttentionResult:
    """A plain loop in that arithmetic: of each element the worst of seven ways to sum, the keys' own order among them.

    One way alone may be right by luck where a batch has few outputs, and no kernel sums in just that way.
    """
    random = np.random.default_rng(0)
    worst_out, worst_lse = exact.out, exact.lse
    ways: list[tuple[Any, Any]] = [(np.arange, _in_lanes), *[(random.permutation, _in_lanes)] * 4]
    ways += [(np.arange, _one_by_one), (random.permutation, _one_by_one)]
    for shuffle, products in ways:
        how = {"arithmetic": arithmetic, "shuffle": shuffle, "products": products, "shift": random.random()}
        mix = functools.partial(_plain_mixture, **how)
        other = reference(case, batch, mix)
        worst_out = _farther(worst_out, other.out, exact.out)
        worst_lse = _farther(worst_lse, other.lse, exact.lse)
    return AttentionResult(worst_out, worst_lse)


def _farther(one: np.ndarray, other: np.ndarray, exact: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # -inf - -inf
        return np.where(np.abs(other - exact) > np.abs(one - exact), other, one)


def _plain_mixture(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    bias: np.ndarray,
    options: AttentionOptions,
    sinks: np.ndarray | None,
    arithmetic: str,
    shuffle: Callable[[int], np.ndarray],
    products: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shift: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax as written in low precision. `shift`: weights are of exp(score - largest - shift)."""
    dtype = np.float64 if arithmetic == "fp64" else np.float32
    narrow = NARROW.get(arithmetic, np.asarray)
    group, order, elements = query.shape[1] // keys.shape[1], shuffle(len(keys)), shuffle(query.shape[2])
    query, keys, values = (narrow(array.astype(dtype)) for array in (query, keys[order], values[order]))
    keys, values = per_head(keys, group), per_head(values, group)
    scores = products(query[..., elements], keys[..., elements]) * dtype(options.scale)
    scores = capped(scores, None if options.softcap is None else dtype(options.softcap))
    scores = scores + bias[..., order].astype(dtype)
    largest = np.max(scores, axis=-1, initial=-np.inf)
    largest = np.where(np.isneginf(largest), dtype(0), largest) + dtype(shift if arithmetic in NARROW else 0)
    weights = np.exp(scores - largest[..., None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.log(total) + largest
        divisor = total if sinks is None else total + np.exp(sinks.astype(dtype)[:, None] - largest)
        out = _summed(narrow(weights), values) / divisor.T[..., None]
    return np.where(total.T[..., None] > 0, out, 0), lse.T


def _as_tf32(array: np.ndarray) -> np.ndarray:
    """float32 with the 10 bits of a mantissa that tf32 keeps, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~np.uint32(0x1FFF)).view(np.float32)


# What operands are rounded to, of arithmetic narrower than float32. (tf32x3: to nothing less.)
NARROW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": lambda array: rounded(array, "bfloat16").astype(np.float32),
    "fp16": lambda array: rounded(array, "float16").astype(np.float32),
    "tf32": _as_tf32,
}


def _in_lanes(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """NumPy's own products, [heads, queries, keys]: many sums side by side, added up at the end."""
    return np.einsum("qhd,khd->hqk", query, keys, optimize=True)


def _one_by_one(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One element after the other, [heads, queries, keys]: lanes may be right to the last bit for one key."""
    total = np.zeros((query.shape[1], len(query), len(keys)), query.dtype)
    for one, other in zip(*(np.ascontiguousarray(array.transpose(2, 1, 0)) for array in (query, keys)), strict=True):
        total += one[:, :, None] * other[:, None]
    return total


def _summed(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One key after the other, [queries, heads, value_dim]."""
    total = np.zeros((weights.shape[1], *values.shape[1:]), weights.dtype)
    for weight, value in zip(np.ascontiguousarray(weights.T), values, strict=True):
        total += weight[..., None] * value
    return total
