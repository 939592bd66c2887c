"""Dense attention of few rows over many keys on a GPU: paged attention over the keys where they lie, seen as pages.

Wins at decode over a static cache, where one program for each row tile would leave most multiprocessors idle. Schedule:
that of paged_attention.py: workers share out the keys of all requests, the last to arrive joins the parts. Page table,
starts and lengths are made on the device, in three small launches, and kept for calls of the same sizes.
Source and error bound: paged_attention.py's. Not measured yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.dense_pages import as_pages, page_len_of, pages_apart
from headrace.kernels.triton import paged_attention

_MOST_KEPT = 64
_kept: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}
_of_graphs: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}


def run(arrays: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    query, key, value, out = (arrays[name] for name in ("query", "key", "value", "out"))
    page_len = page_len_of(key, value)
    sizes = (*query.shape[:2], key.shape[1], page_len, pages_apart(key, page_len))
    table, starts, lens = _tables(sizes, query.device)
    rows = out.flatten(0, 1)
    called = {
        "query": query.flatten(0, 1),
        "key": as_pages(key, page_len),
        "value": as_pages(value, page_len),
        "page_table": table,
        "query_starts": starts,
        "key_lens": arrays.get("key_lens", lens),
        "out": rows,
        "lse": arrays["lse"].flatten(0, 1),
    }
    others = {name: arrays[name] for name in ("sinks", "alibi_slopes") if name in arrays}
    paged_attention.run(called | others, options)
    if rows.data_ptr() != out.data_ptr():  # heads first: its rows are no view
        out.copy_(rows.view(out.shape))


def _tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Page table, starts and lengths. NOTE: what is made while a graph is captured belongs to that graph, and what was
    made before and a graph reads must stay where it is."""
    place = (device, *sizes)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if place in _kept:
            _of_graphs[place] = _kept[place]
        return _of_graphs.get(place) or _made(sizes, device)
    if place not in _kept:
        if len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[place] = _made(sizes, device)
    return _kept[place]


def _made(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, page_len, apart = sizes
    pages = torch.arange(-(-keys // page_len), dtype=torch.int32, device=device)
    requests = torch.arange(batch + 1, dtype=torch.int32, device=device)
    lens = torch.full((batch,), keys, dtype=torch.int32, device=device)
    return requests[:batch, None] * apart + pages, requests * queries, lens
