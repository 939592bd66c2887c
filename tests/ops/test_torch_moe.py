"""route and mixture_of_experts of tensors that torch sees: compiled, exported, with gradients or without by name."""

import pytest
import torch

from headrace import ops
from headrace.ops import torch_moe

FORMS = {
    "softmax": {},
    "not_normalized": {"normalize": False, "scale": 2.5},
    "sigmoid": {"scores": "sigmoid", "scale": 0.5},
    "groups": {"scores": "sigmoid", "num_groups": 4, "top_groups": 2},
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts(dtype=torch.float32):
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(4, 16, 12), (4, 16, 12), (4, 12, 16)])]


def block(x, router, gate, up, down):
    routing = ops.route(x @ router, 2)
    return ops.mixture_of_experts(x * 1.5, gate, up, down, routing, residual=x) + 1


def arrays(tokens=5):
    return [randn(tokens, 12, seed=7), randn(12, 4, seed=8), *experts()]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_computes_what_eager_does(backend):
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 3, 8):
        torch.testing.assert_close(compiled(*arrays(tokens)), block(*arrays(tokens)))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, array in zip(("router", "gate", "up", "down"), arrays()[1:], strict=True):
            self.register_buffer(name, array)

    def forward(self, x):
        return block(x, self.router, self.gate, self.up, self.down)


def test_a_layer_is_exported():
    layer, x = Layer(), arrays()[0]
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=64)},))
    for each in (x, arrays(9)[0]):
        torch.testing.assert_close(program.module()(each), layer(each))


def weights_in_torch(logits, bias, form):
    """By torch's own operations, of the experts that the op chooses."""
    options = {"normalize": True, "scale": 1.0} | FORMS[form]
    chosen = ops.route(logits.detach(), 2, bias=bias, **FORMS[form]).experts.long()
    scores = logits.sigmoid() if "scores" in options else logits.softmax(-1)
    found = scores.gather(1, chosen)
    return options["scale"] * (found / found.sum(1, keepdim=True) if options["normalize"] else found)


def weights_of_op(logits, bias, form):
    return ops.route(logits, 2, bias=bias, **FORMS[form]).weights


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_choice_are_those_of_its_formula(form):
    logits, bias, told = randn(6, 8, seed=1), randn(8, seed=2), randn(6, 2, seed=3)
    grads = []
    for function in (weights_of_op, weights_in_torch):
        leaf = logits.clone().requires_grad_()
        (function(leaf, bias, form) * told).sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_gradients_of_the_choice_are_compiled_with_it():
    def function(logits):
        return ops.route(logits, 2).weights.square().sum()

    found = []
    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaf = randn(6, 8).requires_grad_()
        each(leaf).backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["x", "down", "routing.weights", "residual"])
def test_gradients_of_experts_are_refused_by_name(name):
    x, router, *matrices = arrays()
    given = dict(zip(("x", "gate", "up", "down"), (x, *matrices), strict=True)) | {"residual": x.clone()}
    routing = ops.route(x @ router, 2)
    (routing.weights if name == "routing.weights" else given[name]).requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^{name}: mixture_of_experts has no gradient"):
        ops.mixture_of_experts(**given, routing=routing)
    with torch.no_grad():
        assert not ops.mixture_of_experts(**given, routing=routing).requires_grad


def test_results_are_written_in_place():
    def function(x, gate, up, down, out):
        return ops.mixture_of_experts(x, gate, up, down, ops.route(x[:, :4], 2), out=out)

    given, out = [arrays()[0], *experts()], torch.zeros(5, 12, dtype=torch.float16)
    assert torch.compile(function, backend="aot_eager", fullgraph=True)(*given, out) is out
    assert torch.equal(out, function(*given, torch.empty_like(out))) and out.any()


def test_autocast_leaves_both_as_they_are():
    given = arrays()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = ops.route(given[0][:, :4], 2)
        found = ops.mixture_of_experts(given[0], *experts(torch.bfloat16), routing)
    assert (routing.weights.dtype, found.dtype) == (torch.float32, torch.float32)
    assert torch.equal(found, ops.mixture_of_experts(given[0], *experts(torch.bfloat16), routing))


@pytest.mark.parametrize("place,shape", [(0, (5, 11)), (2, (4, 16, 11)), (4, (4, 12, 15))])
def test_shapes_are_checked_when_it_is_compiled(place, shape):
    def function(x, gate, up, down):
        return ops.mixture_of_experts(x, gate, up, down, ops.route(x[:, :4], 2))

    given = [arrays()[0], *experts()]
    given[max(place - 1, 0)] = randn(*shape)
    with pytest.raises(RuntimeError, match="expected"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(*given)


@pytest.mark.parametrize("bias", [False, True])
def test_the_choice_passes_torchs_own_checks(bias):
    options = {"top_k": 2, "scores": "softmax", "normalize": True, "scale": 1.0, "num_groups": 1, "top_groups": None}
    logits = randn(6, 8).requires_grad_()
    given = (logits, randn(8) if bias else None)
    torch.library.opcheck(torch.ops.headrace.route.default, given, options | {"kernel_name": None})


@pytest.mark.parametrize("residual", [False, True])
def test_experts_pass_torchs_own_checks(residual):
    x, router, *matrices = arrays()
    routing = ops.route(x @ router, 2)
    given = (x, *matrices, routing.experts, routing.weights, None, None, None, x.clone() if residual else None)
    assert len(given) == len(torch_moe._TENSORS)
    options = {"activation": "silu", "precision": "auto", "deterministic": False, "out_dtype": None}
    options |= {"kernel_name": None, "require": ""}
    torch.library.opcheck(torch.ops.headrace.mixture_of_experts.default, given, options)
