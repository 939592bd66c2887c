"""Attention by its formula on the device: exact in float64, straightforward in float32, and the gradients of both.

Straightforward is what a plain loop in the type of the inputs would do: float32 sums, and weights rounded to 16 bits
where the inputs have 16. Of large calls a sample is computed: some queries of some heads, each against all of its
keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_SHIFT = 0.37


class Sample(NamedTuple):
    """Queries [rows, dim] of one head with its keys [keys, dim] and values; row i sees the first ends[i] keys."""

    query: Any
    keys: Any
    values: Any
    ends: Any  # int64 [rows]
    scale: float


def exact(sample: Sample) -> Any:
    """The mixture of values that each row sees, float64 [rows, value_dim]."""
    import torch

    return _mixture(sample, torch.float64, None)


def straightforward(sample: Sample, true: Any) -> Any:
    """The same in float32, its weights in the type of the inputs: the worse of two scales that weights may have, for a
    kernel that has not seen all keys scales them by the largest it has seen."""
    import torch

    narrow = None if sample.query.dtype == torch.float32 else sample.query.dtype
    one, other = (_mixture(sample, torch.float32, narrow, shift) for shift in (0.0, _SHIFT))
    return torch.where((other - true).abs() > (one - true).abs(), other, one)


def _mixture(sample: Sample, dtype: Any, narrow: Any, shift: float = 0.0) -> Any:
    import torch

    query, keys, values = (array.to(dtype) for array in sample[:3])
    scores = query @ keys.T * sample.scale
    hidden = torch.arange(len(keys), device=scores.device) >= sample.ends[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.exp(scores - scores.amax(dim=1, keepdim=True) - shift)
    used = weights if narrow is None else weights.to(narrow).to(dtype)
    return (used @ values) / weights.sum(dim=1, keepdim=True)


class Gradients(NamedTuple):
    """Of one KV head and the query heads [heads, tokens, dim] that read it; causal, as many queries as keys."""

    query: Any
    key: Any
    value: Any


def gradients(d_out: Any, sample: Gradients, scale: float, *, narrow: bool) -> Gradients:
    """The gradients of query [heads, tokens, dim], key [tokens, dim] and value; narrow: straightforward, else exact."""
    import torch

    dtype = torch.float32 if narrow else torch.float64
    kind = sample.query.dtype

    def rounded(array: Any) -> Any:
        return array.to(kind).to(dtype) if narrow and kind != torch.float32 else array

    query, key, value, d_out = (array.to(dtype) for array in (*sample, d_out))
    tokens = query.shape[1]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.softmax((query @ key.T * scale).masked_fill(hidden, -torch.inf), dim=-1)
    d_weights = d_out @ value.T
    own = (weights * d_weights).sum(dim=-1, keepdim=True)
    slopes = rounded(weights * (d_weights - own) * scale)
    d_key = torch.einsum("hqk,hqd->kd", slopes, query)
    d_value = torch.einsum("hqk,hqd->kd", rounded(weights), d_out)
    return Gradients(slopes @ key, d_key, d_value)
