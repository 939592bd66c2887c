"""Attention under torch.compile: one graph, forward and backward, for shapes that change; exported too."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from headrace import ops


def randn(*shape, seed=0, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def heads_of(queries=9, keys=9, batch=2, dim=16, grad=True):
    return [
        randn(batch, n, heads, dim, seed=i, grad=grad)
        for i, (n, heads) in enumerate([(queries, 4), (keys, 2), (keys, 2)])
    ]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def causal(query, key, value):
    result = ops.attention(query * 1.5, key, value, causal=True, window=(6, None))
    return result.out + 1, result.lse


def ragged(query, key, value):
    arrays = (array.flatten(0, 1) for array in (query, key, value))
    starts = torch.arange(3, dtype=torch.int32) * query.shape[1]
    return ops.attention(*arrays, query_starts=starts, causal=True, softcap=4.0).out.relu()


def masked(query, key, value):
    mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
    return ops.attention(query, key, value, mask=mask, sinks=query.mean((0, 1, 3)), precision="exact").out


def merged(query, key, value):
    parts = [ops.attention(query, key[:, a:b], value[:, a:b]) for a, b in ((0, 3), (3, None))]
    whole = ops.merge_attention(parts)
    return whole.out, whole.lse


def paged(query, key, value):
    pages = [array.unflatten(1, (3, 3)).flatten(0, 1) for array in (key, value)]
    table = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    lens, starts = torch.tensor([9, 7], dtype=torch.int32), torch.tensor([0, 9, 18], dtype=torch.int32)
    return ops.paged_attention(query.flatten(0, 1), *pages, table, lens, query_starts=starts).out


def latent(query, key, value):
    pages = key.flatten(2).unflatten(1, (3, 3)).flatten(0, 1)
    table = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    lens, starts = torch.tensor([9, 7], dtype=torch.int32), torch.tensor([0, 9, 18], dtype=torch.int32)
    nope = torch.cat([query, query[..., :12]], -1).flatten(0, 1)
    given = {"query_rope": query[..., 12:].flatten(0, 1), "query_starts": starts, "value_dim": 20, "scale": 0.2}
    return ops.mla_attention(nope, pages, table, lens, **given).out


FUNCTIONS = {function.__name__: function for function in (causal, ragged, masked, merged, paged, latent)}


def ran(function, arrays):
    """All results and all gradients of a function."""
    leaves = [array.detach().clone().requires_grad_() for array in arrays]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    sum((result * torch.linspace(-1, 1, result.shape[-1])).sum() for result in results).backward()
    return [*results, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_computes_what_eager_does(name, dynamic):
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected, found = (ran(function, heads_of()) for function in (FUNCTIONS[name], compiled))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.slow
def test_torchs_own_compiler_takes_every_operator():
    def everything(*arrays):
        results = [function(*arrays) for function in FUNCTIONS.values()]
        return tuple(each for result in results for each in (result if isinstance(result, tuple) else (result,)))

    compiled = torch.compile(everything, fullgraph=True)
    torch.testing.assert_close(
        ran(compiled, heads_of()), ran(everything, heads_of())
    )  # sums are in an order of its own


def test_without_gradients_too():
    compiled = torch.compile(causal, backend="aot_eager", fullgraph=True)
    arrays = heads_of(grad=False)
    assert all(torch.equal(*pair) for pair in zip(compiled(*arrays), causal(*arrays), strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*heads_of())[0], causal(*arrays)[0])


def test_the_op_itself_is_compiled():
    compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
    result, expected = compiled(*heads_of(), causal=True), ops.attention(*heads_of(), causal=True)
    assert torch.equal(result.out, expected.out) and torch.equal(result.lse, expected.lse)


def test_no_key_length_compiles_anew():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(causal, backend=counter, fullgraph=True)
    for keys in (17, 33, 40, 64):
        arrays = heads_of(keys=keys)
        for array in arrays[1:]:
            torch._dynamo.mark_dynamic(array, 1)
        assert torch.equal(compiled(*arrays)[0], causal(*arrays)[0])
    assert counter.frame_count == 1


def test_autocast_is_compiled():
    def function(query, key, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ops.attention(query, key, value, causal=True).out

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, expected = ran(compiled, heads_of()), ran(function, heads_of())
    assert found[0].dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_results_are_written_in_place():
    def function(query, key, value, out):
        return ops.attention(query, key, value, out=out).out

    arrays, out = heads_of(grad=False), torch.zeros(2, 9, 4, 16)
    assert torch.compile(function, backend="aot_eager", fullgraph=True)(*arrays, out) is out
    assert torch.equal(out, ops.attention(*arrays).out)


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"key": (2, 9, 2, 8), "value": (2, 9, 2, 16)}, "head_dim"),
        ({"key": (2, 9, 3, 16), "value": (2, 9, 3, 16)}, "multiple of 3 heads"),
        ({"value": (2, 8, 2, 16)}, "value: expected"),
        ({"key": (1, 9, 2, 16), "value": (1, 9, 2, 16)}, "key: expected a batch"),
    ],
)
def test_shapes_are_checked_when_it_is_compiled(changes, text):
    arrays = dict(zip(("query", "key", "value"), heads_of(), strict=True))
    arrays |= {name: randn(*shape) for name, shape in changes.items()}
    with pytest.raises(RuntimeError, match=text):
        torch.compile(causal, backend="aot_eager", fullgraph=True)(**arrays)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(64, 128)

    def forward(self, hidden):
        query, key, value = self.project(hidden).unflatten(-1, (8, 16)).split((4, 2, 2), dim=-2)
        return hidden + ops.attention(query, key, value, causal=True).out.flatten(-2)


def test_a_module_is_exported():
    block, hidden = Block(), randn(2, 7, 64, grad=False)
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    program = torch.export.export(block, (hidden,), dynamic_shapes=({1: tokens},))
    longer = randn(2, 20, 64, grad=False)
    for each in (hidden, longer):
        torch.testing.assert_close(program.module()(each), block(each))


@pytest.mark.slow
def test_the_default_backend_compiles_it():
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for tokens in (12, 31):
        hidden = randn(2, tokens, 64)
        found = compiled(hidden)
        found.square().sum().backward()
        grads = [block.project.weight.grad.clone(), hidden.grad.clone()]
        block.zero_grad()
        hidden.grad = None
        expected = block(hidden)
        expected.square().sum().backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grads, [block.project.weight.grad, hidden.grad])
        block.zero_grad()
