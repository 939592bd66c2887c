"""FlashAttention 4's functions on the CPU, in its order of arguments.

    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func                    # before
    from headrace.compat.flash_attn.cute import flash_attn_func, flash_attn_varlen_func    # after

Both return (out, lse): lse is -inf where a query sees no key, [batch, heads, tokens] or [heads, tokens], with qv the
heads last, and None unless return_lse asks for it or an array requires a gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headrace.compat.flash_attn.translation import (
    Attended,
    Further,
    dense,
    heads_first,
    keys_of,
    options_of,
    ragged,
    refuse,
)

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out [batch, queries, heads, value_dim] of q [batch, queries, heads, dim], k, v [batch, keys, kv_heads, dim]."""
    refuse({"score_mod": score_mod, "score_mod_bwd": score_mod_bwd, "mask_mod": mask_mod})
    refuse({"aux_tensors": aux_tensors, "aux_scalars": aux_scalars, "gather_kv_indices": gather_kv_indices})
    refuse({"block_sparse_tensors": block_sparse_tensors, "block_sparse_tensors_bwd": block_sparse_tensors_bwd})
    further = Further(qv=qv, learnable_sink=learnable_sink, return_lse=return_lse)
    found = dense(
        (q, k, v), options_of(softmax_scale, causal, window_size, softcap, deterministic=deterministic), further
    )
    return _answer(found, further, q, k, v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out of sequences one after another, or without cu_seqlens of [batch, tokens, heads, dim]; k, v also in pages."""
    refuse({"score_mod": score_mod, "score_mod_bwd": score_mod_bwd, "mask_mod": mask_mod})
    refuse({"aux_tensors": aux_tensors, "aux_scalars": aux_scalars, "gather_kv_indices": gather_kv_indices})
    refuse({"block_sparse_tensors": block_sparse_tensors})
    used: dict[str, Any] = {"seqused_q": seqused_q, "seqused_k": seqused_k, "page_table": page_table}
    further = Further(qv=qv, learnable_sink=learnable_sink, return_lse=return_lse, **used)
    options = options_of(softmax_scale, causal, window_size, softcap, deterministic=deterministic)
    found = ragged(q, cu_seqlens_q, keys_of(k, v, cu_seqlens_k, further), options, further)
    return _answer(found, further, q, k, v)


def _answer(found: Attended, further: Further, *arrays: Tensor) -> tuple[Tensor, Tensor | None]:
    if not (further.return_lse or any(array.requires_grad for array in arrays)):
        return found.out, None
    return found.out, found.lse if further.qv is not None else heads_first(found.lse)
