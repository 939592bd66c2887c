"""rms_norm(x [tokens, dim], weight [dim]) -> [tokens, dim]

    y[t, i] = x[t, i] * weight[i] / sqrt(mean_j(x[t, j]^2) + eps)
    rms_norm_quantized: codes [tokens, dim] of y / scales [tokens], scales[t] = max_i |y[t, i]| / (127 or 448)

Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, check_writable, dtype_name, empty_like, shape_of
from headrace.ops import gpu_rows
from headrace.ops.kv_formats import quantize
from headrace.ops.late import late
from headrace.ops.per_isa import per_isa, row_by_row
from headrace.ops.per_numpy import numpy_kernel
from headrace.ops.select import Kernel, Request, Traffic, choose, placed

DTYPES = ("float32", "float16", "bfloat16")
CODES = ("int8", "float8_e4m3fn")


@dataclass(frozen=True)
class QuantizedRows:
    """Rows as codes [tokens, dim] times a float32 scale [tokens] each: what `kv_formats.py` makes of them."""

    codes: Any
    scales: Any


def rms_norm(
    x: Any,
    weight: Any,
    *,
    eps: float = 1e-6,
    residual: Any = None,
    out: Any = None,
    out_dtype: str | None = None,
    kernel: str | None = None,
) -> Any:
    """Rows of x scaled to unit root mean square, times weight.

    x: [tokens, dim] float32, float16 or bfloat16; weight: [dim] float32; out: the like of x in `out_dtype` (x's own
    when not given), written in place when given. residual: [tokens, dim] of any of these types; x is added to it, in
    place and in its type, and the sum is what is normalized. Arithmetic is float32. Raises ArgumentError for shapes and
    dtypes that do not fit, KernelError when the kernel asked for cannot run.
    """
    shape = shape_of(x, "x")
    out_dtype = out_dtype or dtype_name(x if out is None else out)
    asked = placed(request(shape, dtype_name(x), out_dtype), x)
    given = {"x": x, "weight": weight, "residual": residual, "out": out}
    check_same_device({name: array for name, array in given.items() if array is not None})
    _check(asked, shape_of(weight, "weight"), eps)
    more = _checked_residual(residual, shape)
    return choose(kernels(), asked, kernel).run(x, weight, float(eps), out, out_dtype, **more)


def rms_norm_quantized(
    x: Any,
    weight: Any,
    *,
    eps: float = 1e-6,
    residual: Any = None,
    dtype: str = "int8",
    kernel: str | None = None,
) -> QuantizedRows:
    """rms_norm in int8 or float8_e4m3fn, each row over a scale of its own: what products with narrow types start from.

    x, weight, residual: as for rms_norm. A row of zeros has scale 0, one with a number that is not finite scale NaN;
    the codes of both are 0. Raises ArgumentError and KernelError as rms_norm does.
    """
    shape = shape_of(x, "x")
    asked = placed(quantized_request(shape, dtype_name(x), dtype), x)
    check_same_device({"x": x, "weight": weight} | ({} if residual is None else {"residual": residual}))
    _check(request(shape, dtype_name(x)), shape_of(weight, "weight"), eps)
    if dtype not in CODES:
        raise ArgumentError(f"dtype: expected one of {', '.join(CODES)}, got {dtype!r}")
    chosen = choose(quantized_kernels(), asked, kernel)
    found = QuantizedRows(empty_like(x, shape, dtype), empty_like(x, shape[:1], "float32"))
    chosen.run(x, weight, float(eps), found.codes, found.scales, **_checked_residual(residual, shape))
    return found


def reference(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """The formula in float64."""
    x = x.astype(np.float64)
    return x * weight.astype(np.float64) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def quantized_reference(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6, dtype: str = "int8") -> QuantizedRows:
    """Codes and scales of the formula in float64."""
    codes, scales = quantize(reference(x, weight, eps), dtype)
    return QuantizedRows(codes, scales)


def request(shape: tuple[int, ...], dtype: str = "float32", out_dtype: str = "float32") -> Request:
    """The request of a call, from its shape alone: x and y cross memory once, 4 operations per element."""
    elements = math.prod(shape)
    width = {"float32": 4}
    num_bytes = elements * (width.get(dtype, 2) + width.get(out_dtype, 2)) + 4 * (shape[-1] if shape else 0)
    return Request("rms_norm", {"x": shape}, {"x": dtype, "out": out_dtype}, Traffic(num_bytes, 4 * elements))


def quantized_request(shape: tuple[int, ...], dtype: str = "float32", codes: str = "int8") -> Request:
    """The request of rms_norm_quantized: codes are one byte."""
    elements = math.prod(shape)
    num_bytes = elements * (5 if dtype == "float32" else 3) + 4 * sum(shape)
    return Request("rms_norm_quantized", {"x": shape}, {"x": dtype, "codes": codes}, Traffic(num_bytes, 7 * elements))


def _check(asked: Request, weight_shape: tuple[int, ...], eps: float) -> None:
    shape = asked.shapes["x"]
    if len(shape) != 2 or shape[1] < 1:
        raise ArgumentError(f"x: expected [tokens, dim] with dim >= 1, got {list(shape)}", "x.reshape(-1, dim)")
    for name, dtype in asked.dtypes.items():
        if dtype not in DTYPES:
            raise ArgumentError(f"{name}: expected a dtype among {', '.join(DTYPES)}, got {dtype}")
    check_norm(shape, weight_shape, eps)


def _checked_residual(residual: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    if residual is None:
        return {}
    if tuple(shape_of(residual, "residual")) != tuple(shape) or dtype_name(residual) not in DTYPES:
        got = f"{dtype_name(residual)} {list(residual.shape)}"
        raise ArgumentError(f"residual: expected {list(shape)} of {', '.join(DTYPES)}, got {got}")
    check_writable(residual, "residual")
    return {"residual": residual}


def check_norm(shape: tuple[int, ...], weight_shape: tuple[int, ...], eps: float, name: str = "weight") -> None:
    """ArgumentError for a weight or an eps that no norm of x [tokens, dim] has."""
    if weight_shape != shape[1:]:
        raise ArgumentError(f"{name}: expected [{shape[1]}], got {list(weight_shape)}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ArgumentError(f"eps: expected a finite number >= 0, got {eps}")


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first run."""
    return *gpu_rows.norm_kernels(), *per_isa(late("headrace.kernels.cpu.norm"), plan=row_by_row)


@functools.cache
def quantized_kernels() -> tuple[Kernel, ...]:
    """The kernels of rms_norm_quantized."""
    portable = numpy_kernel("numpy_norm_quantized", "headrace.kernels.numpy.norm", "run_quantized")
    return *gpu_rows.quantized_norm_kernels(), portable
