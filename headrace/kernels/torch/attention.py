"""Dense attention by torch's own kernels: SDPA's backends, called one by one, so that the choice is ours and is said.

flash      FlashAttention 2 (on the CPU torch's own of that name)    wins: nowhere that ours is as fast
efficient  the memory-efficient kernel of xFormers; float32 too      wins: old GPUs
cudnn      cuDNN's                                                    wins: prompts of 16-bit types on Hopper and later
math       three operations over the whole matrix of scores, in float32 or float64: takes every option, for small calls
           and for what nothing else takes (float64)

Schedule: torch's layout is [batch, heads, tokens, dim], of which ours is a view; out and lse are copied to ours.
They are called below `scaled_dot_product_attention`, which returns no lse and would choose another backend in silence.
Source: aten's operators. Error: operands and weights in the query's type, sums in float32; math: float32 throughout.
Not measured yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.torch.float32 import whole_float32

Arrays = Mapping[str, Tensor]
Options = Mapping[str, Any]

_aten = torch.ops.aten


def run_flash(arrays: Arrays, options: Options) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    operands, causal, scale = _heads_first(arrays), _causal(arrays, options), options["scale"]
    if arrays["query"].is_cpu:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(*operands, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention.default(*operands, 0.0, causal, False, scale=scale)
    _keep(arrays, out, lse)


def run_efficient(arrays: Arrays, options: Options) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    causal, num_queries = _causal(arrays, options), arrays["query"].shape[1]
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention.default(
        *_heads_first(arrays), None, True, 0.0, causal, scale=options["scale"]
    )
    _keep(arrays, out, lse[..., :num_queries])  # its rows are rounded up


def run_cudnn(arrays: Arrays, options: Options) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention.default(
        *_heads_first(arrays), None, True, 0.0, _causal(arrays, options), False, scale=options["scale"]
    )
    _keep(arrays, out, lse[..., 0] if lse.dim() == 4 else lse)


def _heads_first(arrays: Arrays) -> list[Tensor]:
    return [arrays[name].transpose(1, 2) for name in ("query", "key", "value")]


def _causal(arrays: Arrays, options: Options) -> bool:
    """One query at the end sees all keys, whatever torch takes for its place."""
    return bool(options["window_right"] == 0 and arrays["query"].shape[1] > 1)


def _keep(arrays: Arrays, out: Tensor, lse: Tensor) -> None:
    arrays["out"].copy_(out.transpose(1, 2))
    arrays["lse"].copy_(lse.transpose(1, 2))


# The whole matrix


def run_math(arrays: Arrays, options: Options) -> None:
    """Fills arrays["out"] and arrays["lse"]."""
    wide = torch.float64 if arrays["query"].dtype == torch.float64 else torch.float32
    query, key, value = (array.to(wide) for array in _heads_first(arrays))
    scores = _per_group(query, key.transpose(2, 3)) * options["scale"]
    if options["softcap"]:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = _biased(scores, arrays, options)
    lse = torch.logsumexp(scores, dim=-1)
    total = torch.logaddexp(lse, arrays["sinks"].to(wide)[:, None]) if "sinks" in arrays else lse
    seeing = torch.where(lse == -torch.inf, 0, total)  # without a key every weight is exp(-inf)
    if "key_lens" in arrays:  # what lies behind may be NaN, which a weight of 0 does not undo
        place = torch.arange(value.shape[2], device=value.device)
        value = value.masked_fill((place >= arrays["key_lens"][:, None])[:, None, :, None], 0)
    _keep(arrays, _per_group(torch.exp(scores - seeing[..., None]), value), lse)


def _per_group(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows [batch, heads, queries, a] x matrices [batch, kv_heads, a, b]: those of a group read the same matrix."""
    batch, heads, queries, _ = rows.shape
    kv_heads = matrices.shape[1]
    rows = rows.reshape(batch, kv_heads, heads // kv_heads * queries, rows.shape[-1])
    with whole_float32():
        together = rows @ matrices
    return together.reshape(batch, heads, queries, matrices.shape[-1])


def _biased(scores: Tensor, arrays: Arrays, options: Options) -> Tensor:
    """Scores [batch, heads, queries, keys] with what is added to them: -inf where a key is not seen."""
    queries, keys = scores.shape[-2:]
    place = torch.arange(keys, device=scores.device)
    own = _own(arrays, options, queries, keys)
    if "alibi_slopes" in arrays:
        scores = scores - arrays["alibi_slopes"].to(scores.dtype)[:, :, None, None] * (own - place).abs()
    mask = arrays.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + torch.nn.functional.pad(mask.to(scores.dtype), (keys - mask.shape[-1], 0))
    return scores.masked_fill(~_seen(arrays, options, own, place), -torch.inf)


def _own(arrays: Arrays, options: Options, queries: int, keys: int) -> Tensor:
    """The key each query stands at, [batch or 1, 1, queries, 1]."""
    rows = torch.arange(queries, device=arrays["query"].device)[:, None]
    if options["top_left"]:
        return rows[None, None]
    lens = arrays["key_lens"][:, None, None, None] if "key_lens" in arrays else keys
    return rows[None, None] + (lens - queries)


def _seen(arrays: Arrays, options: Options, own: Tensor, place: Tensor) -> Tensor:
    """Which keys each query sees, [batch or 1, heads or 1, queries, keys]."""
    left, right, mask = options["window_left"], options["window_right"], arrays.get("mask")
    seen = torch.ones_like(own + place, dtype=torch.bool)
    if left >= 0:
        seen = seen & (place >= own - left)
    if right >= 0:
        seen = seen & (place <= own + right)
    if "key_lens" in arrays:
        seen = seen & (place < arrays["key_lens"][:, None, None, None])
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & torch.nn.functional.pad(mask, (len(place) - mask.shape[-1], 0), value=True)
    if "first_keys" in arrays:
        first, last = (arrays[name].reshape(-1, 1, arrays["query"].shape[1], 1) for name in ("first_keys", "last_keys"))
        seen = seen & (place >= first) & (place <= last)
    return seen
