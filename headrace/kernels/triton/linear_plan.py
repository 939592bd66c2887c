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
# What a program costs besides its steps, as bytes of them: its first bytes' way, and its sums' to memory and back.
OVERHEAD_BYTES = 16 << 10
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
_FEW = {
    "float": Tile(rows=64, chunks=16, warps=8, stages=4),
    "codes": Tile(rows=32, chunks=32, warps=8, stages=4),
    "integers": Tile(rows=64, chunks=16, warps=4, stages=4),
}
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
    integers: bool = False


def in_integers(layout: WeightLayout, precision: str, hip: bool = False) -> bool:
    """Whether few rows of x meet codes as integers."""
    return layout.values == "integer" and precision != "exact" and not hip


def few_rows_of(layout: WeightLayout, precision: str = "auto", hip: bool = False) -> int:
    """Rows of x up to which they are multiplied one by one, not over tensor cores: narrow codes leave no time for more
    than two, nor do integers that each row of x must become."""
    return 2 if 0 < layout.bits < 8 or in_integers(layout, precision, hip) else 4


def splits_of(num_tiles: int, steps: int, tile: Tile, multiprocessors: int) -> int:
    """Into how many shares the columns are cut: that with which the busiest processor is done first.

    It works off its programs one after the other, `resident` at a time; with fewer it lacks bytes in flight.
    """
    resident = max(2, -(-IN_FLIGHT_BYTES // ((tile.stages - 1) * tile.step_bytes)))
    overhead = OVERHEAD_BYTES / tile.step_bytes

    def cost(splits: int) -> float:
        programs = -(-num_tiles * splits // multiprocessors)
        return programs * (-(-steps // splits) + overhead) * max(1.0, resident / programs)

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
    precision: str = "auto",
    x_bytes: int = 2,
    norm: bool = False,
    gated: bool = False,
    tiles_alone: bool = False,
    hip: bool = False,
) -> LinearPlan:
    """rows: of each weight of the launch; row_chunks: 16-byte chunks of a row; tiles_alone: never multiply-add.

    x_bytes: of a number of x; norm: whether x is normed first.
    """
    few = tokens <= few_rows_of(layout, precision, hip) and not tiles_alone
    integers = few and in_integers(layout, precision, hip)
    tile = (_FEW if few else _MANY)["integers" if integers else "codes" if layout.bits else "float"]
    if integers:
        tile = replace(tile, rows=_integer_rows(layout, 1))
    chunks = max(1 if few else 4, min(tile.chunks, _power_above(row_chunks)))
    num_tiles = _num_tiles(rows, tile, gated)
    all_steps = -(-row_chunks // chunks)
    splits = splits_of(num_tiles, all_steps, tile, multiprocessors)
    steps = -(-all_steps // splits)
    splits = -(-all_steps // steps)  # none is left without columns
    in_program = _power_above(tokens) if few else 16 if tokens <= 16 else MOST_TOKENS
    if integers:
        tile = replace(tile, rows=_integer_rows(layout, in_program))
        num_tiles = _num_tiles(rows, tile, gated)
    step_bytes = staged_bytes(layout, tile, in_program, x_bytes, norm)
    tile = replace(tile, stages=_stages(tile, step_bytes, hip))
    multiplied = None if few else operand[0]
    return LinearPlan(tile, in_program, chunks, num_tiles, splits, steps, multiplied, operand[1], integers)


def _num_tiles(rows: tuple[int, ...], tile: Tile, gated: bool) -> int:
    return -(-rows[0] // tile.rows) if gated else sum(-(-each // tile.rows) for each in rows)


def _integer_rows(layout: WeightLayout, tokens: int) -> int:
    """Rows of the weight that registers allow: x is made integers once for all of a thread's, yet sixteen codes of 2
    bits to a word, or two rows of x, take twice as many of its registers."""
    return _FEW["integers"].rows >> ((layout.low_bits == 2) + (tokens > 1 and layout.low_bits < 8))


def _power_above(number: int) -> int:
    return 1 << (max(number, 1) - 1).bit_length()
