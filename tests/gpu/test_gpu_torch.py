"""torch.compile in one graph, torch's own check of each operator, and gradients, on the GPU."""

import pytest
import torch

from headrace import ops

pytestmark = pytest.mark.gpu


def randn(*shape, seed=0, dtype=torch.bfloat16):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
    return made.requires_grad_()


def heads_of(dtype=torch.bfloat16):
    return [randn(2, 48, heads, 64, seed=i, dtype=dtype) for i, heads in enumerate((4, 2, 2))]


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def causal(query, key, value):
    return ops.attention(query, key, value, causal=True, window=(30, None)).out


def ragged(query, key, value):
    arrays = (array.flatten(0, 1) for array in (query, key, value))
    return ops.attention(*arrays, query_starts=int32(0, 48, 96), key_starts=int32(0, 48, 96), softcap=9.0).out


def paged(query, key, value):
    pages = [array.unflatten(1, (3, 16)).flatten(0, 1) for array in (key, value)]
    table = torch.arange(6, dtype=torch.int32, device="cuda").reshape(2, 3)
    return ops.paged_attention(query.flatten(0, 1), *pages, table, int32(48, 33), query_starts=int32(0, 48, 81)).out[
        :81
    ]


FUNCTIONS = {function.__name__: function for function in (causal, ragged, paged)}


def ran(function, arrays):
    leaves = [array.detach().clone().requires_grad_() for array in arrays]
    result = function(*leaves)
    (result.float() * torch.linspace(-1, 1, result.shape[-1], device="cuda")).sum().backward()
    return [result, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_computes_what_eager_does(name):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True)
    expected, found = (ran(function, heads_of()) for function in (FUNCTIONS[name], compiled))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_call_can_be_captured(name):
    torch._dynamo.reset()
    arrays = [array.detach() for array in heads_of()]
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, mode="reduce-overhead")
    expected = FUNCTIONS[name](*arrays)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(*arrays), expected)


def test_torch_accepts_every_operator_of_attention():
    query, key, value = heads_of(torch.float32)
    found = ops.attention(query, key, value, causal=True)
    assert found.out.requires_grad
    names = ("attention", "paged_attention", "mla_attention")
    assert all(hasattr(torch.ops.headrace, name) for name in names)


def test_gradients_are_those_of_torchs_own_attention():
    arrays = heads_of(torch.float32)
    exact = [array.detach().double().requires_grad_() for array in arrays]
    heads_first = [array.transpose(1, 2) for array in exact]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    d_out = torch.randn_like(theirs)
    theirs.backward(d_out)
    ours = ops.attention(*arrays, causal=True, precision="exact").out
    ours.backward(d_out.transpose(1, 2).float())
    for one, other in zip(arrays, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
