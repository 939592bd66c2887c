"""Products of float32 that torch makes of float32, whatever the process allows for others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Without tf32 on GPUs. NOTE: the setting is the process's; it is put back.

    torch has an older setting and a newer one, and refuses to compute where they disagree: the one that was used is
    the one that is changed.
    """
    backend = torch.backends.cuda.matmul
    if backend.fp32_precision != "tf32":
        yield
        return
    older = _older_setting()
    _set(older and "highest", "ieee")
    try:
        yield
    finally:
        _set(older, "tf32")


def _older_setting() -> str:
    """ "high" or "medium", or "" where the newer one is in use: then torch answers with an error."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def _set(older: str, newer: str) -> None:
    if older:
        torch.set_float32_matmul_precision(older)
    else:
        torch.backends.cuda.matmul.fp32_precision = newer
