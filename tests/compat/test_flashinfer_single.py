"""FlashInfer's prefill of one request: layouts, alignment, masks as bools and bits, scales head by head."""

import pytest
import torch
from paged_oracle import Request, hold, indptr, normal

import headrace.compat.flashinfer as flashinfer

DIM = 16


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("queries,keys", [(5, 11), (11, 5), (7, 7), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_single_prefill(causal, queries, keys, kv_layout):
    q, k, v = normal(queries, 6, DIM), normal(keys, 2, DIM, seed=1), normal(keys, 2, 24, seed=2)
    given = (k, v) if kv_layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, *given, causal=causal, kv_layout=kv_layout)
    assert out.shape == (queries, 6, 24) and lse.shape == (queries, 6)
    hold(out, lse, [Request(q, k, v, {"causal": causal})])
    alone = flashinfer.single_prefill_with_kv_cache(q, *given, causal=causal, kv_layout=kv_layout)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("packed", [False, True])
def test_single_prefill_with_a_mask(packed):
    q, k, v = normal(5, 6, DIM), normal(11, 2, DIM, seed=1), normal(11, 2, DIM, seed=2)
    seen = torch.rand(5, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = flashinfer.packbits(seen.flatten(), bitorder="little")
    given = {"packed_custom_mask": bits, "custom_mask": ~seen} if packed else {"custom_mask": seen}
    out, lse = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True, **given)
    hold(out, lse, [Request(q, k, v, {"seen": seen})])


def test_a_causal_mask_is_causal():
    q, k, v = normal(5, 6, DIM), normal(11, 2, DIM, seed=1), normal(11, 2, DIM, seed=2)
    mask = torch.ones(5, 11, dtype=torch.bool).tril(6)
    expected = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
    assert torch.equal(flashinfer.single_prefill_with_kv_cache(q, k, v, custom_mask=mask), expected)


def test_single_prefill_with_options():
    q, k, v = normal(5, 6, DIM), normal(11, 2, DIM, seed=1), normal(11, 2, DIM, seed=2)
    given = {
        "logits_soft_cap": 2.0,
        "window_left": 5,
        "k_scale": 2.0,
        "sm_scale": 0.15,
        "v_scale": 3.0,
        "backend": "fa2",
    }
    out, lse = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True, **given)
    hold(out, lse, [Request(q, k, v, {"causal": True, "scale": 0.3, "cap": 2.0, "left": 5})], factor=3.0)


def test_float8_queries_with_a_scale_for_each_head():
    kinds = torch.float8_e4m3fn
    q, k, v = (
        normal(5, 6, DIM, dtype=kinds),
        normal(11, 2, DIM, dtype=kinds, seed=1),
        normal(11, 2, DIM, dtype=kinds, seed=2),
    )
    scale_q, scale_k, scale_v = (normal(n, seed=3 + i).abs() + 0.1 for i, n in enumerate((6, 2, 2)))
    out = flashinfer.single_prefill_with_kv_cache(
        q, k, v, scale_q, scale_k, scale_v, o_dtype=torch.bfloat16, causal=True
    )
    assert out.dtype == torch.bfloat16
    scaled = [(a.float() * b[:, None]) for a, b in ((q, scale_q), (k, scale_k), (v, scale_v))]
    hold(out, None, [Request(*scaled, {"causal": True})], dtype=torch.bfloat16)
    batch = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1))
    batch.plan(indptr([5]), indptr([11]), 6, 2, DIM, causal=True, q_data_type=kinds, o_data_type=torch.bfloat16)
    assert torch.equal(batch.run(q, k, v, scale_q, scale_k, scale_v), out)
