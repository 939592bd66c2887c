"""FlashInfer's signatures as its documentation has them: names, order, defaults; and where each name is found."""

import functools
import importlib

import pytest
from paged_oracle import signature

import headrace.compat.flashinfer as flashinfer

POSITIONS = "pos_encoding_mode='NONE'"
ROPE = "rope_scale=None, rope_theta=None"
SINGLE_DECODE = (
    f"q, k, v, kv_layout='NHD', {POSITIONS}, use_tensor_cores=False, q_scale=None, k_scale=None, v_scale=None, "
    f"window_left=-1, logits_soft_cap=None, sm_scale=None, {ROPE}, return_lse=False"
)
SINGLE_PREFILL = (
    "q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, packed_custom_mask=None, "
    f"causal=False, kv_layout='NHD', {POSITIONS}, use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, "
    f"logits_soft_cap=None, {ROPE}, backend='auto', return_lse=False, kv_cache_sf=None, k_scale=None, v_scale=None"
)
MASKED_PLAN = "custom_mask=None, packed_custom_mask=None, causal=False"
MULTI_ITEM = "prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None"
TYPES = "q_data_type='float16', kv_data_type=None"
LLAMA31 = (
    "rotary_dim=None, interleave=False, rope_scale=8, rope_theta=500000.0, low_freq_factor=1, high_freq_factor=4, "
    "old_context_len=8192"
)
PLAIN_ROPE = "rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0"
CACHED_ROPE = "positions, query, key, head_size, cos_sin_cache, is_neox=True"
FORWARD = f"logits_soft_cap=None, sm_scale=None, {ROPE}"

FUNCTIONS = {
    "decode.single_decode_with_kv_cache": SINGLE_DECODE,
    "prefill.single_prefill_with_kv_cache": SINGLE_PREFILL,
    "decode.fast_decode_plan": (
        "self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, "
        f"{POSITIONS}, window_left=-1, logits_soft_cap=None, q_data_type=None, kv_data_type=None, data_type=None, "
        f"sm_scale=None, {ROPE}, non_blocking=True, fixed_split_size=None, disable_split_kv=False, q_len_per_req=1, "
        "global_override_indptr_cpu=None"
    ).removeprefix("self, "),
    "cascade.merge_state": "v_a, s_a, v_b, s_b",
    "cascade.merge_state_in_place": "v, s, v_other, s_other, mask=None",
    "cascade.merge_states": "v, s",
    "page.append_paged_kv_cache": (
        "append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, "
        "kv_layout='NHD'"
    ),
    "page.append_paged_mla_kv_cache": (
        "append_ckv, append_kpe, batch_indices, positions, ckv_cache, kpe_cache, kv_indices, kv_indptr, "
        "kv_last_page_len"
    ),
    "page.get_batch_indices_positions": "append_indptr, seq_lens, nnz, batch_indices=None, positions=None",
    "page.get_seq_lens": "kv_indptr, kv_last_page_len, page_size",
    "quantization.packbits": "x, bitorder='big'",
    "quantization.segment_packbits": "x, indptr, bitorder='big'",
    "rope.apply_rope": f"q, k, indptr, offsets, {PLAIN_ROPE}",
    "rope.apply_rope_inplace": f"q, k, indptr, offsets, {PLAIN_ROPE}",
    "rope.apply_rope_pos_ids": f"q, k, pos_ids, {PLAIN_ROPE}",
    "rope.apply_rope_pos_ids_inplace": f"q, k, pos_ids, {PLAIN_ROPE}",
    "rope.apply_llama31_rope": f"q, k, indptr, offsets, {LLAMA31}",
    "rope.apply_llama31_rope_inplace": f"q, k, indptr, offsets, {LLAMA31}",
    "rope.apply_llama31_rope_pos_ids": f"q, k, pos_ids, {LLAMA31}",
    "rope.apply_llama31_rope_pos_ids_inplace": f"q, k, pos_ids, {LLAMA31}",
    "rope.apply_rope_with_cos_sin_cache": CACHED_ROPE,
    "rope.apply_rope_with_cos_sin_cache_inplace": CACHED_ROPE,
}
METHODS = {
    "decode.BatchDecodeWithPagedKVCacheWrapper": {
        "__init__": (
            "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, use_tensor_cores=False, "
            "paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, "
            "backend='auto', jit_args=None"
        ),
        "plan": (
            f"indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, {POSITIONS}, "
            f"window_left=-1, logits_soft_cap=None, {TYPES}, o_data_type=None, data_type=None, sm_scale=None, {ROPE}, "
            "non_blocking=True, block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False, "
            "q_len_per_req=1, *, window_right=0"
        ),
        "run": (
            "q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False, "
            "enable_pdl=None, window_left=None, sinks=None, q_len_per_req=None, "
            "skip_softmax_threshold_scale_factor=None, kv_cache_sf=None"
        ),
        "forward": (
            f"q, paged_kv_cache, {POSITIONS}, q_scale=None, k_scale=None, v_scale=None, window_left=-1, {FORWARD}, "
            "*, return_lse=False"
        ),
    },
    "decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper": {
        "__init__": (
            "workspace_buffer, indptr_buffer, indices_buffer, last_page_len_buffer, kv_layout='NHD', "
            "use_tensor_cores=False"
        ),
    },
    "prefill.BatchPrefillWithPagedKVCacheWrapper": {
        "__init__": (
            "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf=None, "
            "paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, "
            "custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None, jit_kwargs=None"
        ),
        "plan": (
            "qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, "
            f"head_dim_qk, page_size, head_dim_vo=None, {MASKED_PLAN}, {POSITIONS}, use_fp16_qk_reduction=False, "
            f"sm_scale=None, window_left=-1, logits_soft_cap=None, {ROPE}, {TYPES}, o_data_type=None, "
            f"non_blocking=True, {MULTI_ITEM}, seq_lens=None, seq_lens_q=None, block_tables=None, "
            "max_token_per_sequence=None, max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False"
        ),
        "run": (
            "q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False, "
            "enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None, "
            "skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None"
        ),
        "forward": (
            f"q, paged_kv_cache, causal=False, {POSITIONS}, use_fp16_qk_reduction=False, k_scale=None, v_scale=None, "
            f"window_left=-1, {FORWARD}, *, return_lse=False"
        ),
    },
    "prefill.BatchPrefillWithRaggedKVCacheWrapper": {
        "__init__": (
            "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf=None, kv_indptr_buf=None, "
            "custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None, jit_kwargs=None"
        ),
        "plan": (
            f"qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, {MASKED_PLAN}, "
            f"{POSITIONS}, use_fp16_qk_reduction=False, window_left=-1, logits_soft_cap=None, sm_scale=None, {ROPE}, "
            f"{TYPES}, o_data_type=None, non_blocking=True, {MULTI_ITEM}, fixed_split_size=None, "
            "disable_split_kv=False, seq_lens=None, seq_lens_q=None, max_token_per_sequence=None, "
            "max_sequence_kv=None, v_indptr=None, o_indptr=None"
        ),
        "run": (
            "q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None, out=None, lse=None, "
            "return_lse=False, enable_pdl=None, kv_cache_sf=None"
        ),
        "forward": (
            f"q, k, v, causal=False, {POSITIONS}, use_fp16_qk_reduction=False, window_left=-1, {FORWARD}, "
            "*, return_lse=False"
        ),
    },
    "mla.BatchMLAPagedAttentionWrapper": {
        "__init__": (
            "float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None, "
            "kv_len_arr=None, backend='auto'"
        ),
        "plan": (
            "qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, "
            "sm_scale, q_data_type, kv_data_type, use_profiler=False"
        ),
        "run": (
            "q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False, profiler_buffer=None, "
            "kv_len=None, page_table=None, return_lse_base_on_e=False, o_scale=None, *, ckv_scale=None, "
            "ckv_scale_arr=None, kpe_scale=None"
        ),
    },
    "cascade.MultiLevelCascadeAttentionWrapper": {
        "__init__": (
            "num_levels, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf_arr=None, "
            "paged_kv_indptr_buf_arr=None, paged_kv_indices_buf_arr=None, paged_kv_last_page_len_buf_arr=None"
        ),
        "plan": (
            "qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, num_qo_heads, "
            f"num_kv_heads, head_dim, page_size, causal=False, {POSITIONS}, use_fp16_qk_reduction=False, "
            f"sm_scale=None, window_left=-1, logits_soft_cap=None, {ROPE}, {TYPES}"
        ),
        "run": "q, paged_kv_cache",
    },
    "cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper": {
        "__init__": "float_workspace_buffer, kv_layout='NHD'",
        "begin_forward": (
            "unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, "
            "page_size, data_type='float16'"
        ),
        "forward": "q, k_shared, v_shared, unique_kv_cache",
    },
    "cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper": {
        "begin_forward": (
            "qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, "
            "head_dim, page_size"
        ),
        "forward": (
            "q, k_shared, v_shared, unique_kv_cache, causal=False, use_fp16_qk_reduction=False, sm_scale=None, " + ROPE
        ),
    },
    "attention.BatchAttention": {
        "__init__": "kv_layout='NHD', device='cuda'",
        "run": (
            "q, kv_cache, out=None, lse=None, k_scale=None, v_scale=None, logits_soft_cap=0.0, profiler_buffer=None, "
            "kv_cache_sf=None"
        ),
    },
    "sparse.BlockSparseAttentionWrapper": {
        "__init__": "float_workspace_buffer, backend='auto'",
        "plan": (
            "indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, mask=None, packed_mask=None, "
            f"causal=False, {POSITIONS}, use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None, {ROPE}, "
            f"{TYPES}, o_data_type='float16', non_blocking=True, block_mask=None"
        ),
        "run": (
            "q, k, v, scale_q=None, scale_k=None, scale_v=None, out=None, lse=None, return_lse=False, enable_pdl=None"
        ),
    },
    "sparse.VariableBlockSparseAttentionWrapper": {
        "plan": (
            "block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False, "
            f"{POSITIONS}, use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None, {ROPE}, "
            f"non_blocking=True, {TYPES}"
        ),
        "run": "q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None",
    },
    "pod.PODWithPagedKVCacheWrapper": {
        "plan": (
            f"indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, {POSITIONS}, "
            f"window_left=-1, {TYPES}, data_type=None, sm_scale=None, {ROPE}, non_blocking=True"
        ),
        "run": (
            "q_p, k_p, v_p, q_d, paged_kv_cache_d, custom_mask_p=None, packed_custom_mask_p=None, causal_p=False, "
            "kv_layout_p='NHD', pos_encoding_mode_p='NONE', sm_scale_p=None, window_left_p=-1, rope_scale_p=None, "
            "rope_theta_p=None, return_lse_p=False, custom_mask_d=None, packed_custom_mask_d=None, causal_d=False, "
            "kv_layout_d='NHD', pos_encoding_mode_d='NONE', sm_scale_d=None, window_left_d=-1, rope_scale_d=None, "
            "rope_theta_d=None, q_scale=None, k_scale=None, v_scale=None, return_lse_d=False, "
            "use_fp16_qk_reduction=False, enable_pdl=None, *args"
        ),
    },
}


def found(path):
    module, name = path.split(".")
    there = getattr(importlib.import_module(f"headrace.compat.flashinfer.{module}"), name)
    assert getattr(flashinfer, name) is there and name in flashinfer.__all__
    assert getattr(getattr(flashinfer, module), name) is there
    return there


@pytest.mark.parametrize("path", FUNCTIONS)
def test_function(path):
    assert signature(found(path)) == FUNCTIONS[path]


@pytest.mark.parametrize("path", METHODS)
def test_methods(path):
    wrapper = found(path)
    for name, expected in METHODS[path].items():
        assert signature(getattr(wrapper, name)) == expected, name


@pytest.mark.parametrize(
    "path", [path for path in METHODS if "SharedPrefix" not in path and not path.startswith(("attention", "cascade"))]
)
def test_every_wrapper_has_a_whole_life(path):
    wrapper = found(path)
    for name in ("plan", "run", "reset_workspace_buffer", "is_cuda_graph_enabled", "end_forward"):
        assert hasattr(wrapper, name)


def test_with_the_log_sum_exp_by_name():
    told = flashinfer.single_prefill_with_kv_cache_return_lse
    assert isinstance(told, functools.partial) and told.keywords == {"return_lse": True}
