"""Rotary positions: what turns how far, and the turning. (In a model that is part of `append_pages`.)

    inverse_frequencies(config) -> w [rotary_dim / 2]                      theta^(-2i / rotary_dim), scaled
    rope_table(positions [tokens], w) -> [tokens, rotary_dim]              cos(p w_i), then sin(p w_i), times magnitude
    rotate(x [tokens, heads, head_dim], table) -> like x                   the first rotary_dim columns in pairs
    rotated pair (a, b) = (a cos - b sin, b cos + a sin)

Pairs are (2i, 2i + 1) when interleaved, else (i, i + rotary_dim / 2). The table is made once per step for all layers.

Su et al. 2021, "RoFormer"; Peng et al. 2023, "YaRN"; the Llama 3 report for factors per frequency.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.config import RopeConfig
from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, check_writable, dtype_name, empty_like, shape_of
from headrace.ops import gpu_rows
from headrace.ops.late import late
from headrace.ops.per_isa import per_isa
from headrace.ops.per_numpy import numpy_kernel
from headrace.ops.select import Kernel, Request, Traffic, choose, placed

DTYPES = ("float32", "float16", "bfloat16")


def inverse_frequencies(config: RopeConfig, factors: np.ndarray | None = None) -> np.ndarray:
    """Radians per position of each pair, float64 [rotary_dim / 2].

    factors: [rotary_dim / 2], what each frequency is divided by (a file's rope_freqs.weight); needed for "llama3".
    """
    pairs = _pairs(config)
    plain = config.theta ** (-np.arange(pairs) / pairs)
    if factors is not None and np.shape(factors) != (pairs,):
        raise ArgumentError(f"factors: expected [{pairs}], got {list(np.shape(factors))}")
    if config.scaling == "llama3" and factors is None:
        raise ArgumentError("factors: expected one per frequency for llama3 scaling, got None", "rope_freqs.weight")
    if config.scaling == "linear":
        plain = plain / config.factor
    elif config.scaling == "yarn":
        plain = _yarn_frequencies(config, plain)
    elif config.scaling not in ("none", "llama3"):
        raise ArgumentError(f"scaling: expected none, linear, llama3 or yarn, got {config.scaling!r}")
    return plain if factors is None else plain / np.asarray(factors, np.float64)


def magnitude(config: RopeConfig) -> float:
    """What queries and keys are multiplied by while they are rotated: 1 unless yarn stretches the context."""
    if config.scaling != "yarn" or config.factor <= 1:
        return config.attention_factor
    return config.attention_factor * (0.1 * math.log(config.factor) + 1.0)


def _pairs(config: RopeConfig) -> int:
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        raise ArgumentError(f"rotary_dim: expected an even number >= 2, got {config.rotary_dim}")
    if not (config.theta > 1 and config.factor > 0):
        raise ArgumentError(f"theta, factor: expected more than 1 and more than 0, got {config.theta}, {config.factor}")
    return config.rotary_dim // 2


def _yarn_frequencies(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Fast pairs as they are, slow ones divided by the factor, a linear ramp between the two."""
    if config.original_context_len < 1:
        raise ArgumentError(f"original_context_len: expected at least 1 for yarn, got {config.original_context_len}")
    low = max(math.floor(_pair_of_turns(config, config.yarn_beta_fast)), 0)
    high = min(math.ceil(_pair_of_turns(config, config.yarn_beta_slow)), config.rotary_dim - 1)
    ramp = np.clip((np.arange(plain.size) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - ramp) + plain / config.factor * ramp


def _pair_of_turns(config: RopeConfig, turns: float) -> float:
    """Which pair (a fraction) turns this many times within the original context."""
    return (
        config.rotary_dim * math.log(config.original_context_len / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
    )


def rope_table(
    positions: Any, inverse_frequencies: Any, *, magnitude: float = 1.0, out: Any = None, kernel: str | None = None
) -> Any:
    """Cosines, then sines, of every position and pair, float32 [tokens, rotary_dim].

    positions: int32 [tokens]; inverse_frequencies: float64 or float32 [rotary_dim / 2]. Angles are float64: a position
    of 100000 is as exact as one of 10.
    """
    shape, pairs = shape_of(positions, "positions"), shape_of(inverse_frequencies, "inverse_frequencies")
    if len(shape) != 1 or len(pairs) != 1:
        text = f"positions, inverse_frequencies: expected one dimension each, got {list(shape)}, {list(pairs)}"
        raise ArgumentError(text)
    if not math.isfinite(magnitude):
        raise ArgumentError(f"magnitude: expected a finite number, got {magnitude}")
    asked = Request("rope_table", {"positions": shape}, {}, Traffic(8 * shape[0] * pairs[0], 60 * shape[0] * pairs[0]))
    check_same_device({"positions": positions, "inverse_frequencies": inverse_frequencies})
    run = choose(table_kernels(), placed(asked, positions), kernel).run
    return run(positions, inverse_frequencies, float(magnitude), out)


def rotate(x: Any, table: Any, *, interleaved: bool = True, out: Any = None, kernel: str | None = None) -> Any:
    """Heads turned by their token's row of the table; columns from rotary_dim on stay as they are.

    x: [tokens, heads, head_dim] float32, float16 or bfloat16; table: from `rope_table`, [tokens, rotary_dim] float32;
    pairs are (2i, 2i + 1) when interleaved, else (i, i + rotary_dim / 2). out: the like of x, new when None; x itself
    turns it in place. Raises ArgumentError for what does not fit.
    """
    arrays = {"x": x, "table": table} | ({} if out is None else {"out": out})
    check_same_device(arrays)
    asked = placed(rotate_request({name: shape_of(array, name) for name, array in arrays.items()}, dtype_name(x)), x)
    if dtype_name(table) != "float32" or (out is not None and dtype_name(out) not in DTYPES):
        raise ArgumentError(f"table: expected float32, and out of {', '.join(DTYPES)}, got {dtype_name(table)}")
    chosen = choose(rotate_kernels(), asked, kernel)
    out = empty_like(x, asked.shapes["x"], dtype_name(x)) if out is None else out
    check_writable(out, "out")
    chosen.run(x, table, bool(interleaved), out)
    return out


def rotate_request(shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32") -> Request:
    """The request of rotate, by its checks: x is read and written once."""
    x, table = shapes["x"], shapes["table"]
    if len(x) != 3 or dtype not in DTYPES:
        raise ArgumentError(f"x: expected [tokens, heads, head_dim] of {', '.join(DTYPES)}, got {dtype} {list(x)}")
    if len(table) != 2 or table[0] != x[0] or table[1] % 2 or not 2 <= table[1] <= x[2]:
        text = f"table: expected [{x[0]}, rotary_dim] with an even rotary_dim of 2 to {x[2]}, got {list(table)}"
        raise ArgumentError(text)
    if shapes.get("out", x) != x:
        raise ArgumentError(f"out: expected {list(x)}, got {list(shapes['out'])}")
    elements = math.prod(x)
    traffic = Traffic(2 * elements * (4 if dtype == "float32" else 2) + 4 * math.prod(table), 3 * elements)
    return Request("rotate", shapes, {"x": dtype}, traffic)


def table_reference(positions: np.ndarray, inverse_frequencies: np.ndarray, magnitude: float = 1.0) -> np.ndarray:
    """The table in float64."""
    angles = positions.astype(np.float64)[:, None] * inverse_frequencies.astype(np.float64)
    return magnitude * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def rotate_reference(x: np.ndarray, table: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotated heads [tokens, heads, head_dim] in float64."""
    x, pairs = x.astype(np.float64), table.shape[1] // 2
    cosines, sines = table[:, None, :pairs].astype(np.float64), table[:, None, pairs:].astype(np.float64)
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    rotated = x.copy()
    rotated[..., first] = x[..., first] * cosines - x[..., second] * sines
    rotated[..., second] = x[..., second] * cosines + x[..., first] * sines
    return rotated


@functools.cache
def table_kernels() -> tuple[Kernel, ...]:
    """The kernels of rope_table: one on the CPU, since it is libm's double precision that counts."""
    return *gpu_rows.table_kernels(), *per_isa(late("headrace.kernels.cpu.rope", "run_table"), ("portable",))


@functools.cache
def rotate_kernels() -> tuple[Kernel, ...]:
    """The kernels of rotate."""
    return *gpu_rows.rotate_kernels(), numpy_kernel("numpy_rope", "headrace.kernels.numpy.rope", "run_rotate")
