"""paged_attention on the CPU: two kernels over one schedule (native: op_attention.cpp, attention_*.h).

Requests with up to 16 query rows per KV head have their keys cut into chunks and merged (decode: bound by reading the
cache); others are cut into tiles of rows (prefill: bound by fp32 multiply-adds). Both in the same call, in any mixture.
Error: scores and sums are float32, the exponential is within 2.5e-7; the cache is converted, never rounded.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of


def run(level: str, arrays: dict[str, Any], window_left: int, scale: float, softcap: float) -> Any:
    tensors = {name: as_tensor(array, name) for name, array in arrays.items()}
    runner = runner_of(arrays["query"])
    native.paged_attention(runner, level, window_left=window_left, scale=scale, softcap=softcap, **tensors)
    return arrays["out"]
