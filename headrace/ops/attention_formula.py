"""Attention of one request, in float64 and written for reading: what every attention op means.

    query [queries, heads, head_dim], keys [keys, kv_heads, head_dim], values [keys, kv_heads, value_dim]

    score[h, i, j] = cap(scale * q[i, h] . k[j, h // group]) - slope[h] * |own(i) - j| + mask[h, i, j]
                     and -inf where i does not see j;   group = heads / kv_heads,   cap(s) = softcap * tanh(s / softcap)
    lse[i, h]      = log sum_j exp(score[h, i, j])
    out[i, h]      = sum_j exp(score[h, i, j]) v[j, h // group] / (exp(lse[i, h]) + exp(sink[h]))

What depends on positions alone (visibility, ALiBi, mask) is one array, the bias; the rest is the mixture.
Press et al. 2021, "Train Short, Test Long" (ALiBi); Xiao et al. 2023, "Efficient Streaming Language Models with
Attention Sinks", here as a learned logit that takes weight and gives no value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.ops.attention_options import AttentionOptions

# mixture, or another way to compute what it does
Mix = Callable[..., tuple[np.ndarray, np.ndarray]]


def attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    options: AttentionOptions,
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    mix: Mix | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """out [queries, heads, value_dim] and lse [queries, heads] of one request, by `mix` (the exact `mixture`).

    mask: [queries or 1, columns] or [heads or 1, queries or 1, columns], its last column the last key.
    sinks, alibi_slopes: [heads].
    """
    bias = position_bias(len(query), len(keys), options, mask=mask, alibi_slopes=alibi_slopes)
    return (mix or mixture)(query, keys, values, bias=bias, options=options, sinks=sinks)


def mixture(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    bias: np.ndarray,
    options: AttentionOptions,
    sinks: np.ndarray | None = None,
    dtype: Any = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """The formula, given the bias [heads or 1, queries, keys]."""
    group = query.shape[1] // keys.shape[1]
    query, keys, values = (
        query.astype(dtype),
        per_head(keys, group).astype(dtype),
        per_head(values, group).astype(dtype),
    )
    scores = capped(options.scale * np.einsum("qhd,khd->hqk", query, keys, optimize=True), options.softcap)
    scores = np.where(np.isneginf(bias), -np.inf, scores + bias.astype(dtype))
    lse = log_sum_exp(scores)
    total = lse if sinks is None else np.logaddexp(lse, sinks.astype(dtype)[:, None])
    weights = np.exp(scores - np.where(np.isneginf(total), 0, total)[..., None])
    return np.einsum("hqk,khd->qhd", weights, values, optimize=True), lse.T


def per_head(array: np.ndarray, group: int) -> np.ndarray:
    """Keys or values repeated for every query head that reads them."""
    return np.repeat(array, group, axis=1)


def capped(scores: np.ndarray, softcap: float | None) -> np.ndarray:
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def log_sum_exp(scores: np.ndarray) -> np.ndarray:
    """Natural log of the sum of exp over the last dimension; -inf where there is nothing to sum."""
    largest = np.max(scores, axis=-1, initial=-np.inf)
    largest = np.where(np.isneginf(largest), 0, largest)
    with np.errstate(divide="ignore"):
        return largest + np.log(np.exp(scores - largest[..., None]).sum(axis=-1))


def own_keys(num_queries: int, num_keys: int, align: str) -> np.ndarray:
    """The key each query stands at; below 0 where a request has fewer keys than queries."""
    return np.arange(num_queries) + (num_keys - num_queries if align == "bottom_right" else 0)


def visible(num_queries: int, num_keys: int, options: AttentionOptions) -> np.ndarray:
    """Which key each query sees by causality and window, bool [queries, keys]."""
    ahead = np.arange(num_keys) - own_keys(num_queries, num_keys, options.align)[:, None]
    left_of_right = True if options.right is None else ahead <= options.right
    right_of_left = True if options.left is None else ahead >= -options.left
    return np.ones_like(ahead, bool) & left_of_right & right_of_left


def position_bias(
    num_queries: int,
    num_keys: int,
    options: AttentionOptions,
    *,
    mask: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
) -> np.ndarray:
    """What is added to the scores, [heads or 1, queries, keys]; -inf where a query does not see a key."""
    bias = np.where(visible(num_queries, num_keys, options), 0.0, -np.inf)[None]
    if alibi_slopes is not None:
        distance = np.abs(np.arange(num_keys) - own_keys(num_queries, num_keys, options.align)[:, None])
        bias = bias - alibi_slopes.astype(np.float64)[:, None, None] * distance
    if mask is not None:
        mask = mask if mask.ndim == 3 else mask[None]
        bias = np.repeat(bias, max(len(mask) // len(bias), 1), axis=0)
        used = min(mask.shape[-1], num_keys)
        bias[..., num_keys - used :] += added(mask[..., mask.shape[-1] - used :])
    return bias


def added(mask: np.ndarray) -> np.ndarray:
    """A mask as numbers to add: a bool one keeps (0) or drops (-inf)."""
    return np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask.astype(np.float64)


def decoded(codes: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """Keys or values as numbers, from what a cache holds and their scales [..., kv_heads].

    uint8 holds two 4-bit codes each, element 2i in the low half and 2i + 1 in the high, as two's complement.
    """
    if codes.dtype == np.uint8:
        halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        codes = (halves.astype(np.int8) ^ 8) - 8
    numbers = codes if codes.dtype.itemsize == 8 else codes.astype(np.float32)
    return numbers if scales is None else numbers.astype(np.float64) * scales.astype(np.float64)[..., None]
