"""linear(x [tokens, cols], weight [rows, cols]) -> [tokens, rows], for every weight format

    y[t, r] = sum_c x[t, c] * w[r, c]  (+ bias[r])  (+ residual[t, r])
    linear_gated:  y[t, r] = silu(sum_c x[t, c] * gate[r, c]) * sum_c x[t, c] * up[r, c]
    with norm:  x[t] = rms_norm(x[t], norm, eps) first, which then is no pass of its own

Weights are packed once (`pack`) into panels that every instruction set reads; formats are those of ops/formats.py.
precision "fast": quantized weights meet activations in int8, 32 to a scale, as their own format would hold them;
"auto": in 16-bit integers, 32 to a scale: free where the weights' bytes bind;
over AMX tiles, where many tokens make arithmetic bind, in bf16; "exact": float32 activations and sums throughout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import dtype_name, shape_of
from headrace.kernels.cpu.linear import PackedWeight
from headrace.ops.formats import FORMATS, dequantize
from headrace.ops.norm import check_norm
from headrace.ops.select import Kernel, Request, Traffic, choose

PRECISIONS = {"fast": 0, "auto": 1, "exact": 2}  # as the native side counts them
LARGEST = {"fast": 127, "auto": 127 * 256}  # integer that an activation becomes
DTYPES = ("float32", "float16", "bfloat16")
FLOAT_FORMATS = ("F32", "F16", "BF16")


def pack(raw: np.ndarray, format_name: str, shape: tuple[int, int], pool: Any = None) -> PackedWeight:
    """The matrix ready for `linear`, from its bytes in a file: uint8, rows in order, blocks as the format has them.

    Raises ArgumentError when the shape does not fit the format or the bytes.
    """
    from headrace.kernels.cpu import linear

    if format_name not in FORMATS:
        raise ArgumentError(f"format_name: expected one of {', '.join(FORMATS)}, got {format_name!r}")
    return linear.pack(np.ascontiguousarray(raw).reshape(-1).view(np.uint8), format_name, *shape, pool=pool)


def linear(
    x: Any,
    weight: PackedWeight,
    *,
    bias: Any = None,
    residual: Any = None,
    norm: Any = None,
    eps: float = 1e-6,
    out: Any = None,
    precision: str = "auto",
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> Any:
    """x times the transposed weight, plus bias and residual where given.

    x: [tokens, cols] float32, float16 or bfloat16; bias: [rows] float32; residual: [tokens, rows] float32;
    norm: [cols] float32, the weight of an rms_norm of x; out: [tokens, rows], float32 unless given. Raises
    ArgumentError for what does not fit, KernelError where no kernel, or not the one asked for, has what is required.
    """
    outs = None if out is None else [out]
    chosen = choose(kernels(), _checked(x, [weight], precision, norm, eps), kernel, require)
    return chosen.run(x, [weight], [bias], residual, outs, PRECISIONS[precision], norm, float(eps))[0]


def linear_many(
    x: Any,
    weights: Sequence[PackedWeight],
    *,
    biases: Sequence[Any] | None = None,
    norm: Any = None,
    eps: float = 1e-6,
    precision: str = "auto",
    require: Sequence[str] = (),
) -> list[Any]:
    """One product per weight, all of the same x: what x needs (int8) is made once, and the work is shared out once."""
    chosen = choose(kernels(), _checked(x, weights, precision, norm, eps), require=require)
    biases = biases or [None] * len(weights)
    return chosen.run(x, weights, biases, None, None, PRECISIONS[precision], norm, float(eps))


def linear_gated(
    x: Any,
    gate: PackedWeight,
    up: PackedWeight,
    *,
    norm: Any = None,
    eps: float = 1e-6,
    out: Any = None,
    precision: str = "auto",
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> Any:
    """silu(x gate^T) * (x up^T), the two products side by side and never stored."""
    if gate.shape != up.shape:
        raise ArgumentError(f"up: expected the shape of gate {list(gate.shape)}, got {list(up.shape)}")
    chosen = choose(gated_kernels(), _checked(x, [gate, up], precision, norm, eps), kernel, require)
    return chosen.run(x, gate, up, out, PRECISIONS[precision], norm, float(eps))


def reference(x: np.ndarray, raw: np.ndarray, format_name: str) -> np.ndarray:
    """The formula in float64, from the file's bytes [rows, row_bytes]."""
    return x.astype(np.float64) @ dequantize(raw, format_name).astype(np.float64).T


def integer_activations(x: np.ndarray, precision: str) -> np.ndarray:
    """What a row of activations is after a straightforward quantization to integers, 32 to a scale."""
    blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // 32, 32)
    scale = np.max(np.abs(blocks), axis=-1, keepdims=True) / np.float32(LARGEST[precision])
    integers = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (integers * scale).reshape(x.shape)


def request(
    tokens: int, weights: Sequence[tuple[str, int, int]], dtype: str = "float32", precision: str = "auto"
) -> Request:
    """The request of a call: weights as (format, rows, cols). Each weight byte and output crosses memory once."""
    formats = {name for name, _, _ in weights}
    exact = precision == "exact" or formats <= set(FLOAT_FORMATS)
    num_bytes = sum(_format_bytes(*weight) for weight in weights) + 4 * tokens * sum(rows for _, rows, _ in weights)
    flops = sum(2 * tokens * rows * cols for _, rows, cols in weights)
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, weights[0][2])}
    shapes |= {f"weight{i}": weight[1:] for i, weight in enumerate(weights)}
    dtypes = {"x": dtype} | {f"weight{i}": weight[0] for i, weight in enumerate(weights)}
    unit = "fp32" if exact else "int8"
    return Request("linear", shapes, dtypes, Traffic(num_bytes, flops, unit), {"precision": precision})


def _format_bytes(name: str, rows: int, cols: int) -> int:
    return rows * math.ceil(cols / FORMATS[name].block_len) * FORMATS[name].block_bytes


def _checked(x: Any, weights: Sequence[PackedWeight], precision: str, norm: Any, eps: float) -> Request:
    shape = shape_of(x, "x")
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not weights or not all(isinstance(weight, PackedWeight) for weight in weights):
        raise ArgumentError("weight: expected packed weights", "headrace.ops.linear.pack(raw, format, shape)")
    if len(shape) != 2 or any(shape[1] != weight.shape[1] for weight in weights):
        cols = weights[0].shape[1]
        raise ArgumentError(f"x: expected [tokens, {cols}], got {list(shape)}", f"x.reshape(-1, {cols})")
    if dtype_name(x) not in DTYPES:
        raise ArgumentError(f"x: expected a dtype among {', '.join(DTYPES)}, got {dtype_name(x)}")
    if norm is not None:
        check_norm(shape, shape_of(norm, "norm"), eps, name="norm")
    return request(shape[0], [(weight.format, *weight.shape) for weight in weights], dtype_name(x), precision)


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first asked for."""
    from headrace.kernels.cpu import linear

    return _of_levels(linear.run)


@functools.cache
def gated_kernels() -> tuple[Kernel, ...]:
    """The kernels of the gated form."""
    from headrace.kernels.cpu import linear

    return _of_levels(linear.run_gated)


def _of_levels(run: Callable[..., Any]) -> tuple[Kernel, ...]:
    from headrace.kernels.cpu.linear import LEVELS
    from headrace.ops.per_isa import per_isa, row_by_row

    vectors = per_isa(run, LEVELS[:3], plan=row_by_row)
    return *per_isa(run, LEVELS[3:]), *vectors  # over tiles, 16 tokens are computed otherwise than 1
