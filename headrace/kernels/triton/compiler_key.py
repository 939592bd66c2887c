"""The key of an installation of Triton, computed once and kept: it is most of a first call whose kernel is compiled.

Triton finds what it has compiled by a hash of all of its own files, which it computes in each process: of some 300 MB,
in a third of a second. The files change when another version is installed, and then their sizes and times do. The key
is Triton's own, so that kernels which others compile in this process are found by it too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from headrace.machine import cache_dir, write_whole

_SOURCES = (".py", ".so")


def remember(cache: ModuleType) -> None:
    """Makes Triton's module of caches remember its key from process to process, if it has one by the known name."""
    computed = getattr(cache, "triton_key", None)
    if computed is not None and cache.__file__:
        root = Path(cache.__file__).resolve().parents[1]
        cache.triton_key = functools.lru_cache(functools.partial(kept_key, root, computed))  # type: ignore[attr-defined]


def kept_key(root: Path, computed: Callable[[], str]) -> str:
    """The key that was kept for these files, or else what is computed, which is then kept."""
    path, stamp = cache_dir() / "triton-key.json", stamp_of(root)
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(path.read_text())
        if kept["stamp"] == stamp and isinstance(kept["key"], str):
            return str(kept["key"])
    key = computed()
    with suppress(OSError):  # a read-only cache is no reason to fail
        write_whole(path, json.dumps({"stamp": stamp, "key": key}))
    return key


def stamp_of(root: Path) -> str:
    """A hash of where the files of a package lie, and of their sizes and times."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(_SOURCES):
                path = os.path.join(folder, name)
                told = os.stat(path)
                found.append((path, told.st_size, told.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()
