"""Dense attention by torch's FlexAttention: causality and windows as a mask of blocks, a cap as a function of scores.

Wins: nowhere that ours is as fast; it is here so that the choice can say so. Schedule: inductor's Triton template,
compiled by its first call (seconds) for each set of options, and again for other shapes; a mask of blocks is made once
for a shape and kept. Source: torch.nn.attention.flex_attention. Error: operands and weights in the query's type, sums
float32. On the CPU (tests) torch runs it uncompiled, over the whole matrix of scores. Not measured yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


@functools.cache
def _compiled() -> Any:
    made: Any = torch.compile(flex_attention)
    return made


def run(arrays: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    query, key, value = (arrays[name].transpose(1, 2) for name in ("query", "key", "value"))
    bounds = (options["window_left"], options["window_right"], bool(options["top_left"]))
    call: Any = flex_attention if query.is_cpu else _compiled()
    out, aux = call(
        query,
        key,
        value,
        score_mod=_capped(options["softcap"]) if options["softcap"] else None,
        block_mask=_blocks(query.shape[2], key.shape[2], *bounds, device=query.device),
        scale=options["scale"],
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    arrays["out"].copy_(out.transpose(1, 2))
    arrays["lse"].copy_(aux.lse.transpose(1, 2))


@functools.lru_cache(maxsize=32)
def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.lru_cache(maxsize=32)
def _blocks(
    queries: int, keys: int, left: int, right: int, top_left: bool, *, device: torch.device
) -> BlockMask | None:
    """Which blocks of keys each block of queries sees; None: all."""
    if left < 0 and right < 0:
        return None
    shift = 0 if top_left else keys - queries

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = key - query - shift
        return (ahead >= (-left if left >= 0 else -queries - keys)) & (ahead <= (right if right >= 0 else keys))

    return create_block_mask(seen, None, None, queries, keys, device=device)
