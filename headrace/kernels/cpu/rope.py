"""rope on the CPU: a table of cosines and sines once per step, then per layer one pass over queries, keys and values
(native: op_rope.cpp, rope.h).

Wins always: it is the only one. Bound: memory; a head stays in L1 between norm, rotation and conversion.
Error: angles are float64, so that a table entry is one float32 rounding off at any position.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, empty_like, runner_of


def run_table(level: str, positions: Any, inverse_frequencies: Any, magnitude: float, out: Any) -> Any:
    width = 2 * inverse_frequencies.shape[0]
    out = empty_like(positions, (positions.shape[0], width), "float32") if out is None else out
    frequencies = as_tensor(inverse_frequencies, "inverse_frequencies")
    native.rope_table(
        runner_of(positions), as_tensor(out, "out"), as_tensor(positions, "positions"), frequencies, magnitude
    )
    return out


def run_append(level: str, arrays: dict[str, Any], interleaved: bool, eps: float) -> Any:
    tensors = {name: None if array is None else as_tensor(array, name) for name, array in arrays.items()}
    tensors["query_out"] = tensors.pop("out")
    native.rope_append(runner_of(arrays["query"]), level, interleaved=interleaved, eps=eps, **tensors)
    return arrays["out"]
