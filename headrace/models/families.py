"""Model families as data: what an architecture's name in a file means, and the numbers of the model in it.

A family is an entry of FAMILIES. What differs in structure (latent attention, experts) is a class in layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.config import ModelConfig, RopeConfig
from headrace.errors import ModelFileError, UnsupportedError


@dataclass(frozen=True)
class Family:
    """How an architecture differs from the plain decoder: norm, attention, norm, gated feed-forward."""

    architecture: str
    interleaved_rope: bool  # pairs (0, 1), (2, 3)...: GGUF's llama files are permuted to this
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    family.architecture: family
    for family in (
        Family("llama", interleaved_rope=True),
        Family("qwen2", interleaved_rope=False, qkv_bias=True),
        Family("qwen3", interleaved_rope=False, qk_norm=True),
    )
}

LARGEST = 1 << 24  # no width, length or count of a model comes near it
SMALLEST_REAL, LARGEST_REAL = 1e-30, 1e30  # between them no formula of positions overflows
LEAST_THETA = 1.001  # every pair must turn slower than the one before


class Numbers:
    """Checked reading of `<architecture>.<key>` from a file's metadata."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self.metadata = metadata
        self.prefix = prefix

    def raw(self, key: str) -> Any:
        return self.metadata.get(f"{self.prefix}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise ModelFileError(f"{self.prefix}.{key}: expected a whole number in 1..{LARGEST}, got {_short(value)}")
        return value

    def whole_or_none(self, key: str) -> int | None:
        """The number; None where the file has none, or 0."""
        value = self.raw(key)
        absent = value is None or (type(value) is int and value == 0)
        return None if absent else self.whole(key)

    def real(self, key: str, default: float | None = None, least: float = SMALLEST_REAL) -> float:
        value = self._value(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not least <= value <= LARGEST_REAL:
            limits = f"{least:g}..{LARGEST_REAL:g}"
            raise ModelFileError(f"{self.prefix}.{key}: expected a number in {limits}, got {_short(value)}")
        return float(value)

    def _value(self, key: str, default: float | None) -> Any:
        value = self.raw(key)
        value = default if value is None else value
        if value is None:
            raise ModelFileError(f"{self.prefix}.{key} is missing", "the file does not describe a whole model")
        return value

    def word(self, key: str, default: str) -> str:
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise ModelFileError(f"{self.prefix}.{key}: expected a word, got {_short(value)}")
        return default if value is None else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def config_from(metadata: Mapping[str, Any], vocab_size: int, tied_head: bool) -> ModelConfig:
    """The configuration a file describes.

    Raises UnsupportedError for an architecture that is not here, ModelFileError for numbers that cannot be.
    """
    family = _family(metadata)
    numbers = Numbers(metadata, family.architecture)
    if numbers.whole_or_none("expert_count"):
        raise UnsupportedError(f"{family.architecture}.expert_count: models with experts are not supported")
    dim, num_heads = numbers.whole("embedding_length"), numbers.whole("attention.head_count")
    num_kv_heads = numbers.whole("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise ModelFileError(f"attention.head_count: {num_heads} is no multiple of head_count_kv {num_kv_heads}")
    head_dim = numbers.whole("attention.key_length", max(1, dim // num_heads))
    context_len = numbers.whole("context_length")
    return ModelConfig(
        architecture=family.architecture,
        name=str(metadata.get("general.name", family.architecture)),
        num_layers=numbers.whole("block_count"),
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=numbers.whole("attention.value_length", head_dim),
        ffn_dim=numbers.whole("feed_forward_length"),
        vocab_size=vocab_size,
        context_len=context_len,
        norm_eps=numbers.real("attention.layer_norm_rms_epsilon"),
        rope=rope_from(numbers, family, head_dim, context_len),
        sliding_window=numbers.whole_or_none("attention.sliding_window"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_head=tied_head,
    )


def _family(metadata: Mapping[str, Any]) -> Family:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelFileError(f"general.architecture: expected a name, got {_short(name)}")
    if name not in FAMILIES:
        raise UnsupportedError(f"architecture {_short(name)} is not supported", f"supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def rope_from(numbers: Numbers, family: Family, head_dim: int, context_len: int) -> RopeConfig:
    """Rotary positions as the file describes them."""
    rotary_dim = numbers.whole("rope.dimension_count", head_dim)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise ModelFileError(f"rope.dimension_count: expected an even number <= {head_dim}, got {rotary_dim}")
    old_linear = numbers.real("rope.scale_linear", 1.0)
    scaling = numbers.word("rope.scaling.type", "linear" if old_linear != 1.0 else "none")
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"rope scaling {_short(scaling)} is not supported", "supported: none, linear, yarn")
    return RopeConfig(
        theta=numbers.real("rope.freq_base", 10000.0, LEAST_THETA),
        rotary_dim=rotary_dim,
        interleaved=family.interleaved_rope,
        scaling=scaling,
        factor=numbers.real("rope.scaling.factor", old_linear),
        original_context_len=numbers.whole("rope.scaling.original_context_length", context_len),
        yarn_beta_fast=numbers.real("rope.scaling.yarn_beta_fast", 32.0),
        yarn_beta_slow=numbers.real("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=numbers.real("rope.scaling.attn_factor", 1.0),
    )
