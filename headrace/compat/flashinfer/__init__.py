"""FlashInfer's attention on the CPU; the line to replace is `import flashinfer`:

    import headrace.compat.flashinfer as flashinfer

    single_decode_with_kv_cache, single_prefill_with_kv_cache (and _return_lse)          one request
    BatchDecodeWithPagedKVCacheWrapper (and the CUDA-graph one), fast_decode_plan         decode over pages
    BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper             prefill, append
    BatchMLAPagedAttentionWrapper                                                         latent attention
    BatchAttention, BatchAttentionWithAttentionSinkWrapper, PODWithPagedKVCacheWrapper    mixed batches, sinks
    MultiLevelCascadeAttentionWrapper, BatchDecode- and BatchPrefillWithSharedPrefix..,
    merge_state, merge_state_in_place, merge_states                                       keys in parts
    BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper                      blocks of keys
    append_paged_kv_cache, append_paged_mla_kv_cache, get_batch_indices_positions, get_seq_lens
    packbits, segment_packbits, apply_rope and its kin

With NHD and HND, caches in one tensor or two, custom masks as bools or bits, window_left, logits_soft_cap, ROPE_LLAMA,
ALIBI, sinks, scales, float8 and int8 caches, out and lse buffers, o_data_type; any page size, head size and group; also
float32 and float64. Conventions are the library's: the log-sum-exp is base 2, causal is aligned at the bottom right, a
row without keys is 0 with -inf. Types are taken from the arrays, so a plan need not name them. Workspaces, backends,
tensor cores, non_blocking and whatever else is of GPUs change nothing. jit_args, multi-item scoring and NVFP4 caches
raise NotImplementedError.
"""

from headrace.compat.flashinfer import (
    attention,
    cascade,
    decode,
    mla,
    page,
    pod,
    prefill,
    quantization,
    rope,
    sparse,
)
from headrace.compat.flashinfer.attention import BatchAttention, BatchAttentionWithAttentionSinkWrapper
from headrace.compat.flashinfer.cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from headrace.compat.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan,
    single_decode_with_kv_cache,
)
from headrace.compat.flashinfer.mla import BatchMLAPagedAttentionWrapper
from headrace.compat.flashinfer.page import (
    append_paged_kv_cache,
    append_paged_mla_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)
from headrace.compat.flashinfer.pod import PODWithPagedKVCacheWrapper
from headrace.compat.flashinfer.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from headrace.compat.flashinfer.quantization import packbits, segment_packbits
from headrace.compat.flashinfer.rope import (
    apply_llama31_rope,
    apply_llama31_rope_inplace,
    apply_llama31_rope_pos_ids,
    apply_llama31_rope_pos_ids_inplace,
    apply_rope,
    apply_rope_inplace,
    apply_rope_pos_ids,
    apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
)
from headrace.compat.flashinfer.sparse import BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper

__all__ = [
    "BatchAttention",
    "BatchAttentionWithAttentionSinkWrapper",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "BlockSparseAttentionWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "PODWithPagedKVCacheWrapper",
    "VariableBlockSparseAttentionWrapper",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "attention",
    "cascade",
    "decode",
    "fast_decode_plan",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "mla",
    "packbits",
    "page",
    "pod",
    "prefill",
    "quantization",
    "rope",
    "segment_packbits",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "sparse",
]
