"""Mixture of experts with NumPy: expert by expert, the tokens that chose it together, in float32.

Wins on the CPU, where no other takes NumPy's arrays without torch. Schedule: for each expert that anybody chose, its
matrices are converted to float32 (16-bit ones, a copy) and meet all its tokens in NumPy's own products; what comes out
is weighted and added to the tokens' rows. Bound: that copy; float32 experts run at the speed of NumPy's products.
Error: float32 throughout, one rounding at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.kernels.numpy.views import numpy_view

_erf = np.vectorize(math.erf, otypes=[np.float32])


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """The mixture in arrays["out"]; arrays and options as ops/moe.py names them."""
    views = {name: numpy_view(array, name) for name, array in arrays.items()}
    x, experts, weights = views["x"].astype(np.float32), views["experts"], views["weights"]
    y = np.zeros(x.shape, np.float32)
    for expert in np.unique(experts[(experts >= 0) & (experts < len(views["gate"]))]):
        tokens, places = np.nonzero(experts == expert)
        gate, up, down = (_matrix(views, name, expert) for name in ("gate", "up", "down"))
        hidden = activated(x[tokens] @ gate.T, options["activation"]) * (x[tokens] @ up.T)
        np.add.at(y, tokens, (hidden @ down.T) * weights[tokens, places][:, None])
    if "residual" in views:
        y += views["residual"].astype(np.float32)
    views["out"][...] = y


def _matrix(views: Mapping[str, np.ndarray], name: str, expert: int) -> np.ndarray:
    """An expert's matrix in float32, its codes times the scales of their blocks."""
    matrix, scales = views[name][expert].astype(np.float32), views.get(f"{name}_scales")
    if scales is None:
        return matrix
    rows, cols = (n // m for n, m in zip(matrix.shape, scales.shape[1:], strict=True))
    return np.asarray(matrix * np.repeat(np.repeat(scales[expert], rows, axis=0), cols, axis=1))


def activated(x: np.ndarray, activation: str) -> np.ndarray:
    """silu, gelu by the error function, or gelu by its usual approximation, of float32."""
    with np.errstate(over="ignore"):
        if activation == "silu":
            return x / (1 + np.exp(-x))
        if activation == "gelu":
            return np.float32(0.5) * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))
        return x / (1 + np.exp(np.float32(-math.sqrt(8 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))


def run_route(logits: Any, bias: Any, experts: Any, weights: Any, options: Any) -> None:
    """Experts and weights [tokens, top_k] of logits [tokens, experts]; options: RoutingOptions of ops/moe.py."""
    x = numpy_view(logits, "logits").astype(np.float32)
    scores = _softmax(x) if options.scores == "softmax" else 1 / (1 + np.exp(-x))
    keys = scores if bias is None else scores + numpy_view(bias, "bias")
    if options.top_groups < options.num_groups:
        keys = _of_best_groups(keys, options.num_groups, options.top_groups)
    chosen = np.argsort(-keys, axis=1, kind="stable")[:, : options.top_k]
    shares = np.take_along_axis(scores, chosen, axis=1)
    if options.normalize:
        total = shares.sum(axis=1, keepdims=True)
        shares = shares / np.where(total > 0, total, 1)
    numpy_view(experts, "experts")[...] = chosen
    numpy_view(weights, "weights")[...] = shares * np.float32(options.scale)


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _of_best_groups(keys: np.ndarray, num_groups: int, top_groups: int) -> np.ndarray:
    """The keys of the groups whose two largest sum highest; -inf elsewhere."""
    groups = keys.reshape(len(keys), num_groups, -1)
    best = np.argsort(-np.sort(groups, axis=2)[:, :, -2:].sum(axis=2), axis=1, kind="stable")
    kept = np.zeros(groups.shape[:2], bool)
    np.put_along_axis(kept, best[:, :top_groups], True, axis=1)
    return np.where(kept[:, :, None], groups, np.float32(-np.inf)).reshape(keys.shape)
