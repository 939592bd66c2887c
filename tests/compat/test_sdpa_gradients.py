"""Gradients through scaled_dot_product_attention, autocast, and a program with the import replaced."""

import functools

import pytest
import torch
import torch.nn.functional as F
from plain_attention import hold, random
from test_sdpa import arrays, by_torch, seen

from headrace.compat.sdpa import scaled_dot_product_attention


def gradients_of(function, given, d_out, **options):
    inputs = [array.detach().requires_grad_() for array in given]
    return torch.autograd.grad(function(*inputs, **options), inputs, d_out)


GRADIENTS = {
    "plain": ({}, {}),
    "causal": ({"queries": 17, "keys": 40}, {"is_causal": True}),
    "grouped": ({"kv_heads": 2}, {"enable_gqa": True, "is_causal": True}),
    "shared head": ({"kv_heads": 1}, {}),
    "bool mask": ({}, {"attn_mask": seen(2, 1, 33, 33)}),
    "float mask": ({}, {"attn_mask": random(6, 33, 33)}),
    "rows that see nothing": ({}, {"attn_mask": torch.ones(33, 33, dtype=torch.bool).tril(-3)}),
    "value dim": ({"value_dim": 40}, {"scale": 0.1}),
    "no keys": ({"keys": 0}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, dtype):
    sizes, options = GRADIENTS[name]
    given = arrays(dtype, **sizes)
    d_out = random(*given[0].shape[:-1], given[2].shape[-1], dtype=dtype, seed=9)

    def by_torch_in(dtype, order=None):
        def function(query, key, value):
            return by_torch(query, key, value, dtype=dtype, order=order, **options)[0]

        return gradients_of(function, [array.to(dtype) for array in given], d_out.to(dtype))

    hold(gradients_of(scaled_dot_product_attention, given, d_out, **options), by_torch_in, dtype)


def test_autocast_is_as_torchs():
    given = arrays()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = scaled_dot_product_attention(*given), F.scaled_dot_product_attention(*given)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    narrow = [array.bfloat16() for array in given]
    hold([mine], functools.partial(by_torch, *narrow), torch.bfloat16)


def test_a_program_with_the_import_replaced(monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True)
    x = torch.randn(2, 20, 48)
    expected = layer(x)
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return scaled_dot_product_attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(layer(x), expected)
    assert calls
