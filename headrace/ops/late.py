"""Functions of modules that are imported when they are first called: listing an op's kernels imports none of them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def late(module: str, function: str = "run") -> Callable[..., Any]:
    """The function of that name, whose module is imported by its first call."""

    @functools.cache
    def found() -> Callable[..., Any]:
        imported: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return imported

    def run(*args: Any, **options: Any) -> Any:
        return found()(*args, **options)

    return run
