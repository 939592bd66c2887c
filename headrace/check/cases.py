"""Named cases of every op: one list for tests and benchmarks.

Sizes include 1, primes, and one off each width a kernel steps by (16 lanes, 32 columns, 8 rows, 256-column groups).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormCase:
    name: str
    tokens: int
    dim: int
    scale: float = 1.0


NORM = (
    NormCase("one", 1, 1),
    NormCase("below_lanes", 3, 15),
    NormCase("lanes", 8, 16),
    NormCase("prime", 7, 17),
    NormCase("two_steps", 9, 33),
    NormCase("default_model_decode", 1, 576),
    NormCase("default_model_prefill", 512, 576),
    NormCase("llama_8b", 4, 4096),
    NormCase("tiny_values", 5, 127, 1e-6),
    NormCase("huge_values", 5, 127, 1e4),
    NormCase("no_tokens", 0, 64),
)


@dataclass(frozen=True)
class LinearCase:
    """Columns are rounded up to the format's block."""

    name: str
    tokens: int
    rows: int
    cols: int


LINEAR = (
    LinearCase("one", 1, 1, 1),
    LinearCase("below_panel", 1, 15, 32),
    LinearCase("panel", 2, 16, 64),
    LinearCase("over_panel", 3, 17, 96),
    LinearCase("prime_tokens", 7, 48, 256),
    LinearCase("tile", 8, 33, 512),
    LinearCase("over_tile", 9, 31, 288),
    LinearCase("default_model_output", 1, 576, 576),
    LinearCase("prefill", 29, 80, 1536),
    LinearCase("no_tokens", 0, 16, 32),
)
