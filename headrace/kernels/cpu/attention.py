"""attention on the CPU: dense, ragged or paged keys, one schedule (native: op_attention.cpp, attention_*.h).

Requests with few query rows per KV head have their keys cut into chunks and merged (decode: bound by reading the
keys); others are cut into tiles of rows (prefill: bound by multiply-adds). Both in the same call, in any mixture.
Error: with "fp32" scores and sums are float32, the exponential is within 2.5e-7, keys and values are converted, never
rounded; with "bf16" queries, keys, values and weights are rounded to bfloat16, sums are float32; "fp64" is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of


def run(level: str, arrays: Mapping[str, Any], options: Mapping[str, Any], *, arithmetic: str) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    tensors = {name: as_tensor(array, name) for name, array in arrays.items() if array is not None}
    native.attention(runner_of(arrays["query"]), level, **tensors, **options, arithmetic=arithmetic)


def division(
    threads: int, level: str, arrays: Mapping[str, Any], options: Mapping[str, Any], *, arithmetic: str
) -> tuple[int, int, int]:
    """How `run` would divide the call: parts of the item cut most, intervals, bytes of partial results."""
    tensors = {name: as_tensor(array, name) for name, array in arrays.items() if array is not None}
    found: tuple[int, int, int] = native.attention_division(threads, level, **tensors, **options, arithmetic=arithmetic)
    return found
