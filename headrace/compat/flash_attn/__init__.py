"""FlashAttention's functions on the CPU: those of version 2, with the further keywords of 3 and 4.

    from flash_attn import flash_attn_func, flash_attn_varlen_func                    # before
    from headrace.compat.flash_attn import flash_attn_func, flash_attn_varlen_func    # after

So too `flash_attn.flash_attn_interface`, `flash_attn.bert_padding`, `flash_attn.layers.rotary`; version 3's own order
of arguments is in `headrace.compat.flash_attn_interface`, version 4's in `headrace.compat.flash_attn.cute`.

| | |
|---|---|
| types | float16, bfloat16, float32, float64; float8_e4m3fn with q_descale, k_descale, v_descale (out bfloat16) |
| sizes | any head_dim, any value_dim, any ratio of heads, any page size, sequences of length 0 |
| causal, window_size, attention_chunk | aligned at the bottom right; -1 or None: no bound |
| softcap, alibi_slopes, softmax_scale, learnable_sink, qv | the log-sum-exp has the sink in it; qv copies the keys |
| return_attn_probs | (out, lse, empty); return_lse, return_softmax_lse: (out, lse); no key seen: out 0, lse +inf |
| cache | appended to in place; dense, paged, cache_batch_idx, cache_leftpad, rotary of both kinds; no gradients |
| deterministic | of out and of gradients: bits that neither the batch nor another run changes; on the CPU always so |
| num_splits, pack_gqa, sm_margin, scheduler_metadata, max_seqlen_* | taken, without effect |
| dropout_p, score_mod, mask_mod, block_sparse_tensors, gather_kv_indices | NotImplementedError |
"""

from __future__ import annotations

from headrace.compat.flash_attn.combine import flash_attn_combine, get_scheduler_metadata
from headrace.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # whose signatures these are: programs compare it with what they need

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
