"""sdpa and FlashAttention by headrace in torch.compile(fullgraph=True), forward and backward."""

import pytest
import torch
from flash_attn_cases import QUERY_LENS, SLOPES, ragged_arrays, starts_of
from plain_attention import random
from torch.nn.attention.bias import causal_lower_right

from headrace.compat import flash_attn
from headrace.compat.sdpa import scaled_dot_product_attention

STARTS = starts_of(QUERY_LENS)
BIAS = causal_lower_right(33, 33)


def sdpa(q, k, v):
    heads_first = (array.transpose(1, 2) for array in (q, k, v))
    return scaled_dot_product_attention(*heads_first, attn_mask=BIAS, enable_gqa=True)


def flash(q, k, v):
    options = {"causal": True, "window_size": (8, 0), "softcap": 3.0, "learnable_sink": SLOPES, "alibi_slopes": SLOPES}
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    return out * lse.transpose(1, 2)[..., None].sigmoid()


def packed(q, k, v):
    return flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), attention_chunk=8)


def varlen(q, k, v):
    return flash_attn.flash_attn_varlen_func(q, k, v, STARTS, STARTS, 17, 17, causal=True)


def dense_arrays():
    return [random(2, 33, heads, 16, seed=i) for i, heads in enumerate((6, 2, 2))]


@pytest.mark.slow
@pytest.mark.parametrize("function", [sdpa, flash, packed, varlen], ids=lambda function: function.__name__)
def test_compiled_as_one_graph(function):
    torch._dynamo.reset()
    given = ragged_arrays(torch.float32, key_lens=QUERY_LENS) if function is varlen else dense_arrays()
    inputs = [array.requires_grad_() for array in given]
    expected, found = function(*inputs), torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected)
    d_out = random(*expected.shape, seed=9)
    gradients = [torch.autograd.grad(out, inputs, d_out) for out in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
