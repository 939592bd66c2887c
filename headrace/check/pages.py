"""A paged cache as an engine leaves it, and full of NaN wherever nothing has been written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.check.cases import PagedAttentionCase
from headrace.check.compare import poisoned, rounded


def paged_batch(case: PagedAttentionCase, dtype: str, query_dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """The six arrays of a paged_attention call. Pages lie in random order; unused table entries are no page."""
    random = np.random.default_rng(seed)
    value_dim = case.value_dim or case.head_dim
    table, num_pages = page_table(case.sequence_lens, case.page_size, random)
    shape = (num_pages, case.page_size, case.kv_heads)
    key_pages, value_pages = poisoned((*shape, case.head_dim), dtype), poisoned((*shape, value_dim), dtype)
    for row, length in zip(table, case.sequence_lens, strict=True):
        slots = row[np.arange(length) // case.page_size] * case.page_size + np.arange(length) % case.page_size
        for pages in (key_pages, value_pages):
            written = random.standard_normal((length, *pages.shape[2:]))
            pages.reshape(-1, *pages.shape[2:])[slots] = rounded(written, dtype)
    query = random.standard_normal((sum(case.query_lens), case.heads, case.head_dim))
    return {
        "query": rounded(query, query_dtype),
        "key_pages": key_pages,
        "value_pages": value_pages,
        "page_table": table,
        "sequence_lens": np.array(case.sequence_lens, np.int32),
        "query_starts": np.cumsum([0, *case.query_lens], dtype=np.int32),
    }


def page_table(sequence_lens: Sequence[int], page_size: int, random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Pages for each sequence, int32 [requests, max_pages], and how many pages there are, some of them unused."""
    counts = [-(-length // page_size) for length in sequence_lens]
    num_pages = sum(counts) + 2
    order, table = random.permutation(num_pages), np.full((len(counts), max(counts, default=0) + 2), -(2**31), np.int32)
    for row, count, first in zip(table, counts, np.cumsum([0, *counts])[:-1], strict=True):
        row[:count] = order[first : first + count]
    return table, num_pages
