"""transformers: `attn_implementation="headrace"`, for every model whose attention goes through AttentionInterface.

    import headrace.compat.transformers  # registers the name; nothing else changes
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="headrace")

Keys and values are read as they lie, none repeated for the heads that share them. Masks are made as for "sdpa": none at
all where causal says it, else bool. What a mask says is found once a step, not once a layer: causal, a window, lengths
of padded rows and packed documents go on as options, and what nobody sees is not computed; anything else as a mask.

| option | |
|---|---|
| attention_mask | none, bool or float [batch or 1, heads or 1, queries, keys]; queries that see nothing get zeros |
| caches | dynamic, sliding and static; generate as ever |
| packed sequences | position_ids that start again, or cu_seq_lens_q and cu_seq_lens_k |
| sliding_window, softcap, s_aux (sinks), position_bias, scaling, is_causal | yes; no gradient of a position_bias |
| training | gradients of everything else, gradient checkpointing, autocast, torch.compile |
| dropout | NotImplementedError: set the model's attention_dropout to 0 |
| output_attentions | none are returned, as with "sdpa" |
| continuous batching (`generate_batch`) | refused by transformers, which knows the names it takes there |
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from headrace.ops import attention
from headrace.ops.masks import Recognised, recognise, row_ranges

__all__ = ["attention_forward", "register"]

_REFUSED = {
    "cache": "continuous batching brings pages of its own; attn_implementation='sdpa' there, or headrace.LLM",
    "sinks": "sinks are one number a head here (s_aux); attn_implementation='eager'",
    "block_indices": "blocks of keys are chosen by the model here; attn_implementation='eager' or 'sdpa'",
}
_KEPT = "_headrace_says"  # on a mask: its version, and the options that say the same


def register() -> None:
    """Makes "headrace" a value of attn_implementation. Importing this module has done it; again does no harm."""
    AttentionInterface.register("headrace", attention_forward)
    AttentionMaskInterface.register("headrace", sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [batch, heads, tokens, head_dim] as [batch, tokens, heads, head_dim], and no weights.

    Without a mask is_causal (the module's, if not given) is aligned at the first key, and sliding_window counts; one
    query alone sees all keys. A mask stands for itself. Cumulative lengths come before any mask: sequences one behind
    the other, each seeing itself as is_causal and sliding_window say.
    """
    _check(dropout, others)
    query, key, value = (_token_major(array) for array in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or None}
    options["sinks"] = None if s_aux is None else s_aux.float()
    if cu_seq_lens_q is not None and position_bias is None:
        options |= _packed(causal, sliding_window, cu_seq_lens_q, cu_seq_lens_k)
    elif attention_mask is None:
        options |= _without_mask(query.shape[1], causal, sliding_window)
    elif position_bias is None:
        options |= _said_by(attention_mask, key.shape[1])
    if position_bias is not None:
        options["mask"] = _biased(position_bias, attention_mask, cu_seq_lens_q)
    return _attended(query, key, value, options), None


def _check(dropout: float, others: Mapping[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(
            "dropout: headrace has none; set the model's attention_dropout (in its config) to 0, or use model.eval()"
        )
    for name, why in _REFUSED.items():
        if others.get(name) is not None:
            raise NotImplementedError(f"{name}: {why}")
    if others.get("output_attentions"):
        warnings.warn(
            'output_attentions: "headrace" has no attention weights to return; attn_implementation="eager" does',
            stacklevel=3,
        )


def _token_major(array: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, heads, head_dim]: another view, unless a head's elements lie apart."""
    return (array if array.stride(-1) == 1 else array.contiguous()).transpose(1, 2)


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    if "query_starts" not in options:
        out: torch.Tensor = attention(query, key, value, **options).out
        return out
    rows = (array.flatten(0, 1) for array in (query, key, value))
    ragged: torch.Tensor = attention(*rows, **options).out
    return ragged.unflatten(0, query.shape[:2])


# What is seen


def _without_mask(num_queries: int, causal: bool, sliding_window: int | None) -> dict[str, Any]:
    causal = causal and num_queries > 1
    align = "top_left" if causal else "bottom_right"
    return {"causal": causal, "align": align, "window": _window(causal, sliding_window)}


def _window(causal: bool, sliding_window: int | None) -> tuple[int | None, int | None]:
    """A sliding window counts a query's own key; without causality it is as wide on the other side."""
    if sliding_window is None:
        return None, None
    return sliding_window - 1, None if causal else sliding_window - 1


def _packed(
    causal: bool, sliding_window: int | None, query_starts: torch.Tensor, key_starts: torch.Tensor | None
) -> dict[str, Any]:
    starts = {"query_starts": query_starts, "key_starts": query_starts if key_starts is None else key_starts}
    found = {name: each.to(torch.int32) for name, each in starts.items()}
    return {"causal": causal, "align": "bottom_right", "window": _window(causal, sliding_window), **found}


def _biased(position_bias: torch.Tensor, mask: torch.Tensor | None, starts: torch.Tensor | None) -> torch.Tensor:
    if starts is not None:
        raise NotImplementedError("position_bias: not with cu_seq_lens_q; a mask can keep the sequences apart")
    if mask is None:
        return position_bias
    return torch.where(mask, position_bias, -torch.inf) if mask.dtype == torch.bool else position_bias + mask


def _said_by(mask: torch.Tensor, num_keys: int) -> dict[str, Any]:
    """The mask, or the options that say the same: looked for at the first layer, kept with the mask for the others."""
    if mask.shape[-1] != num_keys:
        mask = mask.expand(*mask.shape[:-1], num_keys).contiguous()
    if type(mask) is not torch.Tensor or torch.compiler.is_compiling():
        return {"mask": mask}
    version = 0 if mask.is_inference() else mask._version
    kept = getattr(mask, _KEPT, None)
    if kept is None or kept[0] != version:
        kept = (version, _recognised(mask))
        setattr(mask, _KEPT, kept)
    return {"mask": mask} if kept[1] is None else kept[1]


def _recognised(mask: torch.Tensor) -> dict[str, Any] | None:
    """Options of ops.attention that see what the mask lets be seen, or None."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or 0 in mask.shape:
        return None
    seen = mask[:, 0].numpy()
    looked_at = seen[:1] if seen.strides[0] == 0 else seen  # one mask for all
    return _as_lens(looked_at, len(seen)) or _as_structure([recognise(each) for each in looked_at], len(seen))


def _as_lens(seen: np.ndarray, batch: int) -> dict[str, Any] | None:
    """Rows that see everything before an end: that of their sequence, or their own place."""
    queries, keys = seen.shape[1:]
    ranges = row_ranges(seen.reshape(-1, keys))
    if ranges is None or ranges.first.any():
        return None
    last = ranges.last.reshape(-1, queries)
    lens = last.max(axis=1, keepdims=True) + 1
    whole = np.broadcast_to(lens[:, 0], batch).astype(np.int32)
    options: dict[str, Any] = {} if (lens == keys).all() else {"key_lens": torch.from_numpy(whole)}
    if (last == lens - 1).all():
        return {"causal": False, **options}
    for align, own in (("top_left", 0), ("bottom_right", lens - queries)):
        if (last == np.clip(np.arange(queries) + own, -1, lens - 1)).all():
            return {"causal": True, "align": align, **options}
    return None


def _as_structure(found: list[Recognised], batch: int) -> dict[str, Any] | None:
    """A window, or documents side by side, each causal."""
    if found[0].kind == "window" and all(each.options == found[0].options for each in found):
        return dict(found[0].options)
    ends = [_document_ends(each) for each in found]
    if not all(ends):
        return None
    queries = found[0].shape[0]
    starts = [0, *(row * queries + end for row in range(batch) for end in ends[row % len(ends)])]
    return {"causal": True, "query_starts": torch.tensor(starts, dtype=torch.int32)}


def _document_ends(each: Recognised) -> list[int]:
    """Where the documents of a mask end; none when it is not that."""
    if each.kind in ("causal", "causal_top_left") and each.shape[0] == each.shape[1]:
        return [each.shape[0]]
    own = [part for part in each.segments if (part.row_begin, part.row_end) == (part.key_begin, part.key_end)]
    causal = all(part.causal or part.row_end - part.row_begin == 1 for part in own)
    return [part.row_end for part in own] if causal and len(own) == len(each.segments) else []


register()
