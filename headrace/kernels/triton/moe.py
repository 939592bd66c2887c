"""Mixture of experts on a GPU: grouped gate·up and down products over tokens sorted by expert, weights read once.

Wins always there. Bound: few tokens, the bytes of the chosen experts; many, 6 * tokens * top_k * dim * ffn_dim FLOPs.
Schedule, up to 4 tokens ("direct", no sorting; two launches):
  1. A program per (token, place) and some columns of ffn_dim: it reads which expert, streams those rows of gate and up
     once, multiplies by x in float32 and writes activation(gate x) * up x. Programs of the same
     columns start together: a row that two tokens want is read from memory once.
  2. A program per token and some columns of dim: all its experts' rows of down one after another, weighted, in one sum.
More tokens ("grouped"; five launches, none of which waits for the host):
  1. `moe_routing.group_pairs`: pairs by expert, tiles of 16, 64 or 128 rows; how many at most follows from the shapes.
  2. A program per tile and columns of ffn_dim: rows of x gathered, tl.dot with gate and up, the activation, written.
  3. A program per tile and columns of dim: tl.dot with down, times the weight, written to the pair's own row.
  4. A token's rows are added in the order of its places: no atomics, the same bits in every run.
Source: Shazeer et al. 2017; tiles of tokens sorted by expert: Gale et al. 2022, "MegaBlocks".
Experts in int8 or float8 codes are multiplied by their blocks' scales, and rounded to x's type, as they come in.
Error: sums in float32; what lies between the two products, and a pair's result, in x's own type: two roundings of it.
float32: tf32x3 products (IEEE on AMD and in the direct form), with precision "fast" tf32.
Speed: not measured yet (`headrace bench gpu`). Predicted: docs/kernels/moe.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from headrace.kernels.chips import LITTLE_MEMORY
from headrace.kernels.triton.launch import INTERPRETED, chip_of, dot, on_device_of
from headrace.kernels.triton.moe_routing import group_pairs
from headrace.kernels.triton.rows import packed
from headrace.kernels.triton.variants import Variant

DIRECT_TOKENS = 4  # up to which experts are rarely shared, and sorting would only cost
COMBINED = 1024  # columns of a program that adds up
CODED_ROWS = 64  # of tiles, at most, of experts in codes: turning these into numbers takes the registers of more


class Tile(NamedTuple):
    """Rows (pairs), columns (of the output) and depth of a program's products, and how it is launched."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class Direct(NamedTuple):
    """Columns of the output and depth of a program's products with one row, and how it is launched."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By the width of an element.
DIRECT: Mapping[int, Direct] = {1: Direct(64, 128, 8, 3), 2: Direct(16, 512, 8, 3), 4: Direct(16, 256, 8, 3)}
# By the width of an element and the rows asked for (16, 64 or 128 pairs of an expert), for gate·up, which has two
# accumulators, and for down. "small": chips before Hopper, of which some have 99 KB of shared memory; AMD's have 64.
GATED: dict[str, dict[tuple[int, int], Tile]] = {
    "sm_90": {
        (2, 16): Tile(16, 64, 128, 4, 4),
        (2, 64): Tile(64, 64, 64, 4, 4),
        (2, 128): Tile(128, 128, 64, 8, 3),
        (4, 16): Tile(16, 64, 64, 4, 3),
        (4, 64): Tile(64, 64, 32, 4, 3),
        (4, 128): Tile(64, 64, 32, 4, 3),
    },
    "small": {
        (2, 16): Tile(16, 64, 128, 4, 3),
        (2, 64): Tile(64, 64, 64, 4, 3),
        (2, 128): Tile(128, 64, 64, 8, 3),
        (4, 16): Tile(16, 64, 64, 4, 3),
        (4, 64): Tile(64, 32, 32, 4, 3),
        (4, 128): Tile(64, 32, 32, 4, 3),
    },
    "amd": {
        (2, 16): Tile(16, 64, 64, 4, 2),
        (2, 64): Tile(64, 64, 64, 4, 2),
        (2, 128): Tile(128, 64, 64, 8, 2),
        (4, 16): Tile(16, 64, 64, 4, 2),
        (4, 64): Tile(64, 32, 32, 4, 2),
        (4, 128): Tile(64, 32, 32, 4, 2),
    },
}
DOWN: dict[str, dict[tuple[int, int], Tile]] = {
    "sm_90": GATED["sm_90"] | {(2, 64): Tile(64, 128, 64, 4, 4)},
    "small": GATED["small"] | {(2, 64): Tile(64, 128, 64, 4, 3), (2, 128): Tile(128, 128, 64, 8, 3)},
    "amd": GATED["amd"] | {(2, 64): Tile(64, 128, 64, 4, 2), (2, 128): Tile(128, 128, 64, 8, 2)},
}
_CHIPS = {"sm_90": ("sm_90", "sm_100"), "small": ("sm_80",), "amd": ("gfx942",)}


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """silu, gelu by the error function, or gelu by its usual approximation, of float32."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(0.0 - x))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def scaled(codes, scales, expert, columns, num_columns, start, length, block_rows, block_cols, ACROSS: tl.constexpr):
    """Weights from codes of some columns, from `start` on; float32 where there are scales. ACROSS: columns are rows."""
    if scales is not None:
        blocks = (expert * (num_columns // block_rows) + columns // block_rows) * (length // block_cols)
        scale = tl.load(scales + blocks + start // block_cols, mask=columns < num_columns, other=0.0)
        codes = codes.to(tl.float32) * (scale[None, :] if ACROSS else scale[:, None])
    return codes


# Direct: one row a program


@triton.jit
def gate_up_row(
    x, gate, up, gate_scales, up_scales, experts, hidden, x_stride, gate_expert, gate_row, up_expert, up_row,
    num_experts, dim, ffn_dim, block_rows, block_cols,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some columns of a pair's hidden row."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < ffn_dim)[:, None]
    gate += expert * gate_expert + columns.to(tl.int64)[:, None] * gate_row
    up += expert * up_expert + columns.to(tl.int64)[:, None] * up_row
    x += pair // TOP_K * x_stride
    gate_sum = tl.zeros([COLUMNS, DEPTH], tl.float32)
    up_sum = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(0, dim, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        mask = inside & (depth < dim)[None, :]
        values = tl.load(x + depth, mask=depth < dim, other=0.0).to(tl.float32)[None, :]
        block = (start, dim, block_rows, block_cols)
        gate_part = tl.load(gate + depth[None, :], mask=mask, other=0.0)
        up_part = tl.load(up + depth[None, :], mask=mask, other=0.0)
        gate_sum += values * scaled(gate_part, gate_scales, expert, columns, ffn_dim, *block, False).to(tl.float32)
        up_sum += values * scaled(up_part, up_scales, expert, columns, ffn_dim, *block, False).to(tl.float32)
    y = activated(tl.sum(gate_sum, axis=1), ACTIVATION) * tl.sum(up_sum, axis=1)
    tl.store(hidden + pair * ffn_dim + columns, y.to(hidden.dtype.element_ty), mask=columns < ffn_dim)


@triton.jit
def down_row(
    hidden, down, down_scales, experts, weights, residual, out, down_expert, down_row_stride, residual_stride,
    out_stride, num_experts, dim, ffn_dim, block_rows, block_cols,
    TOP_K: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some columns of a token's output: its experts in the order of its places."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < dim)[:, None]
    total = tl.zeros([COLUMNS], tl.float32)
    for place in range(TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(experts + pair).to(tl.int64)
        if (expert >= 0) & (expert < num_experts):
            matrix = down + expert * down_expert + columns.to(tl.int64)[:, None] * down_row_stride
            sums = tl.zeros([COLUMNS, DEPTH], tl.float32)
            for start in range(0, ffn_dim, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                values = tl.load(hidden + pair * ffn_dim + depth, mask=depth < ffn_dim, other=0.0).to(tl.float32)
                mask = inside & (depth < ffn_dim)[None, :]
                part = tl.load(matrix + depth[None, :], mask=mask, other=0.0)
                block = (start, ffn_dim, block_rows, block_cols)
                sums += values[None, :] * scaled(part, down_scales, expert, columns, dim, *block, False).to(tl.float32)
            total += tl.sum(sums, axis=1) * tl.load(weights + pair)
    if residual is not None:
        total += tl.load(residual + token * residual_stride + columns, mask=columns < dim, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=columns < dim)


# Grouped: tiles of rows that share an expert


@triton.jit
def tile_of(tiles, number):
    """Its expert, -1 for none, its first row and the end of its rows."""
    return tl.load(tiles + number * 3), tl.load(tiles + number * 3 + 1), tl.load(tiles + number * 3 + 2)


@triton.jit
def gate_up_tile(
    x, gate, up, gate_scales, up_scales, order, tiles, hidden, x_stride, gate_expert, gate_row, up_expert, up_row,
    dim, ffn_dim, block_rows, block_cols,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the hidden rows, in the order of `order`."""
    expert, first, end = tile_of(tiles, tl.program_id(1))
    if expert < 0:
        return
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    numbers = first + tl.arange(0, ROWS)
    row_mask = (numbers < end)[:, None]
    tokens = tl.load(order + numbers, mask=numbers < end, other=0) // TOP_K
    rows = x + tokens.to(tl.int64)[:, None] * x_stride
    inside = (columns < ffn_dim)[None, :]
    gate += expert.to(tl.int64) * gate_expert + columns.to(tl.int64)[None, :] * gate_row
    up += expert.to(tl.int64) * up_expert + columns.to(tl.int64)[None, :] * up_row
    gate_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, dim, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        mask = inside & (depth < dim)[:, None]
        left = tl.load(rows + depth[None, :], mask=row_mask & (depth < dim)[None, :], other=0.0)
        block = (start, dim, block_rows, block_cols)
        gate_part = tl.load(gate + depth[:, None], mask=mask, other=0.0)
        up_part = tl.load(up + depth[:, None], mask=mask, other=0.0)
        gate_part = scaled(gate_part, gate_scales, expert, columns, ffn_dim, *block, True).to(left.dtype)
        up_part = scaled(up_part, up_scales, expert, columns, ffn_dim, *block, True).to(left.dtype)
        gate_sum = dot(left, gate_part, gate_sum, PRECISION)
        up_sum = dot(left, up_part, up_sum, PRECISION)
    y = activated(gate_sum, ACTIVATION) * up_sum
    places = hidden + numbers.to(tl.int64)[:, None] * ffn_dim + columns[None, :]
    tl.store(places, y.to(hidden.dtype.element_ty), mask=row_mask & inside)


@triton.jit
def down_tile(
    hidden, down, down_scales, order, tiles, weights, parts, down_expert, down_row_stride, dim, ffn_dim,
    block_rows, block_cols,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the pairs' weighted outputs, each in its own row of `parts`."""
    expert, first, end = tile_of(tiles, tl.program_id(1))
    if expert < 0:
        return
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    numbers = first + tl.arange(0, ROWS)
    row_mask = (numbers < end)[:, None]
    pairs = tl.load(order + numbers, mask=numbers < end, other=0)
    rows = hidden + numbers.to(tl.int64)[:, None] * ffn_dim
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    matrix = down + expert.to(tl.int64) * down_expert + columns.to(tl.int64)[None, :] * down_row_stride
    for start in range(0, ffn_dim, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        mask = (columns < dim)[None, :] & (depth < ffn_dim)[:, None]
        left = tl.load(rows + depth[None, :], mask=row_mask & (depth < ffn_dim)[None, :], other=0.0)
        part = tl.load(matrix + depth[:, None], mask=mask, other=0.0)
        block = (start, ffn_dim, block_rows, block_cols)
        part = scaled(part, down_scales, expert, columns, dim, *block, True).to(left.dtype)
        acc = dot(left, part, acc, PRECISION)
    y = acc * tl.load(weights + pairs, mask=numbers < end, other=0.0)[:, None]
    places = parts + pairs.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(places, y.to(parts.dtype.element_ty), mask=row_mask & (columns < dim)[None, :])


@triton.jit
def add_parts(
    parts, experts, residual, out, residual_stride, out_stride, num_experts, dim, TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A token's outputs, added in the order of its places; those of experts elsewhere were never written."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for place in range(TOP_K):
        pair = token * TOP_K + place
        expert = tl.load(experts + pair)
        here = (expert >= 0) & (expert < num_experts)
        total += tl.load(parts + pair * dim + columns, mask=(columns < dim) & here, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * residual_stride + columns, mask=columns < dim, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=columns < dim)


# Launches


def tile_rows(num_pairs: int, num_experts: int, deterministic: bool) -> int:
    """Rows of the tiles: by pairs per expert, or always the same ones."""
    if deterministic:
        return 64
    each = num_pairs / num_experts
    return 16 if each <= 16 else 64 if each <= 96 else 128


def run(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """The mixture in arrays["out"]. arrays: x, gate, up, down, experts, weights, out, perhaps residual (ops/moe.py)."""
    arrays = {name: packed(array, name) for name, array in arrays.items()}
    whole = ("experts", "weights", "gate_scales", "up_scales", "down_scales")
    arrays |= {name: arrays[name].contiguous() for name in whole if name in arrays}
    if not arrays["out"].numel():
        return
    with on_device_of(arrays["x"]):
        if arrays["x"].shape[0] <= DIRECT_TOKENS and not options["deterministic"]:
            _run_direct(arrays, options)
        else:
            _run_grouped(arrays, options)


def _run_direct(arrays: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> None:
    x, gate, up, down, experts = (arrays[name] for name in ("x", "gate", "up", "down", "experts"))
    (tokens, dim), (num_experts, ffn_dim, _), top_k = x.shape, gate.shape, experts.shape[1]
    tile, residual, out = DIRECT[gate.element_size()], arrays.get("residual"), arrays["out"]
    hidden = torch.empty((tokens * top_k, ffn_dim), dtype=x.dtype, device=x.device)
    shape = {"TOP_K": top_k, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    gate_up_row[(tokens * top_k, triton.cdiv(ffn_dim, tile.columns))](
        x, gate, up, arrays.get("gate_scales"), arrays.get("up_scales"), experts, hidden,
        x.stride(0), gate.stride(0), gate.stride(1), up.stride(0), up.stride(1),
        num_experts, dim, ffn_dim, *_blocks(arrays, "gate"), ACTIVATION=options["activation"], **shape, **launch,
    )  # fmt: skip
    down_row[(tokens, triton.cdiv(dim, tile.columns))](
        hidden, down, arrays.get("down_scales"), experts, arrays["weights"], residual, out, down.stride(0),
        down.stride(1), 0 if residual is None else residual.stride(0), out.stride(0), num_experts, dim, ffn_dim,
        *_blocks(arrays, "down"), **shape, **launch,
    )  # fmt: skip


def _run_grouped(arrays: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> None:
    x, gate, up, down, experts = (arrays[name] for name in ("x", "gate", "up", "down", "experts"))
    (tokens, dim), (num_experts, ffn_dim, _), top_k = x.shape, gate.shape, experts.shape[1]
    pairs, residual, out = tokens * top_k, arrays.get("residual"), arrays["out"]
    rows = tile_rows(pairs, num_experts, options["deterministic"])
    rows = min(rows, CODED_ROWS) if "gate_scales" in arrays else rows
    chip = _table_of(x)
    gated, down_one = GATED[chip][x.element_size(), rows], DOWN[chip][x.element_size(), rows]
    order, tiles = group_pairs(experts, num_experts, gated.rows)
    hidden = torch.empty((pairs, ffn_dim), dtype=x.dtype, device=x.device)
    parts = torch.empty((pairs, dim), dtype=x.dtype, device=x.device)
    precision = _precision(x, options["precision"])
    gate_up_tile[(triton.cdiv(ffn_dim, gated.columns), len(tiles))](
        x, gate, up, arrays.get("gate_scales"), arrays.get("up_scales"), order, tiles, hidden,
        x.stride(0), gate.stride(0), gate.stride(1), up.stride(0), up.stride(1),
        dim, ffn_dim, *_blocks(arrays, "gate"), TOP_K=top_k, ACTIVATION=options["activation"],
        **_launch(gated), PRECISION=precision,
    )  # fmt: skip
    down_tile[(triton.cdiv(dim, down_one.columns), len(tiles))](
        hidden, down, arrays.get("down_scales"), order, tiles, arrays["weights"], parts, down.stride(0), down.stride(1),
        dim, ffn_dim, *_blocks(arrays, "down"),
        **_launch(down_one), PRECISION=precision,
    )  # fmt: skip
    add_parts[(tokens, triton.cdiv(dim, COMBINED))](
        parts, experts, residual, out, 0 if residual is None else residual.stride(0), out.stride(0), num_experts, dim,
        TOP_K=top_k, COLUMNS=COMBINED, num_warps=4,
    )  # fmt: skip


def _blocks(arrays: Mapping[str, torch.Tensor], name: str) -> tuple[int, int]:
    """Rows and columns that share a scale; 1 and 1 without scales."""
    if f"{name}_scales" not in arrays:
        return 1, 1
    rows, cols = (n // m for n, m in zip(arrays[name].shape[1:], arrays[f"{name}_scales"].shape[1:], strict=True))
    return rows, cols


def _launch(tile: Tile) -> dict[str, int]:
    shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return shape | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _table_of(x: torch.Tensor) -> str:
    """Which tiles its GPU has."""
    return {"sm_80": "small", LITTLE_MEMORY: "small", "gfx942": "amd"}.get(chip_of(x), "sm_90")


def _precision(x: torch.Tensor, precision: str) -> str:
    """Of float32 products: of their own accuracy on tensor cores where those can, else as asked."""
    if INTERPRETED or torch.version.hip:
        return "ieee"
    return "tf32" if precision == "fast" else "tf32x3"


def variants() -> list[Variant]:
    """Both forms in bf16 and float32, of Qwen3's and Mixtral's shapes."""
    return [
        *_direct_variants("bf16", 2),
        *_direct_variants("bf16", 1, "fp8e4nv"),
        *(each for rows in (16, 64) for each in _grouped_variants("sm_90", "bf16", 2, rows, "fp8e4nv")),
        *(v for chip in ("small", "amd") for rows in (16, 64) for v in _grouped_variants(chip, "bf16", 2, rows, "i8")),
        *(each for chip in GATED for rows in (16, 64, 128) for each in _grouped_variants(chip, "bf16", 2, rows)),
        *(each for chip in GATED for each in _grouped_variants(chip, "fp32", 4, 64)),
        _add_variant(),
    ]


_INTEGERS = (
    "x_stride",
    "gate_expert",
    "gate_row",
    "up_expert",
    "up_row",
    "dim",
    "ffn_dim",
    "down_expert",
    "down_row_stride",
    "out_stride",
    "residual_stride",
    "num_experts",
)


def _types(kernel: Any, dtype: str, codes: str, constants: Mapping[str, Any]) -> dict[str, str]:
    known = dict.fromkeys((*_INTEGERS, "block_rows", "block_cols"), "i32")
    known |= dict.fromkeys(("experts", "order", "tiles"), "*i32")
    known |= dict.fromkeys(("weights", "gate_scales", "up_scales", "down_scales"), "*fp32")
    known |= dict.fromkeys(("gate", "up", "down"), f"*{codes or dtype}")
    return {name: known.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constants}


def _variant(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], tile: Any, codes: str = "", **more: Any
) -> Variant:
    plain = {"gate_scales": None, "up_scales": None, "down_scales": None, "block_rows": 1, "block_cols": 1}
    constants = constants | {key: value for key, value in plain.items() if key in kernel.arg_names and not codes}
    aligned = {*_INTEGERS, "block_rows", "block_cols"} - {"num_experts", *constants}
    return Variant(
        f"{dtype} {name}" + (f", experts in {codes}" if codes else ""),
        kernel,
        _types(kernel, dtype, codes, constants),
        constants,
        tile.num_warps,
        tile.num_stages,
        aligned=tuple(name for name in kernel.arg_names if name in aligned),
        **more,
    )


def _direct_variants(dtype: str, width: int, codes: str = "") -> list[Variant]:
    tile = DIRECT[width]
    shape = {"TOP_K": 8, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    chips = ("sm_90", "sm_100") if codes == "fp8e4nv" else ("sm_80", "sm_90", "sm_100", "gfx942")
    gated = shape | {"ACTIVATION": "silu"}
    return [
        _variant("gate and up of a row", gate_up_row, dtype, gated, tile, codes, chips=chips),
        _variant("down of a row", down_row, dtype, shape | {"residual": None}, tile, codes, chips=chips),
    ]


def _grouped_variants(chip: str, dtype: str, width: int, rows: int, codes: str = "") -> list[Variant]:
    promised = {"sm_90": ("wgmma.mma_async",)} if width == 2 and rows >= 64 else {}
    found = []
    for name, kernel, tile, own in (
        ("gate and up", gate_up_tile, GATED[chip][width, rows], {"TOP_K": 8, "ACTIVATION": "silu"}),
        ("down", down_tile, DOWN[chip][width, rows], {}),
    ):
        shape: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
        shape |= {"PRECISION": "ieee" if chip == "amd" else "tf32x3"} | own
        more = {"instructions": promised, "chips": _CHIPS[chip]}
        found.append(_variant(f"{name}, {tile.rows} rows", kernel, dtype, shape, tile, codes, **more))
    return found


def _add_variant() -> Variant:
    constants = {"TOP_K": 8, "COLUMNS": COMBINED, "residual": None}
    return _variant("sums", add_parts, "bf16", constants, Tile(1, COMBINED, 0, 4, 3))
