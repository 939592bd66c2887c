"""Native kernels for the CPU: the instruction set in force, the pool that runs them, whether they are built at all.

The extension `_native` is imported when it is first needed: on a machine with a GPU headrace.ops works without it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import TracebackType
from typing import TYPE_CHECKING

from headrace.errors import ArgumentError

if TYPE_CHECKING:
    from headrace.kernels.cpu import _native as native

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

_limits = [ISAS.index("amx")]  # a stack: the last one is in force


@functools.cache
def built() -> bool:
    """Whether this installation has the native extension."""
    return importlib.util.find_spec(f"{__name__}._native") is not None


@functools.cache
def _best() -> int:
    from headrace.kernels.cpu import _native as native

    return ISAS.index(native.best_isa())


def best_isa() -> str:
    """The highest level this CPU can run, whatever the limit."""
    return ISAS[_best()]


def isa() -> str:
    """The level kernels are chosen at now: the CPU's best, or the limit set by `limit_isa`."""
    return ISAS[min(_best(), _limits[-1])]


class limit_isa:
    """Keeps kernels at or below an instruction set, from now on; as a context manager, until the block ends.

    The level: "portable", "avx2", "avx512", "avx512_bf16" or "amx". What was recorded before keeps its kernels.
    """

    def __init__(self, level: str) -> None:
        if level not in ISAS:
            raise ArgumentError(f"level: expected one of {', '.join(ISAS)}, got {level!r}")
        _limits.append(ISAS.index(level))

    def __enter__(self) -> limit_isa:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _limits.pop()


@functools.cache
def default_pool() -> native.Pool:
    """The pool of calls that bring none: one thread per usable core. Made on first use, and anew after a fork."""
    from headrace.kernels.cpu.nodes import make_pool

    return make_pool()


if hasattr(os, "register_at_fork"):
    # A forked child has the pool's memory but none of its threads.
    os.register_at_fork(after_in_child=default_pool.cache_clear)
