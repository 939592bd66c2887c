"""FlashAttention 2's functions by headrace: every argument, its default, its shapes and conventions."""

import inspect

import pytest
import torch
from flash_attn_cases import OPTIONS, SLOPES, arrays, by_formula, starts_of
from plain_attention import hold, random

from headrace.compat import flash_attn

REQUIRED = inspect.Parameter.empty
COMMON = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]


def required(text):
    return [(name, REQUIRED) for name in text.split()]


LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": required("q k v") + COMMON,
    "flash_attn_kvpacked_func": required("q kv") + COMMON,
    "flash_attn_qkvpacked_func": required("qkv") + COMMON,
    "flash_attn_varlen_func": required(f"q k v {LENGTHS}") + COMMON + [("block_table", None)],
    "flash_attn_varlen_kvpacked_func": required(f"q kv {LENGTHS}") + COMMON,
    "flash_attn_varlen_qkvpacked_func": required("qkv cu_seqlens max_seqlen") + COMMON,
    "flash_attn_with_kvcache": [
        *required("q k_cache v_cache"),
        *(
            (name, None)
            for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad")
        ),
        *[("block_table", None), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1))],
        *[("softcap", 0.0), ("rotary_interleaved", True), ("alibi_slopes", None), ("num_splits", 0)],
        ("return_softmax_lse", False),
    ],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_are_those_of_version_2(name):
    *found, further = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert [(each.name, each.default) for each in found] == SIGNATURES[name]
    assert {each.kind for each in found} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert further.kind == inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("queries,keys", [(33, 45), (45, 33), (1, 70)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, queries, keys, dtype):
    theirs, ours = OPTIONS[name]
    q, k, v = arrays(dtype, queries=queries, keys=keys)
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **theirs)
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, (2, 6, queries))
    assert probabilities.shape == (0,) and probabilities.dtype == dtype
    assert lse.is_contiguous()
    hold([out, lse], by_formula(q, k, v, **ours), dtype, logarithms=[1])


def test_positions_of_the_arguments():
    q, k, v = arrays()
    slopes = SLOPES / 2
    by_place = flash_attn.flash_attn_func(q, k, v, 0.0, 0.2, True, (9, -1), 3.0, slopes, True, True)
    by_name = flash_attn.flash_attn_func(
        q, k, v, softmax_scale=0.2, causal=True, window_size=(9, -1), softcap=3.0, alibi_slopes=slopes
    )
    assert len(by_place) == 3 and torch.equal(by_place[0], by_name)


def test_causal_is_aligned_at_the_bottom_right():
    q, k, v = arrays(torch.float32, queries=5, keys=2)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[:, :, :3] == torch.inf).all()
    assert (out[:, 3:] != 0).any(-1).all() and lse[:, :, 3:].isfinite().all()


@pytest.mark.parametrize("heads,kv_heads", [(6, 6), (6, 3), (6, 1), (1, 1)])
@pytest.mark.parametrize("dim,value_dim", [(32, 32), (40, 24), (72, 72), (320, 320)])
def test_any_heads_and_sizes(heads, kv_heads, dim, value_dim):
    q, k, v = arrays(heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    hold([out, lse], by_formula(q, k, v, causal=True), torch.bfloat16, logarithms=[1])


def test_arrays_of_any_strides():
    q, k, v = arrays(value_dim=24)
    expected = flash_attn.flash_attn_func(q, k, v)
    heads_first = [array.transpose(1, 2).contiguous().transpose(1, 2) for array in (q, k, v)]
    assert torch.equal(flash_attn.flash_attn_func(*heads_first), expected)
    dims_first = [array.transpose(1, 3).contiguous().transpose(1, 3) for array in (q, k, v)]
    assert torch.equal(flash_attn.flash_attn_func(*dims_first), expected)


@pytest.mark.parametrize("batch,queries,keys", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_at_all(batch, queries, keys):
    q, k, v = arrays(batch=batch, queries=queries, keys=keys)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (batch, 6, queries)
    assert (out == 0).all() and (lse == torch.inf).all()


# Packed


def test_packed_arrays_are_views():
    kv = random(2, 45, 2, 2, 32, dtype=torch.bfloat16)
    q = arrays()[0]
    expected = flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], causal=True)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, causal=True), expected)

    qkv = random(2, 45, 3, 6, 32, dtype=torch.bfloat16)
    expected = flash_attn.flash_attn_func(*qkv.unbind(2), window_size=(4, 4))
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, window_size=(4, 4)), expected)
    mixed = random(2, 45, 10, 32, dtype=torch.bfloat16)
    expected = flash_attn.flash_attn_func(mixed[:, :, :6], mixed[:, :, 6:8], mixed[:, :, 8:])
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(mixed, num_heads_q=6), expected)


def test_packed_arrays_of_many_lengths_are_views():
    starts = torch.tensor([0, 9, 9, 45], dtype=torch.int32)
    kv, q = random(45, 2, 2, 32, dtype=torch.bfloat16), random(45, 6, 32, dtype=torch.bfloat16)
    expected = flash_attn.flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], starts, starts, 36, 36, causal=True)
    found = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 36, 36, causal=True)
    assert torch.equal(found, expected)
    qkv = random(45, 3, 6, 32, dtype=torch.bfloat16)
    expected = flash_attn.flash_attn_varlen_func(*qkv.unbind(1), starts, starts, 36, 36, causal=True)
    assert torch.equal(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts, 36, causal=True), expected)


# What is not done, and what has no effect


INERT = ("deterministic", "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "seqlen_k_per_split")


@pytest.mark.parametrize("name", INERT)
def test_hints_have_no_effect(name):
    q, k, v = arrays()
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **{name: True}), flash_attn.flash_attn_func(q, k, v))


REFUSED = {
    "dropout_p": 0.1,
    "score_mod": max,
    "mask_mod": max,
    "block_sparse_tensors": (),
    "gather_kv_indices": torch.zeros(1),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", ["flash_attn_func", "flash_attn_varlen_func"])
def test_what_is_not_done_is_refused_by_name(function, name):
    starts = starts_of((33,))
    lens = () if function == "flash_attn_func" else (starts, starts, 33, 33)
    with pytest.raises(NotImplementedError, match=f"^{name}: .*; .+"):
        getattr(flash_attn, function)(*arrays(), *lens, **{name: REFUSED[name]})


def test_what_is_refused_may_be_said_not_to_be():
    q, k, v = arrays()
    found = flash_attn.flash_attn_func(q, k, v, dropout_p=0, score_mod=None, mask_mod=None)
    assert torch.equal(found, flash_attn.flash_attn_func(q, k, v))


def test_unknown_keywords_are_errors():
    with pytest.raises(TypeError, match=r"flash_attn_func\(\) got an unexpected keyword argument 'seqused_k'"):
        flash_attn.flash_attn_func(*arrays(), seqused_k=None)
