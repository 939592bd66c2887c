"""Sampling on the CPU: the row's peak, its weights, the borders of the filters, the draw.

Native: sampling.h, border_search.h, op_sampling.cpp.

Wins always: it is the only one. Schedule: one row per thread. Greedy reads the row once. A draw writes the weights once
and sums them by blocks; top-k and top-p find their borders by counting bits of the logits, without a sort.
Error: weights are float32 (relative error of e^x below 3e-7), their sums float64 over float32 sums of 1024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of

TokenCounts = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(
    level: str, logits: Any, settings: Sequence[np.ndarray], counts: TokenCounts | None, out: np.ndarray
) -> np.ndarray:
    tensors = [as_tensor(array, name) for array, name in zip(settings, ("reals", "integers"), strict=True)]
    seen = [None] * 3 if counts is None else [as_tensor(array, "counts") for array in counts]
    native.sample(runner_of(logits), level, tensors, as_tensor(logits, "logits"), as_tensor(out, "out"), *seen)
    return out
