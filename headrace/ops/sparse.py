"""Top-k sparse attention: of the keys a token would see, only those it lists.

    indices [tokens, k]: keys by their place in the token's own sequence       -1: none
    page_indices [tokens, k]: pages by their place in its row of the page table, all keys of each

Nothing native is needed. Each token becomes a request of its own, its page table made of what it lists:

    indices        pages are seen as pages of one key, so that key j of a page p is page  p * stride + j
    page_indices   the pages listed; the one in which the visible keys end comes last

Causality and windows are applied to the list here, so that no kernel has to know the keys' places. An index listed
twice counts twice: that is the caller's to avoid, and breaks nothing. On a GPU: torch_sparse.py.

DeepSeek-AI 2025, "DeepSeek-V3.2" (sparse attention by a top-k indexer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer, Fixed, check_same_device, is_torch
from headrace.ops.attention_checks import check_int32
from headrace.ops.attention_options import AttentionOptions
from headrace.ops.attention_request import Call

_MOST_PAGES = 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """Whose each token is, int64 [tokens]: its request, and the first and the last key it sees (none: last < first)."""

    request: np.ndarray
    first: np.ndarray
    last: np.ndarray


def selected(call: Call, indices: Any, page_indices: Any) -> Call:
    """A checked paged call that sees only what is listed, by indices or page_indices int32 [tokens, k]."""
    if indices is not None and page_indices is not None:
        raise ArgumentError("indices, page_indices: expected one of them, got both")
    given, tokens = call.arrays, call.extent.queries
    name, listed = ("indices", indices) if page_indices is None else ("page_indices", page_indices)
    for other in ("mask", "alibi_slopes"):
        if other in given:
            raise ArgumentError(f"{other}: expected None with {name}, got an array", "it goes by the places of keys")
    for array in (*given.values(), listed):
        if isinstance(array, Buffer):
            raise ArgumentError(f"{name}: expected None in a program, got an array")
    check_int32(name, listed, (tokens, "k"))
    options = replace(call.options, causal=False, window=(None, None))
    if call.place[0] != "cpu":
        return _selected_there(call, name, listed, options)
    own = _tokens(call)
    found = (_by_token if page_indices is None else _by_page)(given, own, np.asarray(listed))
    found["query_starts"] = np.arange(tokens + 1, dtype=np.int32)
    extent = replace(call.extent, requests=tokens, keys=int(found["key_lens"].sum()))
    return replace(call, arrays={**given, **found}, extent=extent, options=options)


def _selected_there(call: Call, name: str, listed: Any, options: AttentionOptions) -> Call:
    """The same of arrays on a GPU, where nothing is known of the keys but how many there may be."""
    from headrace.ops import torch_sparse

    given, tokens = call.arrays, call.extent.queries
    check_same_device({"query": given["query"], name: listed})
    if name == "indices" or call.options.left is not None:
        _check_strides(flattened(given["key"], "key_pages"), flattened(given["value"], "value_pages"))
    found = torch_sparse.tables(given, call.options, tokens, name=name, listed=listed)
    keys = found["page_table"].shape[1] * found.get("key", given["key"]).shape[1]
    extent = replace(call.extent, requests=tokens, keys=tokens * keys)
    return replace(call, arrays={**given, **found}, extent=extent, options=options)


def _check_strides(keys: tuple[Any, int], values: tuple[Any, int]) -> None:
    if keys[1] != values[1]:
        text = f"{keys[1]} and {values[1]} keys"
        raise ArgumentError(f"key_pages, value_pages: with indices, expected pages equally far apart, got {text}")
    if len(keys[0]) > _MOST_PAGES:
        raise ArgumentError(f"key_pages: with indices, expected up to {_MOST_PAGES} keys, got {len(keys[0])}")


def _tokens(call: Call) -> Tokens:
    options, tokens = call.options, call.extent.queries
    starts, lens = (np.asarray(call.arrays[name]).astype(np.int64) for name in ("query_starts", "key_lens"))
    counts = np.diff(starts)
    if starts[0] != 0 or starts[-1] != tokens or (counts < 0).any():
        raise ArgumentError(f"query_starts: expected numbers from 0 to {tokens} that never fall, got {starts.tolist()}")
    request = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(tokens) - starts[request]
    own = place + (lens - counts)[request] if options.align == "bottom_right" else place
    last = lens[request] - 1 if options.right is None else np.minimum(own + options.right, lens[request] - 1)
    first = np.zeros_like(own) if options.left is None else np.maximum(own - options.left, 0)
    return Tokens(request, first, last)


def _by_token(given: Mapping[str, Any], own: Tokens, listed: np.ndarray) -> dict[str, Any]:
    page_size = given["key"].shape[1]
    lens = np.asarray(given["key_lens"]).astype(np.int64)[own.request]
    _check_listed("indices", listed, lens)
    key, stride = flattened(given["key"], "key_pages")
    value, value_stride = flattened(given["value"], "value_pages")
    _check_strides((key, stride), (value, value_stride))
    seen = (listed >= own.first[:, None]) & (listed <= own.last[:, None]) & (listed >= 0)
    listed = np.where(seen, listed, 0)
    pages = _pages_of(given, own, listed // page_size, seen)
    table = _gathered(pages * stride + listed % page_size, seen)
    found = {"key": key, "value": value, "page_table": table, "key_lens": seen.sum(axis=1, dtype=np.int32)}
    for name in ("key_scales", "value_scales"):
        if given.get(name) is not None:
            found[name] = _flat_scales(given[name], page_size, stride)
    return found


def _by_page(given: Mapping[str, Any], own: Tokens, listed: np.ndarray) -> dict[str, Any]:
    """Whole pages, where only the last one of a token's table is seen in part; else key by key."""
    page_size = given["key"].shape[1]
    lens = np.asarray(given["key_lens"]).astype(np.int64)[own.request]
    _check_listed("page_indices", listed, -(-lens // page_size))
    counts = np.clip(own.last[:, None] + 1 - listed.astype(np.int64) * page_size, 0, page_size)
    counts[listed < 0] = 0
    partial = (counts > 0) & (counts < page_size)
    if (own.first > 0).any() or (partial.sum(axis=1) > 1).any():
        keys = listed[:, :, None].astype(np.int64) * page_size + np.arange(page_size)
        keys = np.where((listed[:, :, None] >= 0) & (keys < lens[:, None, None]), keys, -1)
        return _by_token(given, own, keys.reshape(len(listed), -1))
    pages = _pages_of(given, own, np.maximum(listed, 0), counts > 0)
    table = _gathered(pages, counts > 0, last=partial)
    return {"page_table": table, "key_lens": counts.sum(axis=1, dtype=np.int32)}


def _check_listed(name: str, listed: np.ndarray, limits: np.ndarray) -> None:
    wrong = (listed < -1) | (listed >= limits[:, None])
    if wrong.any():
        token, place = (int(i) for i in np.argwhere(wrong)[0])
        got = f"{int(listed[token, place])} at [{token}, {place}]"
        raise ArgumentError(f"{name}: expected -1 to {int(limits[token]) - 1}, within the token's sequence, got {got}")


def _pages_of(given: Mapping[str, Any], own: Tokens, places: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The page at each place of each token's own row of the page table, int64; 0 where it is not used."""
    table, num_pages = np.asarray(given["page_table"]), given["key"].shape[0]
    if (used & (places >= table.shape[1])).any():
        raise ArgumentError(f"sequence_lens: expected at most what the {table.shape[1]} pages of a row hold, got more")
    pages = np.where(used, table[own.request[:, None], np.where(used, places, 0)].astype(np.int64), 0)
    if ((pages < 0) | (pages >= num_pages)).any():
        wrong = int(pages[(pages < 0) | (pages >= num_pages)][0])
        raise ArgumentError(f"page_table: expected 0 to {num_pages - 1} within the sequence, got {wrong}")
    return pages


def _gathered(pages: np.ndarray, used: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
    """The pages used, moved to the front of each row in their order, those of `last` behind the others; int32."""
    rank = np.where(used, 0 if last is None else last, 2)
    if (np.diff(rank, axis=1) < 0).any():
        pages = np.take_along_axis(pages, np.argsort(rank, axis=1, kind="stable"), axis=1)
    return pages.astype(np.int32)


def flattened(pages: Any, name: str) -> tuple[Any, int]:
    """Pages as pages of one key each, without a copy, and how many of these lie from one page to the next."""
    array = pages.numpy() if isinstance(pages, Fixed) else pages
    if isinstance(array, Buffer):
        raise ArgumentError(f"{name}: expected memory that outlives a step, got a buffer of a program")
    if not (isinstance(array, np.ndarray) or is_torch(array)):
        array = np.from_dlpack(array)
    num_pages, page_size = array.shape[:2]
    strides = _strides(array)
    stride = page_size if num_pages < 2 else strides[0] // max(strides[1], 1)
    if strides[1] < 1 or stride < 1 or (num_pages > 1 and strides[0] % strides[1]):
        hint = "np.ascontiguousarray makes them so"
        raise ArgumentError(f"{name}: with indices, expected pages a whole number of keys apart, got {strides}", hint)
    shape = (max(num_pages - 1, 0) * stride + page_size if num_pages else 0, 1, *array.shape[2:])
    return _with_strides(array, shape, (strides[1], strides[1], *strides[2:])), stride


def _strides(array: Any) -> tuple[int, ...]:
    """In elements."""
    return tuple(array.stride()) if is_torch(array) else tuple(n // array.itemsize for n in array.strides)


def _with_strides(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    if is_torch(array):
        return array.as_strided(shape, strides)
    in_bytes = tuple(n * array.itemsize for n in strides)
    return np.lib.stride_tricks.as_strided(array, shape, in_bytes, writeable=False)


def _flat_scales(scales: Any, page_size: int, stride: int) -> np.ndarray:
    """Scales for pages of one key, `stride` of them from one page to the next: a copy, small beside what they scale."""
    scales = np.asarray(scales.numpy() if isinstance(scales, Fixed) else scales)
    pages, _, kv_heads = scales.shape
    flat = np.zeros((pages, stride, kv_heads), np.float32)
    flat[:, :page_size] = scales
    return flat.reshape(pages * stride, 1, kv_heads)[: max(pages - 1, 0) * stride + page_size]
