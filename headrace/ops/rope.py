"""Rotary positions: what turns how far. (The turning is fused into `append_pages.py`.)

    inverse_frequencies(config) -> w [rotary_dim / 2]                      theta^(-2i / rotary_dim), scaled
    rope_table(positions [tokens], w) -> [tokens, rotary_dim]              cos(p w_i), then sin(p w_i), times magnitude
    rotated pair (a, b) = (a cos - b sin, b cos + a sin)

Pairs are (2i, 2i + 1) when interleaved, else (i, i + rotary_dim / 2). The table is made once per step for all layers.

Su et al. 2021, "RoFormer"; Peng et al. 2023, "YaRN"; the Llama 3 report for factors per frequency.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from headrace.config import RopeConfig
from headrace.errors import ArgumentError
from headrace.kernels.arrays import check_same_device, shape_of
from headrace.ops.late import late
from headrace.ops.per_isa import per_isa
from headrace.ops.select import Kernel, Request, Traffic, choose, placed


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
    """The kernels of rope_table: one, since it is libm's double precision that counts."""
    return per_isa(late("headrace.kernels.cpu.rope", "run_table"), ("portable",))
