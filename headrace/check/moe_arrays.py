"""The arrays of named cases of mixture_of_experts and route, what comes out, and what a plain computation makes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from headrace.check.cases import MoeCase, RouteCase
from headrace.check.compare import rounded
from headrace.ops import moe


def moe_arrays(case: MoeCase, dtype: str, seed: int = 0) -> dict[str, Any]:
    """x, gate, up, down [.., in `dtype`], experts and weights of the case."""
    random = np.random.default_rng([case.tokens, case.dim, seed])
    shapes = {"x": (case.tokens, case.dim), "gate": (case.experts, case.ffn_dim, case.dim)}
    shapes |= {"up": shapes["gate"], "down": (case.experts, case.dim, case.ffn_dim)}
    arrays = {name: rounded(random.standard_normal(shape) / shape[-1] ** 0.5, dtype) for name, shape in shapes.items()}
    order = np.argsort(random.random((case.tokens, case.experts)), axis=1)[:, : case.top_k].astype(np.int32)
    elsewhere = random.random(order.shape) < case.elsewhere
    experts = np.where(elsewhere, np.where(order % 2, -1 - order, case.experts + order), order).astype(np.int32)
    return arrays | {"experts": experts, "weights": random.random(order.shape).astype(np.float32)}


def moe_exact(arrays: dict[str, Any], activation: str = "silu") -> np.ndarray:
    """The formula in float64."""
    routing = moe.Routing(arrays["experts"], arrays["weights"])
    gate, up, down = (moe.decoded(arrays[name], arrays.get(f"{name}_scales")) for name in ("gate", "up", "down"))
    exact = moe.reference(arrays["x"], gate, up, down, routing, activation=activation)
    return exact + arrays["residual"].astype(np.float64) if "residual" in arrays else exact


def moe_straightforward(arrays: dict[str, Any], activation: str = "silu", out_dtype: str | None = None) -> np.ndarray:
    """float32 products, in x's own type what lies between them and what each expert gives."""
    dtype = str(arrays["x"].dtype)
    y = np.zeros(arrays["x"].shape, np.float32)
    matrices = [_in_type_of_x(arrays, name) for name in ("gate", "up", "down")]
    for token, place in itertools.product(*map(range, arrays["experts"].shape)):
        expert = arrays["experts"][token, place]
        if not 0 <= expert < len(arrays["gate"]):
            continue
        x = arrays["x"][token].astype(np.float32)
        gate, up, down = (matrix[expert] for matrix in matrices)
        hidden = rounded(moe.activated(gate @ x, activation) * (up @ x), dtype).astype(np.float32)
        y[token] += rounded(arrays["weights"][token, place] * (down @ hidden), dtype).astype(np.float32)
    if "residual" in arrays:
        y += arrays["residual"].astype(np.float32)
    return rounded(y, out_dtype or dtype)


def _in_type_of_x(arrays: dict[str, Any], name: str) -> np.ndarray:
    """Matrices as float32; what codes stand for is rounded to x's type before."""
    if f"{name}_scales" not in arrays:
        return np.asarray(arrays[name].astype(np.float32))
    exact = moe.decoded(arrays[name], arrays[f"{name}_scales"], np.float32)
    return rounded(exact, str(arrays["x"].dtype)).astype(np.float32)


def coded_experts(arrays: dict[str, Any], dtype: str, block: tuple[int, int]) -> dict[str, Any]:
    """The same experts as codes, with a scale for each block of so many rows and columns (0: all)."""
    found, largest = dict(arrays), {"int8": 127, "float8_e4m3fn": 448}[dtype]
    for name in ("gate", "up", "down"):
        experts, rows, cols = arrays[name].shape
        height, width = block[0] or rows, block[1] or cols
        blocks = arrays[name].astype(np.float32).reshape(experts, rows // height, height, cols // width, width)
        scales = np.abs(blocks).max(axis=(2, 4)) / np.float32(largest)
        codes = blocks / scales[:, :, None, :, None]
        codes = np.rint(codes) if dtype == "int8" else codes
        found |= {name: rounded(codes.reshape(arrays[name].shape), dtype), f"{name}_scales": scales}
    return found


def routing_options(case: RouteCase) -> dict[str, Any]:
    """The options of `route` for the case."""
    names = ("scores", "normalize", "scale", "num_groups", "top_groups")
    return {name: getattr(case, name) for name in names}


def routing_arrays(case: RouteCase, dtype: str, levels: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits and perhaps a bias; `levels` per unit makes equal ones."""
    random = np.random.default_rng([case.tokens, case.experts])
    logits = 2 * random.standard_normal((case.tokens, case.experts))
    bias = random.standard_normal(case.experts).astype(np.float32) * np.float32(0.1) if case.bias else None
    if levels:
        logits = np.round(logits * levels) / levels
        bias = None if bias is None else np.zeros_like(bias)
    return rounded(logits, dtype), bias
