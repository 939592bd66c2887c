"""append_pages on the CPU: one pass over a token's queries, keys and values (native: op_append.cpp, append.h).

Wins always: it is the only one. Bound: memory; a head stays in L1 between norm, rotation, scale and conversion.
Error: norm and rotation in float32; a code is the nearest to the float32 quotient of number and scale, ties to even, so
without norm and rotation codes and scales are the reference's bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of


def run(level: str, arrays: Mapping[str, Any], interleaved: bool, eps: float, spread: bool = False) -> None:
    """Writes to the pages, the scales and `out` among the arrays."""
    tensors = {name: as_tensor(array, name) for name, array in arrays.items()}
    if "out" in tensors:
        tensors["query_out"] = tensors.pop("out")
    native.append_pages(runner_of(*arrays.values()), level, interleaved=interleaved, spread=spread, eps=eps, **tensors)
