"""The decoder: token ids to logits. Run once, with buffers of a program, to record it; replayed for every step after.

x = embedding(ids);  for each layer: x = attention(x), x = feed_forward(x);  logits = head(norm(x[output_rows]))
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.config import ModelConfig
from headrace.kernels.arrays import Buffer
from headrace.kv_cache.storage import LayerPages
from headrace.models.layers import ModelWeights, StepInputs, attention, feed_forward
from headrace.ops.embedding import embedding, select_rows
from headrace.ops.linear import linear
from headrace.ops.norm import rms_norm
from headrace.ops.rope import inverse_frequencies, magnitude, rope_table


def logits(
    step: StepInputs,
    weights: ModelWeights,
    pages: Sequence[LayerPages],
    config: ModelConfig,
    *,
    require: Sequence[str] = (),
) -> Buffer:
    """Logits [outputs, vocab] of the step's output rows; its keys and values are appended to `pages`, one per layer.

    require: what every kernel of it must have (`ops/select.py`).
    """
    rows = select_rows(_layers(step, weights, pages, config, require), step.output_rows)
    return linear(rows, weights.head, norm=weights.norm, eps=config.norm_eps, require=require)


def hidden(
    step: StepInputs,
    weights: ModelWeights,
    pages: Sequence[LayerPages],
    config: ModelConfig,
    *,
    require: Sequence[str] = (),
) -> Buffer:
    """What the head would get of the output rows: [outputs, dim], normalized. Pages are appended to as for logits."""
    rows = select_rows(_layers(step, weights, pages, config, require), step.output_rows)
    return rms_norm(rows, weights.norm, eps=config.norm_eps)


def _layers(
    step: StepInputs, weights: ModelWeights, pages: Sequence[LayerPages], config: ModelConfig, require: Sequence[str]
) -> Buffer:
    x = embedding(step.token_ids, weights.embedding)
    frequencies = inverse_frequencies(config.rope, weights.rope_factors)
    rope = rope_table(step.positions, frequencies, magnitude=magnitude(config.rope))
    for layer, layer_pages in zip(weights.layers, pages, strict=True):
        x = attention(x, layer.attention, layer_pages, rope=rope, step=step, config=config, require=require)
        x = feed_forward(x, layer.feed_forward, config, require)
    return x
