"""torch.compile in one graph, torch's own check of each operator, and gradients, on the GPU."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from headrace import ops
from headrace.check.compare import assert_within_budget
from headrace.check.guards import as_numpy
from headrace.ops.torch_attention import ATTENTION as DENSE
from headrace.ops.torch_paged import PAGED

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
    starts, lens = int32(0, 48, 96), int32(48, 33)
    return ops.paged_attention(query.flatten(0, 1), *pages, table, lens, query_starts=starts).out


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


OPTIONS = {
    "causal": True,
    "align": "bottom_right",
    "window_left": None,
    "window_right": None,
    "softcap": None,
    "scale": None,
    "precision": "auto",
    "deterministic": False,
    "out_dtype": None,
    "kernel_name": None,
    "require": "",
}


def test_torch_accepts_the_operator_of_attention():
    arrays = heads_of()
    ops.attention(*arrays, causal=True)  # registers it
    given = [*arrays, *[None] * (len(DENSE.tensors) - 3)]
    torch.library.opcheck(torch.ops.headrace.attention.default, given, OPTIONS)


def test_torch_accepts_the_operator_of_paged_attention():
    query, key, value = heads_of()
    pages = [array.detach().unflatten(1, (3, 16)).flatten(0, 1) for array in (key, value)]
    table = torch.arange(6, dtype=torch.int32, device="cuda").reshape(2, 3)
    given = [query.detach().flatten(0, 1), *pages, table, int32(48, 33), int32(0, 48, 96)]
    given += [None] * (len(PAGED.tensors) - len(given))
    torch.library.opcheck(torch.ops.headrace.paged_attention.default, given, OPTIONS | {"cascade": "auto"})


def gradients(arrays, d_out):
    """By torch's own attention, as written, in the type of the arrays."""
    leaves = [array.detach().clone().requires_grad_() for array in arrays]
    heads_first = [leaf.transpose(1, 2) for leaf in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    out.backward(d_out.transpose(1, 2).to(out.dtype))
    return [leaf.grad for leaf in leaves]


def test_gradients_hold_their_budget():
    arrays = heads_of(torch.float32)
    found = ops.attention(*arrays, causal=True, precision="exact").out
    d_out = torch.randn_like(found)
    found.backward(d_out)
    exact = gradients([array.double() for array in arrays], d_out)
    for ours, true, plain in zip(arrays, exact, gradients(arrays, d_out), strict=True):
        assert_within_budget(as_numpy(ours.grad), as_numpy(true), as_numpy(plain), "float32")
