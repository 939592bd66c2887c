"""Keys and values token by token, as views, however they lie: NHD or HND, one tensor or two, pages of one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Cache = Tensor | Sequence[Tensor]
Dtype = str | torch.dtype | None


def checked_layout(kv_layout: str) -> str:
    """The layout; KeyError, as the library has it, for another word."""
    if kv_layout not in ("NHD", "HND"):
        raise KeyError(f"kv_layout: expected 'NHD' or 'HND', got {kv_layout!r}")
    return kv_layout


def token_major(array: Tensor, kv_layout: str) -> Tensor:
    """[.., tokens, heads, dim] of an array that is so (NHD) or [.., heads, tokens, dim] (HND)."""
    return array if checked_layout(kv_layout) == "NHD" else array.transpose(-3, -2)


def key_value_pages(cache: Cache, kv_layout: str) -> tuple[Tensor, Tensor]:
    """Keys and values [pages, page_size, heads, dim] of a pair of arrays or of one [pages, 2, ..]."""
    if not isinstance(cache, Tensor):
        keys, values = cache
        return _pages(keys, kv_layout), _pages(values, kv_layout)
    if cache.ndim not in (4, 5) or cache.shape[1] != 2:
        raise ValueError(
            f"paged_kv_cache: expected a pair or [pages, 2, ..] of 4 or 5 dimensions, got {list(cache.shape)}"
        )
    return _pages(cache[:, 0], kv_layout), _pages(cache[:, 1], kv_layout)


def _pages(pages: Tensor, kv_layout: str) -> Tensor:
    if pages.ndim == 3:  # pages of one token, [pages, heads, dim]
        return pages[:, None]
    return token_major(pages, kv_layout)


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name or itself."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or its name, got {dtype!r}")
    return found


def packed(array: Tensor) -> Tensor:
    """The array with inner dimensions in one piece, a copy only where they are not."""
    return array if not len(array) or array[0].is_contiguous() else array.contiguous()
