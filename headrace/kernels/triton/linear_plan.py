"""How a product with weights is divided: tiles, shares of the columns, arithmetic. Plain numbers, the same everywhere.

Bandwidth needs bytes in flight: an H200 moves 4.3e12 bytes/s at some 700 ns, 3 MB, of which each of 132 processors
holds 23 KB; loads do not arrive evenly, so it shall have 40 KB. A program has `stages` - 1 steps of 8 or 16 KB.

The number of shares depends on the shapes of weights and the processors alone, never on the rows of x: up to few_rows,
and beyond, a row's sums are the same whatever the number of rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from headrace.kernels.device_weight import WeightLayout

IN_FLIGHT_BYTES = 40 << 10
MOST_SPLITS = 16
# What a program costs besides its steps, in steps: its first bytes' way, and its sums' to memory and back.
OVERHEAD_STEPS = 1
MOST_TOKENS = 32  # rows of x that one program takes


@dataclass(frozen=True)
class Tile:
    """A program's rows of the weight, chunks of 16 bytes of each row in a step, warps, and stages of the pipeline."""

    rows: int
    chunks: int
    warps: int
    stages: int

    @property
    def step_bytes(self) -> int:
        return 16 * self.rows * self.chunks


# Few rows of x: a warp reads 512 bytes of a row at once, and rows of a thread (rows / warps) share each x it loads.
# A part of x must be fewer numbers than a program has threads: more are shared out, and cost barriers or shuffles.
# Many: the more rows of the weight, the less often x is read from the second cache. It is 0.25 times the bytes of a
# 16-bit weight at 16 rows of x, 1 times those of a 4-bit one at 32.
_FEW = {"float": Tile(rows=64, chunks=16, warps=8, stages=4), "codes": Tile(rows=32, chunks=32, warps=8, stages=4)}
_MANY = {"float": Tile(rows=64, chunks=16, warps=4, stages=4), "codes": Tile(rows=128, chunks=8, warps=8, stages=4)}
# Of the steps in flight, in shared memory, beside which two programs shall find room.
_SHARED_BYTES, _HIP_SHARED_BYTES = 96 << 10, 48 << 10


def staged_bytes(layout: WeightLayout, tile: Tile, tokens: int, x_bytes: int, norm: bool) -> int:
    """What a step in flight takes: codes, their upper bits, and x (and the norm's weight) for each part of them."""
    words = tile.chunks * 4
    upper = tile.rows * words * layout.parts * layout.high_bits // 8
    columns = words * layout.parts if layout.bits else words * 2  # of floats at most 8 to a chunk
    return tile.step_bytes + upper + columns * (tokens * x_bytes + (4 if norm else 0))


def _stages(tile: Tile, step_bytes: int, hip: bool) -> int:
    """How many fit."""
    if hip:
        return 2 if step_bytes <= _HIP_SHARED_BYTES else 1
    return max(2, min(tile.stages, 1 + _SHARED_BYTES // step_bytes))


@dataclass(frozen=True)
class LinearPlan:
    """operand: what tensor cores multiply; None: multiply-add of few rows. precision: of float32 operands."""

    tile: Tile
    tokens: int  # rows of x of a program
    chunks: int  # of a step
    num_tiles: int
    splits: int
    steps: int  # of a share
    operand: str | None
    precision: str = "ieee"


def few_rows_of(layout: WeightLayout) -> int:
    """Rows of x up to which multiply-add is cheaper than tensor cores: narrow codes leave no time for more of it."""
    return 2 if 0 < layout.bits < 8 else 4


def splits_of(num_tiles: int, steps: int, resident: int, multiprocessors: int) -> int:
    """Into how many shares the columns are cut: that with which the busiest processor is done first.

    It works off its programs one after the other, `resident` at a time; with fewer it lacks bytes in flight.
    """

    def cost(splits: int) -> float:
        programs = -(-num_tiles * splits // multiprocessors)
        return programs * (-(-steps // splits) + OVERHEAD_STEPS) * max(1.0, resident / programs)

    return min(range(1, min(MOST_SPLITS, steps) + 1), key=lambda splits: (cost(splits), splits))


def operand_of(
    x_dtype: str, weight_dtype: str, layout: WeightLayout, precision: str, norm: bool, hip: bool = False
) -> tuple[str, str]:
    """What tensor cores multiply, and how, where x is of x_dtype; weight_dtype: of a float weight, else "".

    Products of exact operands are exact: a 16-bit x meets its own type, or codes of up to 8 bits with a scale per row.
    """
    operand, how = _operand(x_dtype, weight_dtype, layout, precision, norm)
    return operand, "ieee" if hip else how


def _operand(x_dtype: str, weight_dtype: str, layout: WeightLayout, precision: str, norm: bool) -> tuple[str, str]:
    exact_codes = layout.bits == 8 and layout.scales == "row"
    same = weight_dtype == x_dtype or (exact_codes and x_dtype != "float32")
    if x_dtype != "float32" and not norm and same:
        return x_dtype, "ieee"
    if precision == "exact" or weight_dtype == "float32" or (x_dtype == "float32" and precision == "auto"):
        return "float32", "tf32" if precision == "fast" else "tf32x3"
    if weight_dtype == "float16" or (x_dtype == "float16" and (norm or weight_dtype == "bfloat16")):
        return "float32", "tf32"  # as many digits as fp16 has, and no overflow of x before its norm
    return ("float16" if x_dtype == "float16" else "bfloat16"), "ieee"


@functools.lru_cache(1024)
def plan_of(
    layout: WeightLayout,
    row_chunks: int,
    rows: tuple[int, ...],
    tokens: int,
    multiprocessors: int,
    operand: tuple[str, str],
    *,
    x_bytes: int = 2,
    norm: bool = False,
    gated: bool = False,
    tiles_alone: bool = False,
    hip: bool = False,
) -> LinearPlan:
    """rows: of each weight of the launch; row_chunks: 16-byte chunks of a row; tiles_alone: never multiply-add.

    x_bytes: of a number of x; norm: whether x is normed first.
    """
    few = tokens <= few_rows_of(layout) and not tiles_alone
    tile = (_FEW if few else _MANY)["codes" if layout.bits else "float"]
    chunks = max(1 if few else 4, min(tile.chunks, _power_above(row_chunks)))
    num_tiles = -(-rows[0] // tile.rows) if gated else sum(-(-each // tile.rows) for each in rows)
    all_steps = -(-row_chunks // chunks)
    in_flight = (tile.stages - 1) * tile.step_bytes
    splits = splits_of(num_tiles, all_steps, max(2, -(-IN_FLIGHT_BYTES // in_flight)), multiprocessors)
    steps = -(-all_steps // splits)
    splits = -(-all_steps // steps)  # none is left without columns
    in_program = _power_above(tokens) if few else 16 if tokens <= 16 else MOST_TOKENS
    step_bytes = staged_bytes(layout, tile, in_program, x_bytes, norm)
    tile = replace(tile, stages=_stages(tile, step_bytes, hip))
    return LinearPlan(tile, in_program, chunks, num_tiles, splits, steps, None if few else operand[0], operand[1])


def _power_above(number: int) -> int:
    return 1 << (max(number, 1) - 1).bit_length()
