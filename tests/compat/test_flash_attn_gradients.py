"""Gradients through FlashAttention's functions, against torch's autograd over the plain formula in float64."""

import functools

import pytest
import torch
from flash_attn_cases import (
    KEY_LENS,
    OPTIONS,
    QUERY_LENS,
    RAGGED,
    SLOPES,
    arrays,
    each_by_formula,
    ragged_arrays,
    starts_of,
)
from plain_attention import gradients, hold, plain, random

from headrace.compat import flash_attn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["plain", "causal", "window and causal", "softcap", "slopes of each", "scale"])
@pytest.mark.parametrize("queries,keys", [(33, 45), (45, 33)])
def test_gradients(name, queries, keys, dtype):
    theirs, ours = OPTIONS[name]
    q, k, v = arrays(dtype, queries=queries, keys=keys)
    d_out = random(*q.shape, dtype=dtype, seed=8)
    inputs = [array.requires_grad_() for array in (q, k, v)]
    out = flash_attn.flash_attn_func(*inputs, **theirs)
    compute = functools.partial(gradients, q, k, v, d_out=d_out, **ours)
    hold(torch.autograd.grad(out, inputs, d_out), compute, dtype)


def test_gradients_through_the_log_sum_exp():
    inputs = [array.requires_grad_() for array in arrays(torch.float32)]
    d_out, d_lse = random(2, 33, 6, 32, seed=8), random(2, 6, 33, seed=9)
    out, lse, _ = flash_attn.flash_attn_func(*inputs, causal=True, return_attn_probs=True)
    got = torch.autograd.grad((out, lse), inputs, (d_out, d_lse))
    hold(got, functools.partial(gradients, *inputs, d_out=d_out, d_lse=d_lse, causal=True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["plain", "causal", "slopes of each"])
def test_gradients_of_many_lengths(name, dtype):
    theirs, ours = RAGGED[name]
    given = ragged_arrays(dtype)
    d_out = random(*given[0].shape, dtype=dtype, seed=8)
    inputs = [array.requires_grad_() for array in given]
    lens = (starts_of(QUERY_LENS), starts_of(KEY_LENS), 17, 30)
    got = torch.autograd.grad(flash_attn.flash_attn_varlen_func(*inputs, *lens, **theirs), inputs, d_out)

    def compute(*, dtype, order=None):
        copies = [array.detach().to(dtype).requires_grad_() for array in given]
        out, _ = each_by_formula(*copies, QUERY_LENS, KEY_LENS, **ours)(dtype=dtype, order=order)
        return torch.autograd.grad(out, copies, d_out.to(dtype))

    hold(got, compute, dtype)


def test_gradients_of_packed_arrays():
    q, k, v = arrays(torch.float32, queries=45, kv_heads=6)
    inputs = [array.requires_grad_() for array in (q, k, v)]
    d_out = random(*q.shape, seed=8)
    expected = torch.autograd.grad(flash_attn.flash_attn_func(*inputs, causal=True), inputs, d_out)
    qkv = torch.stack([q, k, v], 2).detach().requires_grad_()
    (found,) = torch.autograd.grad(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), qkv, d_out)
    assert torch.equal(found, torch.stack(expected, 2))
    kv = torch.stack([k, v], 2).detach().requires_grad_()
    found = torch.autograd.grad(flash_attn.flash_attn_kvpacked_func(q, kv, causal=True), [q, kv], d_out)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], torch.stack(expected[1:], 2))


def test_the_gradient_of_a_sink():
    sink = torch.linspace(-1, 2, 6, dtype=torch.bfloat16).requires_grad_()
    q, k, v = arrays(torch.float32)
    d_out = random(*q.shape, seed=8)
    (found,) = torch.autograd.grad(flash_attn.flash_attn_func(q, k, v, learnable_sink=sink), sink, d_out)

    def compute(*, dtype, order=None):
        copy = sink.detach().to(dtype).requires_grad_()
        out, _ = plain(q, k, v, sink=copy, dtype=dtype, order=order)
        return torch.autograd.grad(out, [copy], d_out.to(dtype))

    hold([found], compute, torch.bfloat16)


def test_slopes_that_want_a_gradient_are_refused_by_name():
    q, k, v = arrays()
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        flash_attn.flash_attn_func(q, k, v, alibi_slopes=SLOPES.clone().requires_grad_())
