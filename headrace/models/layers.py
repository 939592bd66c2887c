"""The parts of a decoder: what weights each needs, and what it computes with the ops.

Everything takes and gives buffers of a program being recorded; x is [tokens, dim] float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.config import ModelConfig
from headrace.kernels.arrays import Buffer
from headrace.kv_cache.storage import LayerPages
from headrace.ops.attention_paged import paged_attention
from headrace.ops.linear import PackedWeight, linear, linear_gated, linear_many
from headrace.ops.page_append import append_pages


@dataclass(frozen=True)
class AttentionWeights:
    norm: np.ndarray  # [dim]
    query: PackedWeight  # [heads * head_dim, dim]
    key: PackedWeight  # [kv_heads * head_dim, dim]
    value: PackedWeight  # [kv_heads * value_head_dim, dim]
    output: PackedWeight  # [dim, heads * value_head_dim]
    biases: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    query_norm: np.ndarray | None = None  # [head_dim]
    key_norm: np.ndarray | None = None  # [head_dim]


@dataclass(frozen=True)
class FeedForwardWeights:
    norm: np.ndarray  # [dim]
    gate: PackedWeight  # [ffn_dim, dim]
    up: PackedWeight  # [ffn_dim, dim]
    down: PackedWeight  # [dim, ffn_dim]


@dataclass(frozen=True)
class LayerWeights:
    attention: AttentionWeights
    feed_forward: FeedForwardWeights


@dataclass(frozen=True)
class ModelWeights:
    embedding: PackedWeight  # [vocab, dim]
    layers: tuple[LayerWeights, ...]
    norm: np.ndarray  # [dim]
    head: PackedWeight  # [vocab, dim]; the embedding itself when tied
    rope_factors: np.ndarray | None = None  # [rotary_dim / 2] divisors of the frequencies

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that one decoded token reads; of the embedding it reads one row, which is left out."""
        packed = [self.head]
        for layer in self.layers:
            attention, feed_forward = layer.attention, layer.feed_forward
            packed += [attention.query, attention.key, attention.value, attention.output]
            packed += [feed_forward.gate, feed_forward.up, feed_forward.down]
        return sum(weight.num_bytes for weight in packed)


@dataclass(frozen=True)
class StepInputs:
    """What changes from step to step, in arrays whose addresses are fixed."""

    token_ids: Buffer  # [tokens] int32
    positions: Buffer  # [tokens] int32
    slots: Buffer  # [tokens] int32: page * page_size + offset
    query_starts: Buffer  # [requests + 1] int32
    sequence_lens: Buffer  # [requests] int32
    page_table: Buffer  # [requests, max_pages] int32
    output_rows: Buffer  # [outputs] int32


def attention(
    x: Buffer,
    weights: AttentionWeights,
    pages: LayerPages,
    *,
    rope: Buffer,
    step: StepInputs,
    config: ModelConfig,
    require: Sequence[str] = (),
) -> Buffer:
    """x + output(attention(norm(x))), with this step's keys and values appended to the pages."""
    matrices = [weights.query, weights.key, weights.value]
    query, key, value = linear_many(
        x, matrices, biases=weights.biases, norm=weights.norm, eps=config.norm_eps, require=require
    )
    query = append_pages(
        key.view(config.num_kv_heads, config.head_dim),
        value.view(config.num_kv_heads, config.value_head_dim),
        pages.keys,
        pages.values,
        slots=step.slots,
        key_scales=pages.key_scales,
        value_scales=pages.value_scales,
        query=query.view(config.num_heads, config.head_dim),
        table=rope,
        interleaved=config.rope.interleaved,
        query_norm=weights.query_norm,
        key_norm=weights.key_norm,
        eps=config.norm_eps,
        spread=pages.coded,  # keys have a few channels ten times as large as the others
    )
    mixed = _attended(query, pages, step, config, require).view(config.num_heads * config.value_head_dim)
    return linear(mixed, weights.output, residual=x, precision="fast", require=require)


def _attended(
    query: Buffer, pages: LayerPages, step: StepInputs, config: ModelConfig, require: Sequence[str]
) -> Buffer:
    window = (config.sliding_window - 1, None) if config.sliding_window else (None, None)
    return paged_attention(
        query,
        pages.keys,
        pages.values,
        step.page_table,
        step.sequence_lens,
        query_starts=step.query_starts,
        window=window,
        key_scales=pages.key_scales,
        value_scales=pages.value_scales,
        out_dtype="float32",
        deterministic="batch_invariant" in require or is_in_order(pages, config),
        require=require,
    ).out


def is_in_order(pages: LayerPages, config: ModelConfig) -> bool:
    """Whether attention sums so that a row depends on its own keys alone, though nobody asked for it.

    It does where that costs 1 to 3 % of it. For long heads it is a third; with scales decode would have to widen and
    transpose all keys as a prefill does.
    """
    return pages.key_scales is None and max(config.head_dim, config.value_head_dim) <= 64


def feed_forward(x: Buffer, weights: FeedForwardWeights, config: ModelConfig, require: Sequence[str] = ()) -> Buffer:
    """x + down(silu(gate(norm(x))) * up(norm(x))).

    What enters down has outliers that one int8 loses; gate and up, like attention's output, lose least.
    """
    gated = linear_gated(
        x, weights.gate, weights.up, norm=weights.norm, eps=config.norm_eps, precision="fast", require=require
    )
    return linear(gated, weights.down, residual=x, require=require)
