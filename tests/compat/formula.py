"""Attention over the arrays of transformers, [batch, heads, tokens, head_dim], as its definition has it."""

from __future__ import annotations

from typing import Any

import torch


def formula(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **others: Any,
) -> tuple[Any, None]:
    """Attention as its definition has it, in the type of its arrays. A query that sees nothing: zeros.

    What "eager" computes of float64 is partly float32, and NaN for such a query.
    """
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        sink = s_aux.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    seen = scores.isfinite().any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~seen, 0), dim=-1).masked_fill(~seen, 0)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), None
