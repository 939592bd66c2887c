"""rope_table and rotate on a GPU: the step's cosines and sines in float64, and heads turned by them.

Wins always there. Bound: the table by 60 float64 operations per pair (0.01 ms for 8192 tokens where float64 is half as
fast as float32, 32 times that on chips for games); rotate by 2 * tokens * heads * head_dim * width bytes.
Schedule:
  1. Table: a program takes some tokens and all pairs; angles are float64, so that 100000 is as exact as 10.
  2. Rotate: a program takes one token and some heads; both halves (or evens and odds) of the pairs are loaded,
  3. turned by the token's row of the table, which all its heads share, and stored in place or elsewhere;
  4. columns from rotary_dim on are copied when the output is not the input.
  5. A program reads all its pairs before it writes one, so both may be the same memory.
Source: Su et al. 2021, "RoFormer". (Inside a model the turning is part of append_pages.)
Error: table entries are one float32 rounding off at any position; rotate computes in float32 and rounds once.
Speed: not measured yet (`headrace bench gpu`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl

from headrace.kernels.arrays import as_torch, empty_like
from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.rows import packed
from headrace.kernels.triton.variants import Variant

TABLE_TOKENS = 8  # of a program
TILE = 2048  # elements of the heads a program turns


@triton.jit
def rope_table_rows(
    positions, position_stride, frequencies, table, table_stride, num_tokens, num_pairs, high, low,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Cosines, then sines, of some tokens, times high + low: a float64 would arrive as float32."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pairs = tl.arange(0, PAIRS)
    mask = (tokens < num_tokens)[:, None] & (pairs < num_pairs)[None, :]
    position = tl.load(positions + tokens.to(tl.int64) * position_stride, mask=tokens < num_tokens, other=0)
    frequency = tl.load(frequencies + pairs, mask=pairs < num_pairs, other=0.0).to(tl.float64)
    angles = position.to(tl.float64)[:, None] * frequency[None, :]
    places = table + tokens.to(tl.int64)[:, None] * table_stride + pairs[None, :]
    size = tl.zeros([1, 1], tl.float64) + high + low
    tl.store(places, (size * tl.cos(angles)).to(tl.float32), mask=mask)
    tl.store(places + num_pairs, (size * tl.sin(angles)).to(tl.float32), mask=mask)


@triton.jit
def rotate_heads(
    x, table, out, x_token, x_head, table_stride, out_token, out_head, num_heads, head_dim, num_pairs,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some heads of a token. REST: columns behind the rotated ones to be copied, 0 for none."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, PAIRS)
    x += token * x_token + heads.to(tl.int64)[:, None] * x_head
    out += token * out_token + heads.to(tl.int64)[:, None] * out_head
    first = 2 * pairs if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else first + num_pairs
    mask = (heads < num_heads)[:, None] & (pairs < num_pairs)[None, :]
    a = tl.load(x + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + second[None, :], mask=mask, other=0.0).to(tl.float32)
    row = table + token * table_stride + pairs
    cosine = tl.load(row, mask=pairs < num_pairs, other=0.0)[None, :]
    sine = tl.load(row + num_pairs, mask=pairs < num_pairs, other=0.0)[None, :]
    tl.store(out + first[None, :], (a * cosine - b * sine).to(out.dtype.element_ty), mask=mask)
    tl.store(out + second[None, :], (b * cosine + a * sine).to(out.dtype.element_ty), mask=mask)
    if REST > 0:
        columns = 2 * num_pairs + tl.arange(0, REST)
        inside = (heads < num_heads)[:, None] & (columns < head_dim)[None, :]
        tl.store(out + columns[None, :], tl.load(x + columns[None, :], mask=inside, other=0.0), mask=inside)


def run_table(positions: Any, inverse_frequencies: Any, magnitude: float, out: Any) -> Any:
    """The table [tokens, rotary_dim] float32."""
    tokens, frequencies = as_torch(positions, "positions"), packed(inverse_frequencies, "inverse_frequencies")
    num_tokens, num_pairs = tokens.shape[0], frequencies.shape[0]
    out = empty_like(positions, (num_tokens, 2 * num_pairs), "float32") if out is None else out
    table = packed(out, "out", (num_tokens, 2 * num_pairs), "float32")
    if not num_tokens:
        return out
    high = float(np.float32(magnitude))
    numbers = (num_tokens, num_pairs, high, magnitude - high)
    with on_device_of(tokens):
        rope_table_rows[(triton.cdiv(num_tokens, TABLE_TOKENS),)](
            tokens, tokens.stride(0), frequencies, table, table.stride(0), *numbers,
            TOKENS=TABLE_TOKENS, PAIRS=triton.next_power_of_2(num_pairs), num_warps=4,
        )  # fmt: skip
    return out


def run_rotate(x: Any, table: Any, interleaved: bool, out: Any) -> None:
    """Heads x [tokens, heads, head_dim] turned into `out`, which may be x."""
    x, table, out = packed(x, "x"), packed(table, "table"), packed(out, "out", x.shape)
    num_tokens, num_heads, head_dim = x.shape
    num_pairs = table.shape[1] // 2
    if not (num_tokens and num_heads):
        return
    heads, pairs, num_warps = tile_of(num_heads, num_pairs)
    rest = 0 if out.data_ptr() == x.data_ptr() or head_dim == 2 * num_pairs else head_dim - 2 * num_pairs
    with on_device_of(x):
        rotate_heads[(num_tokens, triton.cdiv(num_heads, heads))](
            x, table, out, x.stride(0), x.stride(1), table.stride(0), out.stride(0), out.stride(1),
            num_heads, head_dim, num_pairs,
            HEADS=heads, PAIRS=pairs, REST=triton.next_power_of_2(rest) if rest else 0, INTERLEAVED=interleaved,
            num_warps=num_warps,
        )  # fmt: skip


def tile_of(num_heads: int, num_pairs: int) -> tuple[int, int, int]:
    """Heads and pairs of a program, and its warps."""
    pairs = triton.next_power_of_2(num_pairs)
    heads = min(triton.next_power_of_2(num_heads), max(1, TILE // (2 * pairs)))
    return heads, pairs, 4


def variants() -> list[Variant]:
    """The table; heads of 128, turned whole in both orders and in part."""
    types = {"positions": "*i32", "position_stride": "i32", "frequencies": "*fp64", "table": "*fp32"}
    types |= {"table_stride": "i32", "num_tokens": "i32", "num_pairs": "i32", "high": "fp32", "low": "fp32"}
    # Not registers: what sine and cosine of huge angles lay out in memory.
    spills = dict.fromkeys(("sm_80", "sm_90", "sm_100"), 48)
    table = Variant("table", rope_table_rows, types, {"TOKENS": TABLE_TOKENS, "PAIRS": 64}, spills=spills)
    return [table] + [_rotate_variant(*case) for case in ((64, 0, False), (64, 0, True), (32, 64, False))]


def _rotate_variant(num_pairs: int, rest: int, interleaved: bool) -> Variant:
    integers = ("x_token", "x_head", "table_stride", "out_token", "out_head", "num_heads", "head_dim", "num_pairs")
    types = {"x": "*bf16", "table": "*fp32", "out": "*bf16"} | dict.fromkeys(integers, "i32")
    heads, pairs, num_warps = tile_of(32, num_pairs)
    constants = {"HEADS": heads, "PAIRS": pairs, "REST": rest, "INTERLEAVED": interleaved}
    name = f"bf16 {2 * num_pairs} of {2 * num_pairs + rest}" + (" interleaved" if interleaved else "")
    aligned = tuple(name for name in integers if name != "num_heads")
    return Variant(name, rotate_heads, types, constants, num_warps, aligned=aligned)
