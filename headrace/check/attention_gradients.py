"""Named cases of attention_backward, its arguments for each, and what a straightforward computation makes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from headrace.check import attention_batch as forward
from headrace.check.attention_cases import DENSE, RAGGED, AttentionCase, dense, heads, ragged
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.guards import Guarded, as_numpy
from headrace.kernels.arrays import dtype_name
from headrace.ops import attention_gradients
from headrace.ops.attention_formula import capped, per_head
from headrace.ops.attention_gradients import AttentionGradients
from headrace.ops.attention_options import AttentionOptions, AttentionResult
from headrace.ops.select import Reason, machine_of

NAMES = ("query", "key", "value", "sinks")

# Off the widths that the kernel steps by: 64 rows (of all heads of a group), 64 keys, 128 of them, 32 dimensions.
GRADIENTS = (
    *(case for case in RAGGED + DENSE if not case.kv_format),
    dense("backward_tile_edges", 2, 33, 129, **heads(4, 2, 33, 31)),
    dense("backward_key_edges", 1, 65, 257, causal=False, **heads(1, 1, 16)),
    dense("backward_many_heads", 1, 5, 140, **heads(71, 1)),
    dense("backward_window", 1, 300, 300, window=(40, None), **heads(2, 2, 32)),
    dense(
        "backward_everything",
        2,
        70,
        150,
        causal=False,
        window=(100, 3),
        softcap=9.0,
        sinks=True,
        alibi="requests",
        mask="float",
        mask_heads=6,
        **heads(6, 2, 33, 47),
    ),
    ragged("backward_documents", (100, 1, 0, 64, 37), (100, 1, 0, 64, 37), sinks=True),
)


def gradient_batch(
    case: AttentionCase, dtype: str = "float32", query_dtype: str = "float32", seed: int = 0
) -> dict[str, Any]:
    """All arguments of the call by name: those of the forward, its results, and gradients of these at random."""
    batch = forward.attention_batch(case, dtype, query_dtype, seed)
    random = np.random.default_rng(seed + 1)
    found = forward.reference(case, batch)
    lse_dtype = "float64" if query_dtype == "float64" else "float32"
    results = {"out": rounded(found.out, query_dtype), "lse": rounded(found.lse, lse_dtype)}
    gradients = {
        "d_out": rounded(random.standard_normal(found.out.shape), query_dtype),
        "d_lse": rounded(random.standard_normal(found.lse.shape), lse_dtype),
    }
    return batch | results | gradients


def reference(batch: dict[str, Any], differentiate: Any = None) -> AttentionGradients:
    """The gradients by the formula, in float64."""
    given = {name: value for name, value in batch.items() if name not in ("out", "lse", "precision")}
    return attention_gradients.reference(**given, differentiate=differentiate)


def why_not(kernel: str, batch: dict[str, Any]) -> list[Reason]:
    """Why that kernel cannot run with these arguments."""
    [found] = [each for each in attention_gradients.kernels() if each.name == kernel]
    return found.why_not(attention_gradients.request_of(attention_gradients.prepared(**batch)))


@functools.lru_cache(maxsize=8)
def expected(
    case: AttentionCase, dtype: str, query_dtype: str, seed: int
) -> tuple[dict[str, Any], AttentionGradients, dict[str, AttentionGradients]]:
    """A batch, what is exact for it, and what is straightforward for it, by arithmetic: filled when asked."""
    batch = gradient_batch(case, dtype, query_dtype, seed)
    return batch, reference(batch), {}


def assert_gradients_hold(
    case: AttentionCase,
    kernel: str,
    dtype: str = "float32",
    query_dtype: str = "float32",
    *,
    precision: str = "auto",
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Raises AssertionError where a gradient that the kernel computes is outside its budget.

    device: "cpu" or "cuda", of kernels that take tensors; then also where they write beside their arrays.
    """
    batch, exact, plain = expected(case, dtype, query_dtype, seed)
    [found] = [each for each in attention_gradients.kernels() if each.name == kernel]
    given = batch if device is None else Guarded(device).tensors(batch)
    asked = attention_gradients.request_of(attention_gradients.prepared(**given | {"precision": precision}))
    arithmetic = found.planned(asked, machine_of(asked)).arithmetic
    if arithmetic not in plain:
        plain[arithmetic] = straightforward(batch, exact, arithmetic)
    compute = attention_gradients.attention_backward if device is None else functools.partial(computed_on, device)
    got = compute(**batch, precision=precision, kernel=kernel)
    assert_gradients_close(got, exact, plain[arithmetic])


def computed_on(device: str, **arguments: Any) -> AttentionGradients:
    """The op of tensors on that device, each in guarded memory, gradients over NaN; AssertionError where anything
    beside an array was written to."""
    guarded = Guarded(device)
    tensors = guarded.tensors(arguments)

    def guarded_like(array: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return guarded.tensor(poisoned(shape, dtype), "a gradient")

    with mock.patch.object(attention_gradients, "empty_like", guarded_like):
        found = attention_gradients.attention_backward(**tensors)
    guarded.assert_untouched()
    return AttentionGradients(*(_host(getattr(found, name)) for name in NAMES))


def _host(tensor: Any) -> Any:
    return None if tensor is None else as_numpy(tensor)


def assert_gradients_close(got: AttentionGradients, exact: AttentionGradients, plain: AttentionGradients) -> None:
    """Raises AssertionError where a gradient is farther from the exact than the straightforward computation allows."""
    for name in NAMES:
        got_part, exact_part, plain_part = (getattr(result, name) for result in (got, exact, plain))
        assert (got_part is None) == (exact_part is None), f"{name}: {got_part}"
        if exact_part is None:
            continue
        dtype = dtype_name(got_part)
        try:
            assert_within_budget(got_part, exact_part, rounded(plain_part, dtype), dtype)
        except AssertionError as error:
            raise AssertionError(f"d_{name} {error}") from error


# The straightforward computation


def straightforward(batch: dict[str, Any], exact: AttentionGradients, arithmetic: str = "fp32") -> AttentionGradients:
    """A plain loop in that arithmetic, from out and lse as they are given: of each element the worst of five orders."""
    random = np.random.default_rng(0)
    given = AttentionResult(batch["out"], batch["lse"])
    worst = exact
    orders: list[Any] = [np.arange, *[random.permutation] * 4]
    for shuffle in orders:
        plain = functools.partial(_plain_gradients, given=given, arithmetic=arithmetic, shuffle=shuffle)
        worst = _farther(worst, reference(batch, plain), exact)
    return worst


def _farther(one: AttentionGradients, other: AttentionGradients, exact: AttentionGradients) -> AttentionGradients:
    def of(name: str) -> Any:
        a, b, true = (getattr(each, name) for each in (one, other, exact))
        return None if true is None else np.where(np.abs(b - true) > np.abs(a - true), b, a)

    return AttentionGradients(*map(of, NAMES))


def _plain_gradients(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    d_out: np.ndarray,
    *,
    bias: np.ndarray,
    options: AttentionOptions,
    sinks: np.ndarray | None,
    d_lse: np.ndarray,
    own: Any,
    given: AttentionResult,
    arithmetic: str,
    shuffle: Callable[[int], np.ndarray],
) -> AttentionGradients:
    """The formula as written in low precision; rows, keys and the elements of products in a shuffled order."""
    dtype = np.float64 if arithmetic == "fp64" else np.float32
    narrow = forward.NARROW.get(arithmetic, np.asarray)
    group, rows, order = query.shape[1] // keys.shape[1], shuffle(len(query)), shuffle(len(keys))
    query, d_out, out = (array[rows].astype(dtype) for array in (query, d_out, given.out[own]))
    lse, d_lse = (array[rows].astype(dtype).T for array in (given.lse[own], d_lse))
    keys, values = (per_head(narrow(array[order].astype(dtype)), group) for array in (keys, values))
    products = _products(narrow(query), keys, shuffle) * dtype(options.scale)
    cap = None if options.softcap is None else dtype(options.softcap)
    products = capped(products, cap)
    growth = dtype(1) if cap is None else 1 - (products / cap) ** 2
    sink = np.full(query.shape[1], -np.inf, dtype) if sinks is None else sinks.astype(dtype)
    seen = ~np.isneginf(lse)
    total = np.where(seen, np.logaddexp(lse, sink[:, None]), dtype(0))
    weights = np.exp(products + bias[:, rows][..., order].astype(dtype) - total[..., None])
    shared = np.where(seen, (d_out * out).sum(axis=-1, dtype=dtype).T, dtype(0))
    delta = shared - d_lse * np.exp(np.where(seen, total - np.where(seen, lse, dtype(0)), dtype(0)))
    slopes = weights * (_products(narrow(d_out), values, shuffle) - delta[..., None]) * growth * dtype(options.scale)
    return AttentionGradients(
        _restored(_summed(narrow(slopes).transpose(2, 1, 0), keys), rows),
        _restored(_summed_over_heads(narrow(slopes), narrow(query), group), order),
        _restored(_summed_over_heads(narrow(weights), narrow(d_out), group), order),
        None if sinks is None else -(np.exp(sink[:, None] - total) * shared).sum(axis=1, dtype=dtype),
    )


def _products(rows: np.ndarray, keys: np.ndarray, shuffle: Callable[[int], np.ndarray]) -> np.ndarray:
    elements = shuffle(rows.shape[2])
    return np.einsum("qhd,khd->hqk", rows[..., elements], keys[..., elements], optimize=True)


def _summed(factors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sum of factors [rows, n, heads] times rows [rows, heads, dim], one row after the other, [n, heads, dim]."""
    total = np.zeros((*factors.shape[1:], rows.shape[-1]), factors.dtype)
    for factor, row in zip(np.ascontiguousarray(factors), rows, strict=True):
        total += factor[..., None] * row
    return total


def _summed_over_heads(factors: np.ndarray, rows: np.ndarray, group: int) -> np.ndarray:
    """Sum of factors [heads, rows, n] times rows [rows, heads, dim] over rows and then heads, [n, kv_heads, dim]."""
    ordered = factors.reshape(len(factors) // group, group, *factors.shape[1:]).transpose(
        1, 2, 3, 0
    )  # member, row, key, kv head
    terms = rows.reshape(len(rows), rows.shape[1] // group, group, rows.shape[2]).transpose(2, 0, 1, 3)
    count = len(rows) * group
    return _summed(ordered.reshape(count, *ordered.shape[2:]), terms.reshape(count, *terms.shape[2:]))


def _restored(shuffled: np.ndarray, order: np.ndarray) -> np.ndarray:
    restored = np.empty_like(shuffled)
    restored[order] = shuffled
    return restored
