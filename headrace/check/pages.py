"""A paged cache as an engine leaves it, and full of NaN wherever nothing has been written.

Pages lie in random order. Page numbers past the pages in use are no page. Of formats that have no NaN, codes are
garbage and the scales are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.check.attention_cases import AttentionCase
from headrace.check.compare import poisoned, rounded

GARBAGE = 0x5A

# Largest scale of a random code, such that numbers are of about the size of a normal distribution's.
_SCALES = {"float8_e4m3fn": 2.0, "int8": 0.02, "uint8": 0.3}


def paged_arrays(case: AttentionCase, dtype: str, random: np.random.Generator) -> dict[str, Any]:
    """Pages, their scales, table and lengths of a paged_attention call."""
    table, num_pages = page_table(case.key_lens, case.page_size, random)
    shape = (num_pages, case.page_size, case.kv_heads)
    arrays: dict[str, Any] = {"page_table": table, "sequence_lens": np.array(case.key_lens, np.int32)}
    for name, dim in (("key", case.head_dim), ("value", case.value_dim or case.head_dim)):
        pages, scales = unwritten(shape, dim, dtype), poisoned(shape, "float32")
        for row, length in zip(table, case.key_lens, strict=True):
            slots = row[np.arange(length) // case.page_size] * case.page_size + np.arange(length) % case.page_size
            pages.reshape(-1, *pages.shape[2:])[slots] = written((length, case.kv_heads), dim, dtype, random)
            scales.reshape(-1, case.kv_heads)[slots] = written_scales((length, case.kv_heads), dtype, random)
        arrays[f"{name}_pages"] = pages
        if case.scales:
            arrays[f"{name}_scales"] = scales if case.scales == "token" else np.ascontiguousarray(scales[:, :1])
    return arrays


def unwritten(shape: tuple[int, ...], dim: int, dtype: str) -> np.ndarray:
    """Keys or values [.., dim] that nobody has written."""
    if dtype in ("int8", "uint8"):
        return np.full((*shape, dim // 2 if dtype == "uint8" else dim), GARBAGE, dtype)
    return poisoned((*shape, dim), dtype)


def written(shape: tuple[int, ...], dim: int, dtype: str, random: np.random.Generator) -> np.ndarray:
    """Random keys or values [.., dim] as a cache of that type holds them."""
    if dtype == "int8":
        return random.integers(-127, 128, (*shape, dim), np.int8)
    if dtype == "uint8":
        return random.integers(0, 256, (*shape, dim // 2), np.uint8)
    return rounded(random.standard_normal((*shape, dim)), dtype)


def written_scales(shape: tuple[int, ...], dtype: str, random: np.random.Generator) -> np.ndarray:
    """Random scales, float32."""
    largest = _SCALES.get(dtype, 1.0)
    return random.uniform(largest / 8, largest, shape).astype(np.float32)


def page_table(sequence_lens: Sequence[int], page_size: int, random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Pages for each sequence, int32 [requests, max_pages], and how many pages there are, some of them unused."""
    counts = [-(-length // page_size) for length in sequence_lens]
    num_pages = sum(counts) + 2
    order, table = random.permutation(num_pages), np.full((len(counts), max(counts, default=0) + 2), -(2**31), np.int32)
    for row, count, first in zip(table, counts, np.cumsum([0, *counts])[:-1], strict=True):
        row[:count] = order[first : first + count]
    return table, num_pages
