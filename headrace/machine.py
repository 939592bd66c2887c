"""What this machine is: instruction sets, cores, caches, and the roofs that were measured on it.

The roofs (read bandwidth, matrix throughput) are measured once by `measure` and kept on disk; until then the kernel
choice works with the modest figures of `UNMEASURED`, which rank kernels well enough and are never printed as a roof.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

# Per thread, of a small modern core: bytes/s and FLOP/s.
UNMEASURED = {"read": 12e9, "fp32": 60e9, "bf16": 60e9, "int8": 250e9}


@dataclass(frozen=True)
class Machine:
    """Roofs of this machine with all its usable cores, in bytes/s and FLOP/s."""

    roofs: Mapping[str, float]
    measured: bool

    def seconds(self, num_bytes: int, flops: int, unit: str) -> tuple[float, float]:
        """The least time for the bytes and for the arithmetic; the larger binds."""
        return num_bytes / self.roofs["read"], flops / self.roofs[unit]


@functools.cache
def this_machine() -> Machine:
    """The machine with its cached roofs, without measuring anything."""
    return Machine(UNMEASURED, measured=False)
