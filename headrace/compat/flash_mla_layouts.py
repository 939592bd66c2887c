"""FlashMLA's two float8 caches read as numbers: 656 bytes a token (DeepSeek V3.2), and 584 (its successor, "MODEL1").

    656 bytes   512 float8_e4m3, 4 float32 scales (one for 128 of them), 64 bfloat16       token by token
    584 bytes   448 float8_e4m3 and 64 bfloat16, for every token of a page; behind them, for every token, 8 bytes:
                7 scales (one for 64 of them) that are powers of two, an exponent each, and one byte of nothing

The cache is [pages, page_size, 1, bytes] of any type of one byte; pages may be apart, a page is in one piece where its
layout needs that. A token is named by page * page_size + its place in the page.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOPE_AND_ROPE = 448 + 128  # bytes of a token in a page of 584 a token
_SCALES = 8


def check_layout(cache: Tensor, name: str) -> None:
    """NotImplementedError that names the argument, for a cache in neither layout."""
    if cache.element_size() != 1 or cache.shape[-1] not in (656, 584) or cache.shape[2] != 1:
        raise NotImplementedError(
            f"{name}: expected [pages, page_size, 1, 656 or 584] bytes with is_fp8_kvcache=True, got {cache.dtype} "
            f"{list(cache.shape)}; headrace.ops.mla_attention reads float8 and int8 latents of any size with scales"
        )


def tokens_at(cache: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The latents of these tokens, [tokens, 576 or 512] in dtype; nothing else of the cache is read."""
    codes = cache.view(torch.uint8)
    if cache.shape[-1] == 656:
        return _of_656(codes, tokens).to(dtype)
    return _of_584(codes, tokens).to(dtype)


def _of_656(cache: Tensor, tokens: Tensor) -> Tensor:
    page_size = cache.shape[1]
    rows = cache[tokens // page_size, tokens % page_size, 0]
    scales = rows[:, 512:528].view(torch.float32)
    return torch.cat([_scaled(rows[:, :512], scales), rows[:, 528:].view(torch.bfloat16).float()], dim=-1)


def _of_584(cache: Tensor, tokens: Tensor) -> Tensor:
    num_pages, page_size = cache.shape[:2]
    pages, places = tokens // page_size, tokens % page_size
    whole = cache.view(num_pages, page_size * (_NOPE_AND_ROPE + _SCALES))
    rows = whole[:, : page_size * _NOPE_AND_ROPE].view(num_pages, page_size, _NOPE_AND_ROPE)[pages, places]
    scales = whole[:, page_size * _NOPE_AND_ROPE :].view(num_pages, page_size, _SCALES)[pages, places, :7]
    powers = scales.contiguous().view(torch.float8_e8m0fnu).float()
    return torch.cat([_scaled(rows[:, :448], powers), rows[:, 448:].view(torch.bfloat16).float()], dim=-1)


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [tokens, dim] times scales [tokens, tiles], float32."""
    numbers = codes.contiguous().view(torch.float8_e4m3fn).float()
    return (numbers.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)
