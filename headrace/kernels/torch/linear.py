"""linear through torch's matmul: many rows of x, where arithmetic binds and the weights' bytes do not.

Computes what kernels/triton/linear.py computes. Wins above 32 rows, and of 16-bit weights wherever torch's library is
better. Quantized weights become numbers in memory first, at most 64 million at a time, then torch multiplies; a weight
in x's own type is taken as it lies. Products in x's type, sums in float32 (that is the library's promise); of float32 x
IEEE float32 in "auto" and "exact", bf16 in "fast". Source: torch.mm. Not measured yet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from headrace.kernels.device_weight import DeviceWeight
from headrace.kernels.torch.float32 import whole_float32

_MOST_NUMBERS = 1 << 26


def run(
    x: torch.Tensor,
    weights: Sequence[DeviceWeight],
    biases: Sequence[Any],
    residual: Any,
    outs: Sequence[Any] | None,
    precision: str,
    norm: Any = None,
    eps: float = 0.0,
) -> list[torch.Tensor]:
    """The products of x with all weights."""
    outs = outs or [torch.empty((len(x), weight.shape[0]), dtype=torch.float32, device=x.device) for weight in weights]
    x = x if norm is None else _normed(x, norm, eps)
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        _product(x, weight, precision, out)
        for added in (bias, residual):
            if added is not None:
                out += added
    return list(outs)


def run_gated(
    x: torch.Tensor, gate: DeviceWeight, up: DeviceWeight, out: Any, precision: str, norm: Any = None, eps: float = 0.0
) -> torch.Tensor:
    """silu(x gate^T) * (x up^T)."""
    left, right = run(x, [gate, up], [None, None], None, None, precision, norm, eps)
    product = torch.nn.functional.silu(left) * right
    return product if out is None else out.copy_(product)


def _normed(x: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """rms_norm in float32, rounded to x's type."""
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm).to(x.dtype)


def _product(x: torch.Tensor, weight: DeviceWeight, precision: str, out: torch.Tensor) -> None:
    operand = operand_dtype(x, weight, precision)
    x = x.to(operand)
    if weight.layout.values == "float" and weight.codes.dtype == operand:
        _multiply(x, weight.codes[:, : weight.shape[1]], out)
        return
    step = max(1, _MOST_NUMBERS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        _multiply(x, numbers(weight, rows, operand), out[:, rows])


def operand_dtype(x: torch.Tensor, weight: DeviceWeight, precision: str) -> torch.dtype:
    """What torch multiplies."""
    if x.dtype != torch.float32:
        same = weight.layout.values == "float" and weight.codes.dtype == x.dtype
        narrow = precision != "exact" and weight.codes.dtype != torch.float32
        return x.dtype if same or narrow else torch.float32
    return torch.bfloat16 if precision == "fast" else torch.float32


def numbers(weight: DeviceWeight, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight in that type, made by one launch where Triton is there and the weight on a GPU."""
    if weight.codes.is_cuda and weight.layout.values != "float" and importlib.util.find_spec("triton"):
        from headrace.kernels.triton.dequantize import dequantized

        return dequantized(weight, rows, dtype)
    from headrace.kernels.triton.weight import dequantize

    return dequantize(weight, rows).to(dtype)


def _multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = x weight^T."""
    if x.dtype == torch.float32 or not x.is_cuda:
        with whole_float32():
            out.copy_(x.to(torch.float32) @ weight.to(torch.float32).T)
    elif out.dtype == x.dtype:
        out.copy_(x @ weight.T)
    else:
        out.copy_(torch.mm(x, weight.T, out_dtype=torch.float32))
