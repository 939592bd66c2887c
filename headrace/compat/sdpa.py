"""torch's scaled_dot_product_attention: the same arguments, shapes and conventions, computed by headrace.ops.attention.

    from torch.nn.functional import scaled_dot_product_attention      # before
    from headrace.compat.sdpa import scaled_dot_product_attention     # after

| argument | |
|---|---|
| query, key, value | [..., heads, tokens, dim] of any leading dimensions, broadcast; views are read where they lie |
| attn_mask | bool (True: seen) or a float to add, broadcast; `torch.nn.attention.bias.causal_*`; has no gradient |
| is_causal | aligned at the top left; not with attn_mask |
| scale | any number; by default head_dim ** -0.5 |
| enable_gqa | fewer heads of key and value, never repeated in memory |
| dropout_p | 0.0 |

A row that sees no key is 0. Gradients and autocast as torch's; its choice of backends (`sdpa_kernel`) has no say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from headrace import ops

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query key^T + mask) value, [..., heads, tokens, value_dim]; see torch's documentation.

    Raises NotImplementedError for dropout and for a mask that requires a gradient, RuntimeError for a mask beside
    is_causal and for shapes that do not broadcast, ArgumentError for types that attention does not take.
    """
    _refuse(attn_mask, dropout_p, is_causal)
    causal = {"causal": True, "align": "top_left"} if is_causal else {}
    if isinstance(attn_mask, CausalBias):
        upper_left = attn_mask.variant == CausalVariant.UPPER_LEFT
        causal, attn_mask = {"causal": True, "align": "top_left" if upper_left else "bottom_right"}, None
    rank = max(array.dim() for array in (query, key, value))
    query, key, value = _with_matched_heads([query, key, value], enable_gqa)
    if not (query.shape[-3] and value.shape[-1]):
        return query @ key.transpose(-2, -1) @ value  # no heads or no elements: a shape, and nothing in it
    lead = torch.broadcast_shapes(*(array.shape[:-3] for array in (query, key, value)))
    mask = None if attn_mask is None else _ranked(attn_mask, lead, key.shape[-2])
    if scale is not None and not scale > 0:
        query, scale = query * (-1.0 if scale < 0 else 0.0), abs(scale) or 1.0
    arrays = [_token_major(array, lead) for array in (query, key, value)]
    out = ops.attention(*arrays, mask=mask, scale=scale, **causal).out.transpose(1, 2)
    out = out.reshape(*lead, *out.shape[1:])
    return out.squeeze(0) if rank == 2 else out


def _refuse(attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> None:
    if dropout_p > 0:
        other = "pass 0.0, or call torch.nn.functional.scaled_dot_product_attention"
        raise NotImplementedError(f"dropout_p: headrace has no dropout, got {dropout_p}; {other}")
    if attn_mask is None:
        return
    if is_causal:
        kind = ValueError if isinstance(attn_mask, CausalBias) else RuntimeError
        raise kind("attn_mask, is_causal: expected one of them at most; a mask can be causal itself")
    if attn_mask.requires_grad and torch.is_grad_enabled():
        other = "pass attn_mask.detach(), or call torch.nn.functional.scaled_dot_product_attention"
        raise NotImplementedError(f"attn_mask: requires a gradient, which headrace does not compute; {other}")


def _with_matched_heads(arrays: list[Tensor], enable_gqa: bool) -> list[Tensor]:
    """[..., heads, tokens, dim] each: the query's heads a multiple of those of key and value, which have as many."""
    arrays = [array.unsqueeze(0) if array.dim() == 2 else array for array in arrays]
    query, key, value = arrays
    if enable_gqa:
        if key.shape[-3] == value.shape[-3]:
            return arrays
        heads = query.shape[-3]
        return [query, *(array.repeat_interleave(heads // array.shape[-3], -3) for array in (key, value))]
    (heads,) = torch.broadcast_shapes(*(array.shape[-3:-2] for array in arrays))
    if key.shape[-3] == value.shape[-3] == 1:
        return [_with_heads(query, heads), key, value]
    return [_with_heads(array, heads) for array in arrays]


def _with_heads(array: Tensor, heads: int) -> Tensor:
    return array.expand(*array.shape[:-3], heads, *array.shape[-2:])


def _token_major(array: Tensor, lead: torch.Size) -> Tensor:
    """[*lead, heads, tokens, dim] as [batch, tokens, heads, dim]: the same memory, where its strides allow."""
    inner = array.shape[-3:]
    array = array.expand(*lead, *inner).reshape(math.prod(lead), *inner).transpose(1, 2)
    return array if array.stride(-1) == 1 else array.contiguous()


def _ranked(mask: Tensor, lead: torch.Size, num_keys: int) -> Tensor:
    """A mask that broadcasts to [*lead, heads, queries, keys], as [batch or 1, heads or 1, queries or 1, keys]."""
    mask = mask.expand(*mask.shape[:-1], num_keys)
    mask = mask[(None,) * (len(lead) + 3 - mask.dim())]
    outer, inner = mask.shape[: len(lead)], mask.shape[len(lead) :]
    if all(size == 1 for size in outer):
        return mask.reshape(1, *inner)
    return mask.expand(*lead, *inner).reshape(math.prod(lead), *inner)
