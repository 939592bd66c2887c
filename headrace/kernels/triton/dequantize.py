"""Rows of a quantized weight written out as floats: what a matmul of many rows multiplies.

Each code is read once and written once, 2 or 4 bytes. Wins nothing by itself: it stands before torch's matmul.

    a program has 8 rows and up to 16 chunks of 16 bytes of each
    it makes the numbers of one part of the words after another and writes them
Bit for bit what the format defines, rounded once. Source: kernels/triton/linear.py, whose steps these are. Bound:
memory; not measured yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.kernels.device_weight import CHUNK_WORDS, DeviceWeight
from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.linear_tiles import code_values, group_scales
from headrace.kernels.triton.variants import Variant
from headrace.kernels.triton.weight import from_blocks

_ROWS, _CHUNKS, _WARPS = 8, 16, 4


@triton.jit
def _dequantize(out, out_stride, codes, high, scales, minimums, groups, upper, first_row, num_rows, num_cols,
                row_chunks, row_groups,
                VALUES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WORDS: tl.constexpr, OFFSET: tl.constexpr,
                GROUP: tl.constexpr, SCALES: tl.constexpr, MINIMUMS: tl.constexpr, SCALE_ROWS: tl.constexpr,
                BN: tl.constexpr, TILE_WORDS: tl.constexpr):  # fmt: skip
    """Program (row tile, word tile)."""
    PARTS: tl.constexpr = 32 // LOW
    LENGTH: tl.constexpr = PARTS * WORDS
    TOGETHER: tl.constexpr = PARTS if GROUP == 0 or GROUP >= LENGTH else GROUP // WORDS
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = (tl.minimum(row, num_rows - 1) + first_row).to(tl.int64)[:, None]
    word = tl.program_id(1) * TILE_WORDS + tl.arange(0, TILE_WORDS)
    inside = (word < row_chunks * 4)[None, :]
    place = rows * row_chunks * 4 + word[None, :]
    words = tl.load(codes + place, inside, 0, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
    more = words
    if HIGH != 0:
        more = tl.load(high + place, inside, 0, eviction_policy="evict_first")
        more = more.to(tl.uint16 if HIGH * PARTS == 16 else tl.uint8, bitcast=True).to(tl.uint32)
    span, nothing = word // WORDS, tl.minimum(row_chunks, 0).to(tl.uint32)
    own = out + row.to(tl.int64)[:, None] * out_stride
    for together in tl.static_range(PARTS // TOGETHER):
        if GROUP != 0:
            group = ((span * LENGTH + together * TOGETHER * WORDS) // GROUP)[None, :]
            scale, minimum = group_scales(
                scales, minimums, groups, upper, rows, group, inside, row_groups, GROUP, SCALES, MINIMUMS, SCALE_ROWS,
                True,
            )  # fmt: skip
        else:
            scale = tl.load(scales + rows)
        for part in tl.static_range(together * TOGETHER, together * TOGETHER + TOGETHER):
            column = (span * LENGTH + part * WORDS + word % WORDS)[None, :]
            values = code_values(words, more, nothing, part, VALUES, LOW, HIGH, OFFSET) * scale
            if MINIMUMS != "none":
                values += minimum
            written = (row < num_rows)[:, None] & inside & (column < num_cols)
            tl.store(own + column, values.to(out.dtype.element_ty), written)


def dequantized(weight: DeviceWeight, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Those rows as [rows, cols] of a float type. NOTE: zero points are subtracted after scaling, one rounding later
    than their definition has it."""
    first, count = rows.start or 0, (weight.shape[0] if rows.stop is None else rows.stop) - (rows.start or 0)
    out = torch.empty((count, weight.shape[1]), dtype=dtype, device=weight.codes.device)
    tile_words = _CHUNKS * CHUNK_WORDS
    grid = (-(-count // _ROWS), -(-weight.codes.shape[1] // tile_words))
    with on_device_of(out):
        _dequantize[grid](**_arguments(weight, out, first, count), **_constants(weight), num_warps=_WARPS)
    return out


def _arguments(weight: DeviceWeight, out: torch.Tensor, first: int, count: int) -> dict[str, object]:
    fields = ("codes", "high", "scales", "minimums", "groups", "groups_high")
    found = [weight.codes if getattr(weight, name) is None else getattr(weight, name) for name in fields]
    arguments: dict[str, object] = {"out": out, "out_stride": out.stride(0)}
    arguments |= zip((*fields[:-1], "upper"), found, strict=True)
    arguments |= {"first_row": first, "num_rows": count, "num_cols": weight.shape[1]}
    return arguments | {"row_chunks": weight.codes.shape[1] // CHUNK_WORDS, "row_groups": weight.row_groups}


def _constants(weight: DeviceWeight) -> dict[str, object]:
    layout = weight.layout
    return {
        "VALUES": layout.values,
        "LOW": layout.low_bits,
        "HIGH": layout.high_bits,
        "WORDS": layout.words,
        "OFFSET": layout.offset,
        "GROUP": layout.group_len,
        "SCALES": layout.scales,
        "MINIMUMS": layout.minimums,
        "SCALE_ROWS": layout.scale_rows,
        "BN": _ROWS,
        "TILE_WORDS": _CHUNKS * CHUNK_WORDS,
    }


_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8"}


def variants() -> list[Variant]:
    """A format with minimums and one with upper bits."""
    return [_variant("Q4_K", 144), _variant("Q6_K", 210)]


def _variant(name: str, block_bytes: int) -> Variant:
    weight = from_blocks(torch.zeros(16 * block_bytes, dtype=torch.uint8), name, (1, 4096), "cpu")
    values = _arguments(weight, torch.empty((1, 4096), dtype=torch.bfloat16), 0, 1)
    types = {n: "*" + _TYPES[v.dtype] if isinstance(v, torch.Tensor) else "i32" for n, v in values.items()}
    return Variant(name, _dequantize, types, _constants(weight), _WARPS, aligned=("out_stride", "num_cols"))
