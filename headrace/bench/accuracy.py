"""How far an engine's answers are from those of the same weights in float32: the divergence at every position.

The exact logits are headrace's own over the file's weights dequantized to float32, with a float32 cache: within 1e-3 of
transformers in float32, which a test compares.
"""

from __future__ import annotations

import numpy as np

_ROWS = 64  # positions at a time: float64 of a whole text would take hundreds of megabytes


def divergence(exact: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(exact || other) in nats at every position, from logits [tokens, vocab]."""
    starts = range(0, len(exact), _ROWS)
    return np.concatenate([_divergence(exact[i : i + _ROWS], logits[i : i + _ROWS]) for i in starts])


def _divergence(exact: np.ndarray, logits: np.ndarray) -> np.ndarray:
    p, q = log_probabilities(exact), log_probabilities(logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
