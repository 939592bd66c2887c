"""rope_table on the CPU: cosines and sines once per step for all layers (native: op_rope.cpp).

Wins always: it is the only one. Bound: libm's sine and cosine.
Error: angles are float64, so that a table entry is one float32 rounding off at any position.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.arrays import empty_like
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of


def run_table(level: str, positions: Any, inverse_frequencies: Any, magnitude: float, out: Any) -> Any:
    width = 2 * inverse_frequencies.shape[0]
    out = empty_like(positions, (positions.shape[0], width), "float32") if out is None else out
    frequencies = as_tensor(inverse_frequencies, "inverse_frequencies")
    native.rope_table(
        runner_of(positions), as_tensor(out, "out"), as_tensor(positions, "positions"), frequencies, magnitude
    )
    return out
