"""What FlashAttention 3 and 4 add: float8, a second query, combining parts, and their own orders of arguments."""

import inspect
import math

import pytest
import torch
from flash_attn_cases import KEY_LENS, QUERY_LENS, arrays, ragged_arrays, starts_of
from plain_attention import hold, plain, random

from headrace.compat import flash_attn, flash_attn_interface
from headrace.compat.flash_attn import cute

REQUIRED = inspect.Parameter.empty
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"


def test_a_second_query_for_the_values():
    q, k, v = arrays(kv_heads=1, dim=24, value_dim=40)
    qv = random(2, 33, 6, 40, dtype=torch.bfloat16, seed=7)
    out, lse = flash_attn.flash_attn_func(q, k, v, causal=True, qv=qv, return_lse=True)

    def compute(**how):
        return plain(torch.cat([q, qv], -1), torch.cat([k, v], -1), v, causal=True, **how)

    hold([out, lse], compute, torch.bfloat16, logarithms=[1])


def float8(array):
    return array.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_float8_with_its_scales(scaled, ragged):
    q, k, v = (float8(array) for array in arrays(torch.float32, queries=45))
    scales = [torch.rand(2, 2, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(3)]
    names = ("q_descale", "k_descale", "v_descale")
    given = dict(zip(names, scales, strict=True)) if scaled else {}
    if ragged:
        starts = starts_of((45, 45))
        rows = [array.flatten(0, 1) for array in (q, k, v)]
        out = flash_attn.flash_attn_varlen_func(*rows, starts, starts, 45, 45, causal=True, **given).view(2, 45, 6, 32)
    else:
        out = flash_attn.flash_attn_func(q, k, v, causal=True, **given)
    assert out.dtype == torch.bfloat16
    ones = scales if scaled else [torch.ones(2, 2)] * 3
    groups = (3, 1, 1)
    wide = [
        array.double() * scale.double().repeat_interleave(group, 1)[:, None, :, None]
        for array, scale, group in zip((q, k, v), ones, groups, strict=True)
    ]
    hold([out], lambda **how: plain(*wide, causal=True, **how)[:1], torch.bfloat16)


def test_scales_of_other_types_are_not_read():
    q, k, v = arrays()
    nan = torch.full((2, 2), torch.nan)
    found = flash_attn.flash_attn_func(q, k, v, q_descale=nan, k_descale=nan, v_descale=nan)
    assert torch.equal(found, flash_attn.flash_attn_func(q, k, v))


# Version 3's own order

FA3 = {
    "flash_attn_func": "q k v softmax_scale=None causal=False qv=None q_descale=None k_descale=None v_descale=None "
    "window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False sm_margin=0 "
    "return_attn_probs=False",
    "flash_attn_qkvpacked_func": "qkv softmax_scale=None causal=False q_descale=None k_descale=None v_descale=None "
    "window_size=(-1,-1) attention_chunk=0 softcap=0.0 deterministic=False num_heads_q=None sm_margin=0 "
    "return_attn_probs=False",
    "flash_attn_varlen_func": f"q k v {LENGTHS} seqused_q=None seqused_k=None softmax_scale=None causal=False qv=None "
    "q_descale=None k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 "
    "pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False",
    "flash_attn_combine": "out_partial lse_partial out=None out_dtype=None",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None "
    "cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None q_descale=None k_descale=None v_descale=None "
    "softmax_scale=None causal=False window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True "
    "scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False",
    "get_scheduler_metadata": "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens "
    f"qkv_dtype={torch.bfloat16} headdim_v=None cu_seqlens_q=None cu_seqlens_k_new=None cache_leftpad=None "
    "page_size=None max_seqlen_k_new=0 causal=False window_size=(-1,-1) attention_chunk=0 has_softcap=False "
    "num_splits=0 pack_gqa=None sm_margin=0",
}


@pytest.mark.parametrize("name", FA3)
def test_the_signatures_of_version_3(name):
    assert told(getattr(flash_attn_interface, name)) == FA3[name]


def told(function):
    """Names and defaults, in order."""
    found = inspect.signature(function).parameters.values()
    return " ".join(
        each.name if each.default is REQUIRED else f"{each.name}={each.default}".replace(", ", ",") for each in found
    )


_OPTIONS_4 = (
    "softmax_scale=None causal=False window_size=(None,None) learnable_sink=None softcap=0.0 num_splits=1 "
    "pack_gqa=None deterministic=False score_mod=None score_mod_bwd=None mask_mod=None"
)
FA4 = {
    "flash_attn_func": f"q k v qv=None gather_kv_indices=None {_OPTIONS_4} aux_tensors=None aux_scalars=None "
    "block_sparse_tensors=None block_sparse_tensors_bwd=None return_lse=False",
    "flash_attn_varlen_func": "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None "
    f"min_seqlen_k=None seqused_q=None seqused_k=None gather_kv_indices=None page_table=None {_OPTIONS_4} "
    "block_sparse_tensors=None aux_tensors=None aux_scalars=None return_lse=False scheduler_metadata=None "
    "seqlen_k_per_split=None disable_scheduler_metadata=False",
}


@pytest.mark.parametrize("name", FA4)
def test_the_signatures_of_version_4(name):
    assert told(getattr(cute, name)) == FA4[name]


def test_version_4_gives_what_version_2_does():
    q, k, v = arrays()
    sink = torch.linspace(-1, 1, 6, dtype=torch.bfloat16)
    options = {"causal": True, "softcap": 4.0, "learnable_sink": sink}
    expected = flash_attn.flash_attn_func(q, k, v, window_size=(9, -1), return_lse=True, **options)
    found = cute.flash_attn_func(q, k, v, window_size=(9, None), return_lse=True, **options)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert cute.flash_attn_func(q, k, v)[1] is None
    q, k, v = ragged_arrays()
    lens = (starts_of(QUERY_LENS), starts_of(KEY_LENS), 17, 30)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, *lens, **options)
    found = cute.flash_attn_varlen_func(q, k, v, None, *lens, **options)
    assert torch.equal(found[0], expected) and found[1] is None


def test_version_4_has_the_heads_last_beside_a_second_query_and_minus_inf_of_nothing():
    q, k, v = arrays(torch.float32, queries=5, keys=2)
    _, lse = cute.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert lse.shape == (2, 6, 5) and (lse[:, :, :3] == -torch.inf).all()
    _, turned = cute.flash_attn_func(q, k, v, torch.zeros_like(q), causal=True, return_lse=True)
    assert turned.shape == (2, 5, 6)


@pytest.mark.parametrize("name", ["score_mod", "mask_mod", "aux_tensors", "block_sparse_tensors", "gather_kv_indices"])
def test_version_4_refuses_by_name(name):
    for function in (cute.flash_attn_func, cute.flash_attn_varlen_func):
        with pytest.raises(NotImplementedError, match=f"^{name}: "):
            function(*arrays(), **{name: ()})


def test_version_3_says_minus_inf_of_nothing():
    q, k, v = arrays(torch.float32, queries=5, keys=2)
    out, lse = flash_attn_interface.flash_attn_func(q, k, v, None, True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all() and lse[:, :, 3:].isfinite().all()


def test_version_3_gives_what_version_2_does():
    q, k, v = arrays()
    expected = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.2, causal=True, window_size=(9, 0), softcap=4.0)
    found = flash_attn_interface.flash_attn_func(q, k, v, 0.2, True, window_size=(9, 0), softcap=4.0, num_splits=3)
    assert torch.equal(found, expected)
    qkv = random(2, 45, 3, 6, 32)
    expected = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(flash_attn_interface.flash_attn_qkvpacked_func(qkv, None, True), expected)
    q, k, v = ragged_arrays()
    lens = (starts_of(QUERY_LENS), starts_of(KEY_LENS), 17, 30)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, *lens, causal=True)
    assert torch.equal(flash_attn_interface.flash_attn_varlen_func(q, k, v, *lens, None, None, None, True), expected)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_parts_are_combined(out_dtype):
    parts = random(5, 2, 6, 9, 32, seed=1).transpose(2, 3)
    lses = random(5, 2, 6, 9, seed=2).transpose(-1, -2)
    lses[2:, 0] = -torch.inf
    lses[:, 1, 3] = -torch.inf
    out, lse = flash_attn.flash_attn_combine(parts, lses, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or torch.float32) and lse.shape == (2, 9, 6)

    def compute(*, dtype, order=None):
        weights = lses.to(dtype).softmax(0).nan_to_num(0.0)
        return (weights[..., None] * parts.to(dtype)).sum(0), lses.to(dtype).logsumexp(0)

    hold([out, lse], compute, torch.float32, logarithms=[1])
    mine = torch.full_like(out, math.nan)
    again, _ = flash_attn.flash_attn_combine(parts, lses, out=mine)
    assert again is mine and torch.equal(mine, out)


def test_a_plan_for_the_scheduler_is_taken():
    q, k, v = arrays()
    lens = torch.tensor([45, 45], dtype=torch.int32)
    plan = flash_attn.get_scheduler_metadata(2, 33, 45, 6, 2, 32, lens, causal=True)
    assert plan.dtype == torch.int32
    found = flash_attn_interface.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lens, causal=True, scheduler_metadata=plan
    )
    torch.testing.assert_close(found, flash_attn.flash_attn_func(q, k, v, causal=True))
