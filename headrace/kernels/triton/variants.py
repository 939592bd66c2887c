"""A kernel as one of the configurations it is launched in: what compiling it ahead of time needs, for any chip.

Each module of kernels has `variants() -> list[Variant]`: every configuration the chooser can pick. They are compiled
for each chip without one at hand, which shows registers, spills, shared memory and the instructions used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A name for people, and what Triton calls it: backend, architecture, threads of a warp.
CHIPS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory a block may have.
SHARED_BYTES: Mapping[str, int] = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Variant:
    """One configuration. The kernel must have been imported without TRITON_INTERPRET to be compiled.

    types: of each argument that is no constexpr, in Triton's spelling: "*bf16", "i32", "fp32", "tensordesc<..>",
    or a tuple of these;
    integers that are always multiples of 16 (strides, as a rule) are named in `aligned`, pointers always are.
    instructions: for a chip, pieces of text that its assembly must hold ("wgmma.mma_async").
    overlapping: products of warpgroups run on while others are issued; ptxas makes each wait for the one before it, and
    says so only in its log, where it cannot follow their registers.
    """

    name: str
    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    chips: tuple[str, ...] = tuple(CHIPS)
    aligned: tuple[str, ...] = ()
    instructions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    overlapping: bool = False
    spills: Mapping[str, int] = field(default_factory=dict)  # bytes allowed on a chip, with the reason beside it
