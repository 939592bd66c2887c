"""Dense keys and values seen as pages of a cache, where they lie: what reads pages then reads them, keys divided.

    key [batch, keys, kv_heads, dim]  ->  pages [.., page_len, kv_heads, dim]       page p of r is number r * apart + p

That needs batches that lie a whole number of pages apart, and memory for the whole of the last page.
"""

from __future__ import annotations

import math
from typing import Any

from headrace.kernels.arrays import is_torch

PAGE_LENS = (128, 64, 16, 8)
MOST_ROWS = 64  # query rows that read the same keys: of more, tiles of rows are enough to do


def page_len_of(key: Any, value: Any) -> int:
    """Keys of the largest pages that both consist of; 0: of none. Arrays that only stand for a shape are contiguous."""
    for page_len in PAGE_LENS:
        whole = _consists(key, page_len) and _consists(value, page_len)
        if whole and pages_apart(key, page_len) == pages_apart(value, page_len):
            return page_len
    return 0


def pages_apart(array: Any, page_len: int) -> int:
    """How many pages lie from one of the batch to the next."""
    batch, num_keys = array.shape[:2]
    if batch < 2 or not is_torch(array):
        return -(-num_keys // page_len)
    apart: int = array.stride(0) // (page_len * array.stride(1))
    return apart


def _consists(array: Any, page_len: int) -> bool:
    batch, num_keys = array.shape[:2]
    if not is_torch(array):
        return bool(num_keys > 0 and num_keys % page_len == 0)
    apart, step = array.stride()[:2]
    if num_keys < 1 or step < 1 or (batch > 1 and (apart < 1 or apart % (page_len * step))):
        return False
    last = [apart * (batch - 1), step * (-(-num_keys // page_len) * page_len - 1)]
    last += [(n - 1) * stride for n, stride in zip(array.shape[2:], array.stride()[2:], strict=True)]
    room = array.untyped_storage().nbytes() // array.element_size()
    return bool(array.storage_offset() + sum(last) < room)


def as_pages(array: Any, page_len: int) -> Any:
    """The tensor as pages, without a copy."""
    (batch, num_keys), (_, step, *inner) = array.shape[:2], array.stride()
    pages = (batch - 1) * pages_apart(array, page_len) + -(-num_keys // page_len)
    return array.as_strided((pages, page_len, *array.shape[2:]), (page_len * step, step, *inner))


def rows_of(shape: tuple[int, ...], kv_heads: int) -> int:
    """Query rows that read the same keys, of a query [batch, queries, heads, head_dim]."""
    return math.prod(shape[1:3]) // max(kv_heads, 1)
