"""merge_attention on the CPU: rows shared out over threads, each part read once (native: merge.h, op_merge.cpp).

Wins always: it is the only one. Bound: reading the parts.
Error: float32 weights (the exponential within 2.5e-7) and sums; float64 throughout where the parts are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor, runner_of


def run(level: str, outs: Sequence[Any], lses: Sequence[Any], *, out: Any, lse: Any, sinks: Any) -> None:
    """Writes the whole to `out` and `lse`."""
    native.merge_attention(
        runner_of(*outs),
        level,
        outs=[as_tensor(part, f"parts[{i}].out") for i, part in enumerate(outs)],
        lses=[as_tensor(part, f"parts[{i}].lse") for i, part in enumerate(lses)],
        out=as_tensor(out, "out"),
        lse=as_tensor(lse, "lse"),
        sinks=None if sinks is None else as_tensor(sinks, "sinks"),
    )
