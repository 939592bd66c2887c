"""A bool mask as bits, with a word for each tile of it: nobody sees anything, everybody everything, or look.

A mask's last column is a request's last key, so where its columns lie among the keys is known on the device alone:
tiles of keys and tiles of columns overlap as they may. Schedule: each program packs one tile of rows and columns. The
kernels that read the bits take the words of up to four tiles together: a tile that nobody sees is skipped, one that all
see is not masked. Not measured yet.
Wins against reading bytes where tiles are hidden or whole, and by an eighth of the bytes where they are mixed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.variants import Variant

NOBODY, EVERYBODY = 1, 2  # bits of a tile's word: something is hidden, something is seen
WORD = 32


@triton.jit(
    do_not_specialize=["num_heads", "num_rows", "num_columns", "num_words", "row_tiles", "column_tiles", "batch_stride"]
)
def pack_mask_kernel(
    mask,
    words,
    states,
    num_heads,
    num_rows,
    num_columns,
    num_words,
    row_tiles,
    column_tiles,
    batch_stride,
    head_stride,
    row_stride,
    column_stride,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    number = tl.program_id(0)
    column_tile = number % column_tiles
    row_tile = number // column_tiles % row_tiles
    plane = number // (column_tiles * row_tiles)
    batch, head = plane // num_heads, plane % num_heads
    row = row_tile * rows + tl.arange(0, rows)
    column = column_tile * columns + tl.arange(0, columns)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    places = mask + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    places = places + row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    seen = (tl.load(places, mask=inside, other=0) != 0).to(tl.int32)
    some_seen = tl.max(tl.max(tl.where(inside, seen, 0), 1), 0)
    some_hidden = tl.max(tl.max(tl.where(inside, 1 - seen, 0), 1), 0)
    tl.store(states + number, (some_seen * 2 + some_hidden).to(tl.int8))
    bit = tl.arange(0, 32)[None, None, :]
    packed = tl.sum(tl.reshape(seen, [rows, columns // 32, 32]) << bit, 2)
    word = column_tile * (columns // 32) + tl.arange(0, columns // 32)
    to = words + (plane.to(tl.int64) * num_rows + row[:, None]) * num_words + word[None, :]
    tl.store(to, packed, mask=(row < num_rows)[:, None] & (word < num_words)[None, :])


@triton.jit
def mask_state(states, row_stride, first_row, last_row, column, num_columns, form: tl.constexpr):
    """What the tiles say that hold these rows and a tile's keys from `column` on, which may begin before the mask."""
    count: tl.constexpr = form.keys
    rows: tl.constexpr = form.mask_rows
    columns: tl.constexpr = form.mask_columns
    begin = tl.maximum(column, 0) // columns
    last = tl.maximum(tl.minimum(column + count, num_columns) - 1, 0) // columns
    some = column + count > 0
    upper = states + (first_row // rows).to(tl.int64) * row_stride
    lower = states + (last_row // rows).to(tl.int64) * row_stride
    found = tl.load(upper + begin, mask=some, other=0) | tl.load(upper + last, mask=some, other=0)
    found = found | tl.load(lower + begin, mask=some, other=0) | tl.load(lower + last, mask=some, other=0)
    return found.to(tl.int32) | tl.where(column < 0, 2, 0)


@triton.jit
def mask_word(rows, column, num_words, live):
    """The 32 columns from `column` on of each row, as bits; keys before the mask are seen."""
    index = column >> 5
    shift = (column & 31).to(tl.uint32)
    low = tl.load(rows + index, mask=live & (index >= 0) & (index < num_words), other=0)
    high = tl.load(rows + index + 1, mask=live & (index + 1 >= 0) & (index + 1 < num_words), other=0)
    low = tl.where(index < 0, -1, low).to(tl.uint32)
    high = tl.where(index + 1 < 0, -1, high).to(tl.uint32)
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def mask_bits(rows, column, num_words, live, count: tl.constexpr):
    """Which of `count` columns from `column` on each row sees, [rows, columns]."""
    place = tl.arange(0, count)[None, :]
    bit = (place & 31).to(tl.uint32)
    chosen = mask_word(rows, column, num_words, live)[:, None] >> bit
    for n in tl.static_range(1, count // 32):
        word = mask_word(rows, column + 32 * n, num_words, live)[:, None]
        chosen = tl.where(place // 32 == n, word >> bit, chosen)
    return (chosen & 1) != 0


def packed_mask(mask: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of a mask [batch or 1, heads or 1, rows or 1, columns], int32, and the words of its tiles, int8."""
    batch, heads, num_rows, num_columns = mask.shape
    num_words, row_tiles = triton.cdiv(num_columns, WORD), triton.cdiv(num_rows, rows)
    column_tiles = triton.cdiv(num_columns, columns)
    words = torch.empty((batch, heads, num_rows, num_words), dtype=torch.int32, device=mask.device)
    states = torch.empty((batch, heads, row_tiles, column_tiles), dtype=torch.int8, device=mask.device)
    sizes = (heads, num_rows, num_columns, num_words, row_tiles, column_tiles)
    if mask.is_meta:  # a call that is only being prepared
        return words, states
    with on_device_of(mask):
        pack_mask_kernel[(batch * heads * row_tiles * column_tiles,)](
            mask.view(torch.uint8), words, states, *sizes, *mask.stride(), rows=rows, columns=columns, num_warps=8
        )
    return words, states


def variants() -> list[Variant]:
    names = ("num_heads", "num_rows", "num_columns", "num_words", "row_tiles", "column_tiles")
    strides = ("batch_stride", "head_stride", "row_stride", "column_stride")
    types: dict[str, Any] = {"mask": "*u8", "words": "*i32", "states": "*i8"} | dict.fromkeys(names + strides, "i32")
    return [
        Variant(f"{rows} x {columns}", pack_mask_kernel, types, {"rows": rows, "columns": columns}, num_warps=8)
        for rows, columns in ((128, 128), (128, 64))
    ]
