"""What a model is, how the engine runs, how tokens are drawn: frozen data, units in the names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from headrace.errors import ArgumentError

PACKED = ("auto", "never", "require")  # whether weights kept packed on disk are used
KV_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "int4")  # what pages may hold


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `interleaved`: pairs (0,1), (2,3)...; otherwise (i, i + rotary_dim/2)."""

    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = True
    scaling: str = "none"  # none, linear, llama3 (factors come with the weights), yarn
    factor: float = 1.0
    original_context_len: int = 0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder. Widths in elements, lengths in tokens."""

    architecture: str
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_len: int
    norm_eps: float
    rope: RopeConfig
    value_head_dim: int = 0
    sliding_window: int | None = None  # keys each query sees, its own included
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    name: str = ""


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. None: decided from the machine and the model.

    kv_dtype: one of KV_DTYPES. int8 and int4 are codes with a scale per token and head (`ops/kv_formats.py`).
    packed: one of PACKED, for weights that `headrace pack` has kept on disk (`weights/packed.py`).
    """

    threads: int | None = None
    context_len: int | None = None
    page_size: int = 64
    kv_dtype: str = "float16"
    chunk_len: int = 512  # tokens of a prompt computed in one step
    max_requests: int = 16  # in one step
    kv_cache_bytes: int | None = None  # None: a context for each request, but at most half of the machine's memory
    packed: str = "auto"

    def __post_init__(self) -> None:
        _positive(self, "threads", "context_len", "page_size", "chunk_len", "max_requests", "kv_cache_bytes")
        _among(self, "kv_dtype", KV_DTYPES, "names in full, as NumPy's")
        _among(self, "packed", PACKED)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. temperature 0 is greedy; a filter at its default does nothing.

    Order: repetition, presence and frequency penalties; then temperature; top_k; top_p; min_p.
    `repetition_penalty` covers prompt and answer, the other two the answer alone. One seed, one text.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    speculate: int = 0  # tokens guessed from earlier text and verified in one step; the answer stays the same
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise ArgumentError(f"stop: expected a tuple of strings, got the string {self.stop!r}", f"({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ArgumentError(f"stop: expected strings of at least one character, got {self.stop!r}")
        _whole(self, "max_tokens", 1)
        _whole(self, "top_k", 0)
        _whole(self, "speculate", 0)
        if self.seed is not None:
            _whole(self, "seed", 0)
        _within(self, "temperature", 0.0, math.inf)
        _within(self, "top_p", 0.0, 1.0)
        _within(self, "min_p", 0.0, 1.0)
        _within(self, "repetition_penalty", 1e-3, math.inf)
        _within(self, "presence_penalty", -math.inf, math.inf)
        _within(self, "frequency_penalty", -math.inf, math.inf)
        if self.top_p == 0.0:
            raise ArgumentError("top_p: expected more than 0 and at most 1, got 0.0", "temperature=0 for greedy")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            _whole(config, name, 1)


def _among(config: Any, name: str, allowed: tuple[str, ...], hint: str | None = None) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ArgumentError(f"{name}: expected {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}", hint)


def _whole(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value >= 2**63:
        raise ArgumentError(f"{name}: expected a whole number >= {least}, got {value!r}")


def _within(config: Any, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        limits = f"between {low:g} and {high:g}" if math.isfinite(high) else f">= {low:g}"
        raise ArgumentError(f"{name}: expected a finite number {limits}, got {value!r}")


def field_names(config_class: type) -> tuple[str, ...]:
    """The fields of one of these classes, in order: command lines and servers are built from them."""
    return tuple(item.name for item in fields(config_class))
