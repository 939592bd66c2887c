"""linear on the CPU: strips of two packed panels of 16 weight rows against tiles of a few activation rows.

Native: linear.h, dots.h, weight.h.

Quantized weights meet activations as integers of 8 or 16 bits (`precision`), a scale per 32 columns, exact sums
between scales; float weights meet float32. Wins always. Bound: at one token the weights' bytes, each read once and in
order; with many tokens the dot instructions. With AVX-512 a block of 32 columns is 8 of them per token and panel (of 16
bits 16), and two float instructions on the same ports, three with a min: of the int8 roof at most 80 and 73 %, and of
its half, which is what 16 bits leave, 89 and 84 %. Measured from cache, 32 tokens, Q4_0 and Q4_1: 76 and 69 %, 86 and
81 % (Zen 4, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.kernels import cpu
from headrace.kernels.arrays import empty_like
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of

PackedWeight = native.PackedWeight
LEVELS = ("portable", "avx2", "avx512", "amx")  # that have code of their own


def pack(raw: np.ndarray, format_name: str, rows: int, cols: int, pool: native.Pool | None = None) -> PackedWeight:
    """The matrix in panels, from the bytes a file holds."""
    return native.pack(pool or cpu.default_pool(), format_name, rows, cols, raw)


def run(
    level: str,
    x: Any,
    weights: Sequence[PackedWeight],
    biases: Sequence[Any],
    residual: Any,
    outs: Sequence[Any] | None,
    precision: int,
    norm: Any = None,
    eps: float = 0.0,
) -> list[Any]:
    outs = outs or [empty_like(x, (x.shape[0], weight.shape[0]), "float32") for weight in weights]
    parts = [
        native.LinearPart(
            weight,
            as_tensor(out, "out"),
            None if bias is None else as_tensor(bias, "bias"),
            None if residual is None else as_tensor(residual, "residual"),
        )
        for weight, bias, out in zip(weights, biases, outs, strict=True)
    ]
    native.linear(runner_of(x), level, _input(x, precision, norm, eps), parts)
    return list(outs)


def run_gated(
    level: str,
    x: Any,
    gate: PackedWeight,
    up: PackedWeight,
    out: Any,
    precision: int,
    norm: Any = None,
    eps: float = 0.0,
) -> Any:
    out = empty_like(x, (x.shape[0], gate.shape[0]), "float32") if out is None else out
    native.linear_gated(runner_of(x), level, _input(x, precision, norm, eps), gate, up, as_tensor(out, "out"))
    return out


def _input(x: Any, precision: int, norm: Any, eps: float) -> native.LinearInput:
    return native.LinearInput(as_tensor(x, "x"), precision, None if norm is None else as_tensor(norm, "norm"), eps)
