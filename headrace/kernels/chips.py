"""Whose tiles a GPU takes: kernels have tables for a few chips; each generation goes by its own or by one like it."""

from __future__ import annotations

# Every NVIDIA chip whose blocks have no more than 99 KB of shared memory, consumers' cards of later generations too.
LITTLE_MEMORY = "sm_86"
_OF_NVIDIA = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100", "sm_110": "sm_100"}


def chip_like(arch: str) -> str:
    """ "sm_80", "sm_86", "sm_90", "sm_100" or "gfx942", by the generation; "" is where none was named: Hopper's."""
    if arch.startswith("gfx"):
        return "gfx942"
    return _OF_NVIDIA.get(arch or "sm_90", LITTLE_MEMORY)
