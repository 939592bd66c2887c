"""append_pages of torch tensors that torch sees: what is written, in order, also where it is compiled."""

import pytest
import torch

from headrace import ops
from headrace.ops.torch_append import _CHANGED, _TENSORS


def arrays_of(dtype=torch.float32, tokens=3):
    random = torch.Generator().manual_seed(0)
    made = {name: torch.randn(tokens, heads, 8, dtype=dtype, generator=random) for name, heads in HEADS.items()}
    made |= {name: torch.zeros(4, 2, 2, 8, dtype=dtype) for name in ("key_pages", "value_pages")}
    return made | {
        "slots": torch.tensor([5, 0, 3], dtype=torch.int32),
        "table": torch.rand(tokens, 4, generator=random),
    }


HEADS = {"query": 4, "key": 2, "value": 2}


def copy_of(arrays):
    return {name: array.clone() for name, array in arrays.items()}


def latent_arrays():
    random = torch.Generator().manual_seed(0)
    rows = {"latent": (3, 6), "rope_key": (3, 4), "query_rope": (3, 2, 4)}
    made = {name: torch.randn(*shape, generator=random) for name, shape in rows.items()}
    made |= {"latent_pages": torch.zeros(4, 2, 10), "slots": torch.tensor([5, 0, 3], dtype=torch.int32)}
    return made | {"table": torch.rand(3, 4, generator=random)}


@pytest.mark.parametrize("name,make", [("append_pages", arrays_of), ("append_latent_pages", latent_arrays)])
def test_compiled_it_writes_what_it_writes_alone(name, make):
    function = getattr(ops, name)

    def step(arrays):
        return function(**arrays) * 2

    plain, compiled = copy_of(make()), copy_of(make())
    expected = step(plain)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(compiled), expected)
    assert all(torch.equal(plain[each], compiled[each]) for each in plain)
    assert plain["key_pages" if "key_pages" in plain else "latent_pages"].any()


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_appended_is_attended_to_in_one_graph(backend):
    def step(arrays):
        rotated = ops.append_pages(**arrays)
        lens, starts = torch.tensor([6], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
        table = torch.tensor([[0, 1, 2]], dtype=torch.int32)
        pages = arrays["key_pages"], arrays["value_pages"]
        paged = ops.paged_attention(rotated, *pages, table, lens, query_starts=starts)
        latents = arrays["key_pages"].flatten(2)
        given = {"query_starts": starts, "value_dim": 8, "scale": 0.25}
        latent = ops.mla_attention(rotated.repeat(1, 1, 2), latents, table, lens, **given)
        return ops.merge_attention([paged, latent]).out

    plain, compiled = copy_of(arrays_of()), copy_of(arrays_of())
    torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(compiled), step(plain))
    assert torch.equal(plain["key_pages"], compiled["key_pages"])


@pytest.mark.parametrize("dtype,out_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_queries_may_go_elsewhere_and_be_of_another_type(dtype, out_dtype):
    def step(arrays, out):
        return ops.append_pages(**arrays, out=out)

    arrays, found = arrays_of(dtype), []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        given, out = copy_of(arrays), torch.empty(3, 4, 8, dtype=out_dtype)
        assert function(given, out) is out and torch.equal(given["query"], arrays["query"])
        found.append(out)
    assert torch.equal(*found)


def test_gradients_are_refused():
    arrays = arrays_of()
    arrays["key"].requires_grad_()
    with pytest.raises(NotImplementedError, match="key: append_pages has no gradient"):
        ops.append_pages(**arrays)
    with torch.no_grad():
        ops.append_pages(**arrays)


@pytest.mark.parametrize("autocast", [False, True])  # without and with torch's operator
def test_what_is_written_counts_as_changed(autocast):
    arrays, factor = arrays_of(), torch.ones(1, requires_grad=True)
    product = factor * arrays["key_pages"]
    with torch.autocast("cpu", enabled=autocast):
        ops.append_pages(**arrays)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("without", [(), ("query", "table"), ("value", "value_pages")])
def test_the_operator_passes_torchs_checks(without):
    arrays = {name: array for name, array in arrays_of().items() if name not in without}
    options = {"interleaved": True, "eps": 1e-6, "spread": False, "kernel_name": None}
    assert set(_CHANGED) <= set(_TENSORS)
    torch.library.opcheck(torch.ops.headrace.append_pages.default, [arrays.get(name) for name in _TENSORS], options)
