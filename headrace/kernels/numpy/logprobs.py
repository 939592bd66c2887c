"""Log-probabilities of tokens with NumPy, row by row.

Wins on the CPU, where it is the only one. Bound: passes over a row, 50 us for 32000 logits; few values are sorted.
Error: the sum is float64 over float32 exponentials.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from headrace.kernels.numpy.views import numpy_view

_BLOCK = 64


def run(logits: Any, tokens: Any, chosen: Any, top_ids: Any, top: Any) -> None:
    """The results of every row; arrays as ops/logprobs.py names them."""
    x, ids = numpy_view(logits, "logits"), numpy_view(tokens, "tokens")
    out = [numpy_view(array, "out") for array in (chosen, top_ids, top)]
    with np.errstate(invalid="ignore"):
        for row, token in enumerate(ids.tolist()):
            out[0][row], out[1][row], out[2][row] = of_row(x[row], token, out[1].shape[1])


def of_row(x: np.ndarray, token: int, num_top: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The token's logprob, and ids and logprobs of the likeliest, in float64. x: logits [vocab]."""
    peak = float(x.max())
    zero = peak + math.log(float(np.exp(x - x.dtype.type(peak)).sum(dtype=np.float64))) if peak < math.inf else math.nan
    ids = largest(x, num_top) if num_top else np.zeros(0, np.int64)
    own = float(x[token]) - zero if 0 <= token < len(x) else math.nan
    return own, ids, x[ids].astype(np.float64) - zero


def largest(x: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest, falling, equal ones by rising place. Few values are sorted: those that reach
    the count-th largest of the blocks' largest."""
    num_blocks = len(x) // _BLOCK
    if count < num_blocks:
        maxima = x[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).max(axis=1)
        places = np.flatnonzero(x >= np.partition(maxima, num_blocks - count)[num_blocks - count])
    else:
        places = np.arange(len(x))
    return places[np.argsort(-x[places], kind="stable")[:count]]
