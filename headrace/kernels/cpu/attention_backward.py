"""attention_backward on the CPU: scores recomputed from lse, one schedule (native: op_attention_backward.cpp,
attention_backward*.h).

Wins always: it is the only one. Bound: multiply-adds, five products where the forward has two.
Error: with "fp32" all products and sums are float32, the exponential is within 2.5e-7; with "bf16" queries, keys,
values, d_out, weights and slopes are rounded to bfloat16, sums are float32; "fp64" is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of


def run(level: str, arrays: Mapping[str, Any], options: Mapping[str, Any], *, arithmetic: str) -> None:
    """Fills arrays["d_query"], ["d_key"], ["d_value"] and, with sinks, ["d_sinks"]."""
    tensors = {name: as_tensor(array, name) for name, array in arrays.items() if array is not None}
    kept = {name: value for name, value in options.items() if name != "batch_invariant"}  # it always is
    native.attention_backward(runner_of(arrays["query"]), level, **tensors, **kept, arithmetic=arithmetic)
