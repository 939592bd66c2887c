"""The KV cache of flash_attn_with_kvcache: appended to in place, rotated on the way, then attended to.

A cache [batches, keys, kv_heads, dim] is one of pages too: a page holds a sequence. So there is one way for both. Only
caches that begin late (leftpad) are read as runs of rows: what lies before their beginning may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headrace import ops
from headrace.compat.flash_attn.layers.rotary import turned
from headrace.compat.flash_attn.translation import (
    FLOAT8,
    Attended,
    Further,
    Keys,
    packed,
    ragged,
    request_of_rows,
    rows_of,
)


@dataclass(frozen=True)
class Cache:
    """Pages, and which of them hold the tokens of each sequence."""

    keys: Tensor  # [pages, page_size, kv_heads, dim]
    values: Tensor
    table: Tensor  # int32 [batch, pages of a sequence]
    lens: Tensor  # int32 [batch]
    paged: bool

    @staticmethod
    def of(
        k_cache: Tensor, v_cache: Tensor, *, table: Tensor | None, batch: int, batch_idx: Tensor | None, seqlens: Any
    ) -> Cache:
        """From the arguments of a call. seqlens: int or [batch], tokens that are there; None: all there is room for."""
        paged = table is not None
        rows = torch.arange(len(k_cache), dtype=torch.int32)[:, None] if table is None else table.to(torch.int32)
        rows = (rows[:batch] if batch_idx is None else rows[batch_idx.long()]).contiguous()
        lens = torch.full((batch,), rows.shape[1] * k_cache.shape[1], dtype=torch.int32)
        if seqlens is not None:
            lens = lens.fill_(seqlens) if isinstance(seqlens, int) else seqlens.to(torch.int32)
        return Cache(k_cache.detach(), v_cache.detach(), rows, lens, paged)

    def check_room(self, new: NewTokens | None) -> None:
        """RuntimeError, as the library's, for sequences that are longer than their place, the new tokens included."""
        lens = self.lens if new is None else self.lens + new.starts.diff()
        room, longest = self.table.shape[1] * self.keys.shape[1], int(lens.max()) if len(lens) else 0
        if longest > room:
            name = "block_table" if self.paged else "k_cache"
            raise RuntimeError(
                f"{name}: has room for {room} tokens of a sequence, cache_seqlens and k ask for {longest}"
            )

    def slots(self, places: Tensor, request: Tensor) -> Tensor:
        """int32 [rows]: where in the pages a sequence's place is."""
        size = self.keys.shape[1]
        return (self.table[request, places // size] * size + places % size).to(torch.int32)

    def with_new(self, new: NewTokens, rotary: Rotary | None) -> Cache:
        """The cache after new tokens were written behind the last of each sequence."""
        request = request_of_rows(new.starts, len(new.keys))
        step = torch.arange(len(new.keys), dtype=torch.int32) - new.starts[request]
        keys = new.keys if rotary is None else rotary.turn(new.keys, rotary.first(self.lens)[request] + step)
        slots = self.slots((self.lens[request] + step).long(), request)
        ops.append_pages(_rows(keys), _rows(new.values), self.keys, self.values, slots=slots)
        return replace(self, lens=self.lens + new.starts.diff())

    def runs(self, leftpad: Tensor) -> Keys:
        """Keys and values from where each sequence begins. Pages are gathered into memory of their own for it."""
        keys, values, table, size = self.keys, self.values, self.table, self.keys.shape[1]
        if self.paged:
            pages = table.clamp(0, len(keys) - 1).long()  # a table may hold anything past a sequence's end
            keys, values = keys[pages].flatten(1, 2), values[pages].flatten(1, 2)
            table, size = torch.arange(len(pages), dtype=torch.int32)[:, None], keys.shape[1]
        begins = leftpad.to(torch.int32)
        lens = (self.lens - begins).clamp(min=0)
        return Keys(keys.flatten(0, 1), values.flatten(0, 1), lens, table[:, 0] * size + begins)


def _rows(array: Tensor) -> Tensor:
    """Rows as the append takes them: float8 as numbers that hold it exactly."""
    return packed(array.to(torch.bfloat16) if array.dtype == FLOAT8 else array)


@dataclass(frozen=True)
class NewTokens:
    """What is appended: keys and values [tokens, kv_heads, dim], int32 starts [batch + 1]."""

    keys: Tensor
    values: Tensor
    starts: Tensor

    @staticmethod
    def of(k: Tensor | None, v: Tensor | None, cu_seqlens: Tensor | None, cache_seqlens: Any) -> NewTokens | None:
        """From the arguments of a call, None where there is nothing to append."""
        if k is None and v is None:
            return None
        if k is None or v is None:
            raise ValueError(f"k, v: expected both or neither, got {'v' if k is None else 'k'} alone")
        if cache_seqlens is None:
            raise ValueError("cache_seqlens: expected the length of each sequence beside k and v, got None")
        keys, starts = rows_of(k.detach(), cu_seqlens)
        return NewTokens(keys, v.detach().reshape(*keys.shape[:-1], v.shape[-1]), starts)


@dataclass(frozen=True)
class Rotary:
    """The tables of rotation [places, rotary_dim / 2], and how they are used."""

    cos: Tensor
    sin: Tensor
    interleaved: bool
    stepping: bool  # queries stand one place after another; else all at the first
    seqlens: Tensor | None = None  # int32 [batch], where each sequence's new tokens begin; None: behind its last

    @staticmethod
    def of(
        cos: Tensor | None, sin: Tensor | None, interleaved: bool, *, stepping: bool, new: NewTokens | None
    ) -> Rotary | None:
        """From the arguments of a call, None without tables."""
        if cos is None and sin is None:
            return None
        if cos is None or sin is None:
            raise ValueError(f"rotary_cos, rotary_sin: expected both or neither, got {'sin' if cos is None else 'cos'}")
        if new is None:
            raise ValueError("rotary_cos, rotary_sin: expected k and v to append beside them, got None")
        return Rotary(cos.detach(), sin.detach(), interleaved, stepping)

    def first(self, lens: Tensor) -> Tensor:
        """The place of each sequence's first new token."""
        return lens if self.seqlens is None else self.seqlens.to(torch.int32)

    def turn(self, rows: Tensor, places: Tensor) -> Tensor:
        """Rows [tokens, heads, dim], rotated to their places [tokens]."""
        places = places.long()
        return turned(rows, self.cos[places], self.sin[places], self.interleaved)


@torch.no_grad()
def attend_cached(
    q: Tensor,
    cache: Cache,
    new: NewTokens | None,
    rotary: Rotary | None,
    *,
    options: Mapping[str, Any],
    further: Further,
    leftpad: Tensor | None,
) -> Attended:
    """Attention of q [batch, tokens, heads, dim], or ragged, over the cache; what is new is in it afterwards."""
    q = q.detach()
    cache.check_room(new)
    if rotary is not None:
        rotary = replace(rotary, seqlens=further.rotary_seqlens)
        q = _rotated_query(q, further.cu_seqlens_q, rotary, rotary.first(cache.lens))
    if new is not None:
        cache = cache.with_new(new, rotary)
    keys = Keys(cache.keys, cache.values, cache.lens, table=cache.table)
    if leftpad is not None:
        keys = cache.runs(leftpad)
    return ragged(q, further.cu_seqlens_q, keys, options, further)


def _rotated_query(q: Tensor, cu_seqlens_q: Tensor | None, rotary: Rotary, first: Tensor) -> Tensor:
    rows, starts = rows_of(q, cu_seqlens_q)
    request = request_of_rows(starts, len(rows))
    places = first[request]
    if rotary.stepping:
        places = places + torch.arange(len(rows), dtype=torch.int32) - starts[request]
    return rotary.turn(rows, places).view_as(q)
