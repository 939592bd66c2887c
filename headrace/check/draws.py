"""Rows of logits of named cases, and whether draws from them are those of the formula."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from headrace.check.cases import SamplingCase
from headrace.check.compare import ROUNDING
from headrace.ops import sampling


def row_of(case: SamplingCase) -> np.ndarray:
    """The case's logits."""
    random = np.random.default_rng(case.vocab)
    x = (random.standard_normal(case.vocab) * case.spread).astype(np.float32)
    x = np.round(x * case.levels) / np.float32(case.levels) if case.levels else x
    x[random.random(case.vocab) < case.excluded] = -np.inf
    return x if np.isfinite(x).any() else np.zeros_like(x)


def assert_draws_follow(tokens: Iterable[int], exact: np.ndarray, straightforward: np.ndarray, seed: int = 7) -> None:
    """Each token is where u falls among the exact sums, give or take the error of a float32 computation."""
    sums = np.cumsum(exact)
    error = np.max(np.abs(np.cumsum(straightforward, dtype=np.float64) - sums))
    allowed = 2 * (error + ROUNDING["float32"])
    for step, token in enumerate(tokens):
        u = sampling.uniform(seed, step)
        assert exact[token] > 0, f"step {step} drew {token}, which is excluded"
        assert sums[token] - exact[token] - allowed <= u < sums[token] + allowed, f"step {step} drew {token} for {u}"
