"""New keys and values into the pages of a cache, in place, and the numbers that say where they go."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.compat.flashinfer.batch import int32, places
from headrace.compat.flashinfer.layout import Cache, key_value_pages, packed
from headrace.ops import append_pages

__all__ = ["append_paged_kv_cache", "append_paged_mla_kv_cache", "get_batch_indices_positions", "get_seq_lens"]

# What our op reads, and writes from any of these.
_ROWS = (torch.float32, torch.float16, torch.bfloat16)
_PAGES = (*_ROWS, torch.float8_e4m3fn)


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Tokens of each request, [requests]: all its pages are full but the last."""
    return torch.clamp(kv_indptr[1:] - kv_indptr[:-1] - 1, min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Whose each appended token is, and its place in the sequence, int32 [nnz] each: they are the last of seq_lens.

    What is behind append_indptr[-1] belongs to nobody (-1). Both are written in place when they are given.
    """
    counts = int32(append_indptr).diff()
    owner, place = places(counts)
    place += (int32(seq_lens) - counts).long()[owner]
    found = (torch.full((nnz,), -1, dtype=torch.int32), torch.zeros(nnz, dtype=torch.int32))
    for array, values in zip(found, (owner, place), strict=True):
        array[: len(values)] = values[:nnz]
    if batch_indices is not None:
        batch_indices.copy_(found[0])
    if positions is not None:
        positions.copy_(found[1])
    return (
        found[0] if batch_indices is None else batch_indices,
        found[1] if positions is None else positions,
    )


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Cache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Writes keys and values [tokens, kv_heads, head_dim] to the pages of their requests; those of nobody (-1) nowhere.

    A cache of a narrower type is written in it. The pages are already counted in kv_indices, kv_indptr and
    kv_last_page_len.
    """
    keys, values = key_value_pages(paged_kv_cache, kv_layout)
    known, slots = _slots(batch_indices, positions, kv_indices, kv_indptr, keys.shape[1])
    _write(_of_somebody(append_key, known), keys, slots)
    _write(_of_somebody(append_value, known), values, slots)


def append_paged_mla_kv_cache(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor | None,
    kpe_cache: Tensor | None,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """The same of latents [tokens, ckv_dim] and rotated keys [tokens, kpe_dim] in [pages, page_size, dim] each."""
    for rows, cache in ((append_ckv, ckv_cache), (append_kpe, kpe_cache)):
        if cache is not None and cache.shape[-1]:
            known, slots = _slots(batch_indices, positions, kv_indices, kv_indptr, cache.shape[1])
            _write(_of_somebody(rows, known)[:, None], cache[:, :, None], slots)


def _slots(
    batch_indices: Tensor, positions: Tensor, kv_indices: Tensor, kv_indptr: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """Which tokens are somebody's, and where these go: page * page_size + place, int32."""
    owner, place = int32(batch_indices).long(), int32(positions).long()
    known = owner >= 0
    owner, place = owner[known], place[known]
    pages = int32(kv_indices).long()[int32(kv_indptr).long()[owner] + place // page_size]
    return known, (pages * page_size + place % page_size).to(torch.int32)


def _of_somebody(rows: Tensor, known: Tensor) -> Tensor:
    return packed(rows if bool(known.all()) else rows[known])


def _write(rows: Tensor, pages: Tensor, slots: Tensor) -> None:
    if rows.dtype in _ROWS and pages.dtype in _PAGES:
        append_pages(rows, None, pages, None, slots=slots)
        return
    if rows.dtype != pages.dtype:
        raise NotImplementedError(
            f"append_key, append_value: {rows.dtype} into pages of {pages.dtype} needs scales; quantize before, or use "
            "headrace.ops.append_pages"
        )
    page_size = pages.shape[1]
    where = (slots.long() // page_size, slots.long() % page_size)
    if pages.element_size() == 1:  # of which torch writes none by index
        rows, pages = rows.view(torch.uint8), pages.view(torch.uint8)
    pages[where] = rows
