"""mixture_of_experts(x [tokens, dim], gate, up, down, routing) -> [tokens, dim]; route(logits [tokens, experts])

    y[t] = sum_k weights[t, k] * down[e] (act(gate[e] x[t]) * (up[e] x[t]))  (+ residual[t]),  e = experts[t, k]
    route:  s = softmax(logits) or sigmoid(logits);  chosen are the top_k experts of largest s + bias, of equal ones the
            lowest number, best first; with groups only experts of the top_groups groups whose two largest s + bias sum
            highest;  weights = s of the chosen, over their sum if normalize, times scale

gate, up: [experts, ffn_dim, dim], down: [experts, dim, ffn_dim]: slices of one tensor do. Experts may be int8 or float8
codes with scales: gate_scales [experts, ffn_dim / r, dim / c] of blocks of r rows and c columns, and so on. Experts
numbered outside 0 .. experts - 1 add nothing: they live on another device. Shared experts are a linear op's.

Shazeer et al. 2017, "Outrageously large neural networks"; Jiang et al. 2024, "Mixtral of experts"; DeepSeek-AI 2024,
"DeepSeek-V3", for sigmoid scores, biases that balance and groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, dtype_name, empty_like, numpy_dtype, shape_of
from headrace.ops import gpu_moe
from headrace.ops.per_numpy import numpy_kernel
from headrace.ops.select import Kernel, Request, Traffic, choose, placed
from headrace.ops.tracked import needs_torch

DTYPES = ("float32", "float16", "bfloat16")
CODES = ("int8", "float8_e4m3fn")
SCALE_COLS = 128  # columns that share a scale are a multiple of these, or all
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SCORES = ("softmax", "sigmoid")
PRECISIONS = ("auto", "exact", "fast")
MOST_EXPERTS = 1024
_WEIGHTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and what each counts: int32 and float32 [tokens, top_k]."""

    experts: Any
    weights: Any


@dataclass(frozen=True)
class RoutingOptions:
    """How `route` chooses. top_groups of num_groups groups of neighbouring experts."""

    top_k: int
    scores: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


def route(
    logits: Any,
    top_k: int,
    *,
    scores: str = "softmax",
    bias: Any = None,
    normalize: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int | None = None,
    kernel: str | None = None,
) -> Routing:
    """The experts of each token and their weights.

    logits: [tokens, experts] float32, float16 or bfloat16; bias: [experts] float32, counts for the choice alone;
    num_groups: equal parts of the experts, of which the best top_groups are chosen from. Raises ArgumentError for what
    does not fit.
    """
    options: dict[str, Any] = {"scores": scores, "normalize": bool(normalize), "scale": float(scale)}
    options |= {"num_groups": num_groups, "top_groups": top_groups}
    if needs_torch(logits, bias):
        from headrace.ops import torch_moe

        return torch_moe.route(logits, bias, top_k=top_k, **options, kernel=kernel)
    return routed(logits, bias=bias, top_k=top_k, **options, kernel=kernel)


def routed(logits: Any, *, bias: Any, top_k: int, top_groups: int | None, kernel: str | None, **given: Any) -> Routing:
    """`route` by a kernel, without torch's operator."""
    shape = shape_of(logits, "logits")
    options = RoutingOptions(top_k, **given, top_groups=top_groups or given["num_groups"])
    _check_routing(shape, dtype_name(logits), None if bias is None else shape_of(bias, "bias"), options)
    check_same_device({"logits": logits} | ({} if bias is None else {"bias": bias}))
    chosen = choose(routing_kernels(), placed(routing_request(shape, dtype_name(logits)), logits), kernel)
    experts, weights = (empty_like(logits, (shape[0], top_k), dtype) for dtype in ("int32", "float32"))
    chosen.run(logits, bias, experts, weights, options)
    return Routing(experts, weights)


def mixture_of_experts(
    x: Any,
    gate: Any,
    up: Any,
    down: Any,
    routing: Routing,
    *,
    activation: str = "silu",
    gate_scales: Any = None,
    up_scales: Any = None,
    down_scales: Any = None,
    residual: Any = None,
    out: Any = None,
    out_dtype: str | None = None,
    precision: str = "auto",
    deterministic: bool = False,
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> Any:
    """Each token's experts of x, weighted and added up, plus residual where given.

    x: [tokens, dim]; gate, up: [experts, ffn_dim, dim]; down: [experts, dim, ffn_dim], all of x's type, or of 16 bits
    where x is float32, or all int8 or float8_e4m3fn with scales, float32: one per row, [experts, rows, 1], or of blocks
    whose columns are multiples of 128; routing: from `route`, or any int32 and float32 arrays [tokens, top_k].
    activation: "silu", "gelu" (by the error function) or "gelu_tanh". residual: [tokens, dim]; out: [tokens, dim] in
    `out_dtype`, x's own when not given, may be residual. precision: "exact" sums float32 in float32; "fast" may round
    it to tf32.
    deterministic: a token's bits depend on nothing else in the batch, where a kernel can do that. Raises
    ArgumentError for what does not fit, KernelError where no kernel, or not the one asked for, has what is required.
    """
    arrays = {"x": x, "gate": gate, "up": up, "down": down, "experts": routing.experts, "weights": routing.weights}
    more = {"gate_scales": gate_scales, "up_scales": up_scales, "down_scales": down_scales, "residual": residual}
    arrays |= {name: array for name, array in more.items() if array is not None}
    options: dict[str, Any] = {"activation": activation, "precision": precision, "deterministic": bool(deterministic)}
    options |= {"out_dtype": out_dtype, "kernel": kernel, "require": require}
    if needs_torch(*arrays.values()):
        from headrace.ops import torch_moe

        return torch_moe.mixture_of_experts(arrays, out=out, **options)
    return mixed(arrays, out=out, **options)


def mixed(
    given: Mapping[str, Any],
    *,
    out: Any = None,
    out_dtype: str | None,
    kernel: str | None,
    require: Sequence[str],
    **options: Any,
) -> Any:
    """`mixture_of_experts` by a kernel, without torch's operator; `given`: the arrays there are."""
    arrays = dict(given) | ({} if out is None else {"out": out})
    shapes = {name: shape_of(array, name) for name, array in arrays.items()}
    dtypes = {name: dtype_name(array) for name, array in arrays.items()}
    dtypes["out"] = dtypes.get("out") or out_dtype or dtypes["x"]
    check_same_device(arrays)
    asked = placed(request(shapes, dtypes, options), arrays["x"])
    chosen = choose(kernels(), asked, kernel, require)
    if out is None:
        arrays["out"] = empty_like(arrays["x"], shapes["x"], dtypes["out"])
    chosen.run(arrays, options)
    return arrays["out"]


def request(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], options: Mapping[str, Any] | None = None
) -> Request:
    """The request of a call, by its checks. Of the experts as many are read as the pairs can reach, each once."""
    options = {"activation": "silu", "precision": "auto", "deterministic": False} | dict(options or {})
    _check(shapes, dtypes, options)
    (tokens, dim), (num_experts, ffn_dim, _), top_k = shapes["x"], shapes["gate"], shapes["experts"][1]
    pairs = tokens * top_k
    # Each of `pairs` draws meets an expert; evenly spread, this many are met at all.
    met = num_experts * (1 - (1 - top_k / num_experts) ** tokens) if num_experts else 0
    num_bytes = met * 3 * ffn_dim * dim * _width(dtypes["gate"]) + 2 * pairs * ffn_dim * _width(dtypes["x"])
    num_bytes += tokens * dim * (_width(dtypes["x"]) + _width(dtypes["out"]))
    unit = "bf16" if dtypes["x"] != "float32" else "fp32"
    traffic = Traffic(round(num_bytes), 6 * pairs * dim * ffn_dim, unit)
    return Request("mixture_of_experts", shapes, dtypes, traffic, options)


def _width(dtype: str) -> int:
    return numpy_dtype(dtype).itemsize


def routing_request(shape: tuple[int, ...], dtype: str = "float32") -> Request:
    """The request of a choice: each logit is read once."""
    elements = math.prod(shape)
    return Request("route", {"logits": shape}, {"logits": dtype}, Traffic(elements * _width(dtype), 20 * elements))


# References


def reference(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, routing: Routing, *, activation: str = "silu"
) -> np.ndarray:
    """The formula in float64."""
    y = np.zeros(x.shape)
    for token, place in np.ndindex(*routing.experts.shape):
        expert = routing.experts[token, place]
        if 0 <= expert < len(gate):
            row, *matrices = (part.astype(np.float64) for part in (x[token], gate[expert], up[expert], down[expert]))
            y[token] += routing.weights[token, place] * expert_of(row, *matrices[:3], activation=activation)
    return y


def expert_of(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, *, activation: str) -> np.ndarray:
    """One expert of rows [..., dim], in the type of its arguments."""
    return (activated(x @ gate.T, activation) * (x @ up.T)) @ down.T


def activated(x: np.ndarray, activation: str) -> np.ndarray:
    """The activation of each number, in x's type."""
    with np.errstate(over="ignore"):
        if activation == "silu":
            return x / (1 + np.exp(-x))
        if activation == "gelu":
            return (0.5 * x * (1 + _ERF(x * math.sqrt(0.5)))).astype(x.dtype)
        return x / (1 + np.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)))


_ERF = np.vectorize(math.erf, otypes=[np.float64])


def decoded(codes: np.ndarray, scales: np.ndarray | None, dtype: Any = np.float64) -> np.ndarray:
    """Matrices [experts, rows, cols] that codes and the scales of their blocks stand for."""
    if scales is None:
        return codes.astype(dtype)
    rows, cols = (n // m for n, m in zip(codes.shape[1:], scales.shape[1:], strict=True))
    found: np.ndarray = codes.astype(dtype) * np.repeat(np.repeat(scales, rows, axis=1), cols, axis=2).astype(dtype)
    return found


def routing_reference(
    logits: np.ndarray, options: RoutingOptions, bias: Any = None, dtype: Any = np.float64
) -> Routing:
    """The choice by sorting, in float64."""
    x = logits.astype(dtype)
    scores = 1 / (1 + np.exp(-x))
    if options.scores == "softmax":
        scores = np.exp(x - x.max(axis=1, keepdims=True, initial=-np.inf))
        scores /= scores.sum(axis=1, keepdims=True)
    keys = scores if bias is None else scores + bias.astype(dtype)
    if options.top_groups < options.num_groups:
        groups = keys.reshape(len(keys), options.num_groups, -1)
        best = np.argsort(-np.sort(groups, axis=2)[:, :, -2:].sum(axis=2), axis=1, kind="stable")
        kept = np.zeros(groups.shape[:2], bool)
        np.put_along_axis(kept, best[:, : options.top_groups], True, axis=1)
        keys = np.where(kept[:, :, None], groups, -np.inf).reshape(keys.shape)
    experts = np.argsort(-keys, axis=1, kind="stable")[:, : options.top_k]
    weights = np.take_along_axis(scores, experts, axis=1)
    if options.normalize:
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total > 0, total, 1)
    return Routing(experts.astype(np.int32), weights * dtype(options.scale))


# Checks


def _check_routing(shape: tuple[int, ...], dtype: str, bias: tuple[int, ...] | None, options: RoutingOptions) -> None:
    if len(shape) != 2 or not 1 <= shape[1] <= MOST_EXPERTS:
        raise ArgumentError(f"logits: expected [tokens, experts] with 1 to {MOST_EXPERTS} experts, got {list(shape)}")
    if dtype not in DTYPES:
        raise ArgumentError(f"logits: expected a dtype among {', '.join(DTYPES)}, got {dtype}")
    if options.scores not in SCORES:
        raise ArgumentError(f"scores: expected one of {', '.join(SCORES)}, got {options.scores!r}")
    if bias not in (None, shape[1:]):
        raise ArgumentError(f"bias: expected [{shape[1]}], got {list(bias or ())}")
    if not math.isfinite(options.scale):
        raise ArgumentError(f"scale: expected a finite number, got {options.scale}")
    if options.num_groups < 1 or shape[1] % options.num_groups:
        raise ArgumentError(f"num_groups: expected a divisor of {shape[1]} experts, got {options.num_groups}")
    if not 1 <= options.top_groups <= options.num_groups:
        raise ArgumentError(f"top_groups: expected 1 to {options.num_groups}, got {options.top_groups}")
    most = shape[1] // options.num_groups * options.top_groups
    if not 1 <= options.top_k <= most:
        raise ArgumentError(f"top_k: expected 1 to {most}, the experts that may be chosen, got {options.top_k}")


def _check(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], options: Mapping[str, Any]) -> None:
    for name, known in (("activation", ACTIVATIONS), ("precision", PRECISIONS)):
        if options[name] not in known:
            raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {options[name]!r}")
    if len(shapes["x"]) != 2 or shapes["x"][1] < 1:
        raise ArgumentError(f"x: expected [tokens, dim] with dim >= 1, got {list(shapes['x'])}", "x.reshape(-1, dim)")
    if len(shapes["gate"]) != 3 or shapes["gate"][0] < 1 or shapes["gate"][1] < 1:
        raise ArgumentError(f"gate: expected [experts, ffn_dim, dim], got {list(shapes['gate'])}")
    if len(shapes["experts"]) != 2 or shapes["experts"][1] < 1:
        raise ArgumentError(f"routing.experts: expected [tokens, top_k], got {list(shapes['experts'])}")
    (tokens, dim), (num_experts, ffn_dim, _) = shapes["x"], shapes["gate"]
    expected = {"gate": (num_experts, ffn_dim, dim), "down": (num_experts, dim, ffn_dim), "out": shapes["x"]}
    expected |= {"up": expected["gate"], "residual": shapes["x"], "experts": (tokens, shapes["experts"][1])}
    expected["weights"] = expected["experts"]
    for name, shape in expected.items():
        if name in shapes and tuple(shapes[name]) != tuple(shape):
            raise ArgumentError(f"{_told(name)}: expected {list(shape)}, got {list(shapes[name])}")
    _check_dtypes(dtypes)
    for name in _WEIGHTS:
        _check_scales(name, shapes[name], shapes.get(f"{name}_scales"), dtypes)


def _check_dtypes(dtypes: Mapping[str, str]) -> None:
    for name in ("x", "residual", "out"):
        if dtypes.get(name, "float32") not in DTYPES:
            raise ArgumentError(f"{name}: expected a dtype among {', '.join(DTYPES)}, got {dtypes[name]}")
    for name in _WEIGHTS:
        allowed = (*(DTYPES if dtypes["x"] == "float32" else (dtypes["x"],)), *CODES)
        if dtypes[name] not in allowed or dtypes[name] != dtypes["gate"]:
            hint = "dequantize experts in other types first; matrices of one expert can stay so in ops.linear"
            told = dtypes["gate"] if dtypes["gate"] in allowed else " or ".join(allowed)
            raise ArgumentError(f"{name}: expected {told}, as x and gate are, got {dtypes[name]}", hint)
    for name, expected in (("experts", "int32"), ("weights", "float32")):
        if dtypes[name] != expected:
            raise ArgumentError(f"{_told(name)}: expected {expected}, got {dtypes[name]}")


def _check_scales(name: str, shape: tuple[int, ...], scales: tuple[int, ...] | None, dtypes: Mapping[str, str]) -> None:
    coded = dtypes[name] in CODES
    if coded != (scales is not None):
        expected, got = ("some", "none") if coded else ("none", "some")
        raise ArgumentError(f"{name}_scales: expected {expected} for {dtypes[name]} experts, got {got}")
    if scales is None:
        return
    whole = (
        len(scales) == 3
        and scales[0] == shape[0]
        and not any(n % max(m, 1) for n, m in zip(shape, scales, strict=True))
    )
    if not whole or 0 in scales or (scales[2] > 1 and shape[2] // scales[2] % SCALE_COLS):
        text = f"[{shape[0]}, {shape[1]} / rows, {shape[2]} / columns of a block], multiples of {SCALE_COLS} or all"
        raise ArgumentError(f"{name}_scales: expected {text}, got {list(scales)}")
    if dtypes[f"{name}_scales"] != "float32":
        raise ArgumentError(f"{name}_scales: expected float32, got {dtypes[f'{name}_scales']}")


def _told(name: str) -> str:
    return f"routing.{name}" if name in ("experts", "weights") else name


# Kernels


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of mixture_of_experts."""
    return *gpu_moe.kernels(), numpy_kernel("numpy_moe", "headrace.kernels.numpy.moe")


@functools.cache
def routing_kernels() -> tuple[Kernel, ...]:
    """The kernels of route."""
    return *gpu_moe.routing_kernels(), numpy_kernel("numpy_route", "headrace.kernels.numpy.moe", "run_route")
