"""Attention of torch tensors: gradients of the plain formula, operators that pass torch's own checks."""

import numpy as np
import pytest
import torch
import torch_formula
from torch_formula import as_type, gradients, numpy_of, tensors, weights_for

from headrace import ops
from headrace.check.attention_batch import attention_batch
from headrace.check.attention_cases import DENSE, RAGGED
from headrace.check.attention_gradients import gradient_batch, reference, straightforward
from headrace.check.compare import assert_within_budget, rounded
from headrace.errors import ArgumentError
from headrace.ops.torch_attention import ATTENTION

CASES = {case.name: case for case in (*RAGGED, *DENSE)}
SOME = [
    "ragged_one",
    "ragged_self",
    "ragged_cross",
    "ragged_top_left",
    "ragged_mask",
    "ragged_everything",
    "dense_cross",
    "dense_key_lens",
    "dense_heads_first",
    "dense_both_sides",
    "dense_float_mask",
    "dense_mask_documents",
    "dense_sinks",
    "dense_alibi",
    "dense_softcap",
    "dense_no_keys",
]
OPTIONS = {
    "causal": False,
    "align": "bottom_right",
    "window_left": None,
    "window_right": None,
    "softcap": None,
    "scale": None,
    "precision": "auto",
    "deterministic": False,
}
CHOICE = {"out_dtype": None, "kernel_name": None, "require": ""}


def randn(*shape, dtype=torch.float32, seed=0, grad=True):
    made = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(grad)


def heads_of(batch=2, queries=5, keys=7, heads=4, kv_heads=2, dim=6, value_dim=None, **rest):
    value_dim = value_dim or dim
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, value_dim)
    return [randn(*shape, seed=i, **rest) for i, shape in enumerate(shapes)]


def ragged_of(queries=(3, 0, 4), keys=(5, 2, 6), heads=4, kv_heads=2, dim=6, **rest):
    shapes = (sum(queries), heads, dim), (sum(keys), kv_heads, dim), (sum(keys), kv_heads, dim)
    starts = {"query_starts": starts_of(queries), "key_starts": starts_of(keys)}
    return [randn(*shape, seed=i, **rest) for i, shape in enumerate(shapes)], starts


def starts_of(lens):
    return torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)


# Gradients


def assert_gradients(case, dtype, arithmetic):
    """Every gradient is within the budget that a plain loop in that arithmetic sets."""
    batch = gradient_batch(case, dtype, dtype)
    plain = straightforward(batch, reference(batch), arithmetic)
    arrays = tensors({name: value for name, value in batch.items() if name not in ("d_out", "d_lse", "out", "lse")})
    weights = tensors(batch)["d_out"], tensors(batch)["d_lse"]
    names = [name for name in ("query", "key", "value", "sinks") if name in arrays]
    result, got = gradients(ops.attention, arrays, names, weights)
    _, exact = gradients(torch_formula.attention, as_type(arrays, torch.float64), names, weights)
    assert str(result.out.dtype) == f"torch.{dtype}" and result.out.requires_grad and result.lse.requires_grad
    for name in names:
        assert got[name].shape == arrays[name].shape and got[name].dtype == arrays[name].dtype
        own = str(got[name].dtype).removeprefix("torch.")
        assert_within_budget(numpy_of(got[name]), numpy_of(exact[name]), rounded(getattr(plain, name), own), own)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_those_of_the_formula(name):
    assert_gradients(CASES[name], "float32", "fp32")


@pytest.mark.parametrize("name", ["dense_self", "ragged_everything", "dense_key_lens_causal", "dense_float_mask"])
@pytest.mark.parametrize("dtype,arithmetic", [("bfloat16", "bf16"), ("float16", "fp32")])
def test_gradients_of_narrow_types_are_within_their_budget(name, dtype, arithmetic):
    assert_gradients(CASES[name], dtype, arithmetic)


GRADCHECKED = {
    "dense": ({}, False),
    "causal": ({"causal": True}, False),
    "top_left": ({"causal": True, "align": "top_left"}, False),
    "window": ({"window": (2, 1)}, False),
    "softcap": ({"softcap": 2.0, "causal": True}, False),
    "scale": ({"scale": 0.8}, False),
    "sinks": ({"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, False),
    "ragged": ({}, True),
    "ragged_everything": ({"causal": True, "softcap": 3.0, "sinks": torch.tensor([1.0, 0.1, -2.0, 0.0])}, True),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradients_are_those_of_small_changes(name):
    options, ragged = GRADCHECKED[name]
    arrays, starts = ragged_of(dtype=torch.float64) if ragged else (heads_of(dtype=torch.float64), {})

    def function(*arrays):
        result = ops.attention(*arrays, **starts, **options)
        return result.out, result.lse

    assert torch.autograd.gradcheck(function, arrays, fast_mode=True)


@pytest.mark.parametrize("name", ["dense_int4", "dense_float8", "ragged_int8"])
def test_queries_have_gradients_where_keys_are_quantized(name):
    from headrace.ops.torch_attention import decoded

    arrays = tensors(attention_batch(CASES[name]))
    weights = weights_for((*arrays["query"].shape[:-1], CASES[name].value_dim or CASES[name].head_dim))
    _, got = gradients(ops.attention, arrays, ["query"], weights)
    known = {kind: decoded(arrays[kind], arrays.pop(f"{kind}_scales", None)) for kind in ("key", "value")}
    _, exact = gradients(torch_formula.attention, as_type({**arrays, **known}, torch.float64), ["query"], weights)
    _, plain = gradients(torch_formula.attention, {**arrays, **known}, ["query"], weights)
    assert_within_budget(numpy_of(got["query"]), numpy_of(exact["query"]), numpy_of(plain["query"]), "float32")


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("sinks",), ("query", "sinks")])
def test_only_some_may_want_gradients(wanted):
    arrays = dict(zip(("query", "key", "value"), heads_of(grad=False), strict=True), sinks=torch.zeros(4))
    weights = weights_for(arrays["query"].shape)
    _, all_of_them = gradients(ops.attention, arrays, list(arrays), weights)
    _, some = gradients(ops.attention, arrays, list(wanted), weights)
    assert all(torch.equal(some[name], all_of_them[name]) for name in wanted)


def test_lse_alone_has_gradients_too():
    arrays = dict(zip(("query", "key", "value"), heads_of(grad=False, dtype=torch.float64), strict=True))
    found = []
    for function in (ops.attention, torch_formula.attention):
        leaves = {name: array.clone().requires_grad_() for name, array in arrays.items()}
        function(**leaves).lse.square().sum().backward()
        found.append(leaves)
    ours, theirs = found
    assert torch.equal(ours["value"].grad, torch.zeros_like(arrays["value"]))
    for name in ("query", "key"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_rows_that_see_nothing_pass_nothing_on():
    query, key, value = heads_of(queries=6, keys=2)
    result = ops.attention(query, key, value, causal=True)
    assert torch.isneginf(result.lse[:, :4]).all()
    result.out.sum().backward()
    assert not query.grad[:, :4].any() and all(array.grad.isfinite().all() for array in (query, key, value))


def test_gradients_are_the_same_bits_every_time():
    query, key, value = heads_of(batch=1, queries=300, keys=400, dim=64)
    runs = []
    for _ in range(3):
        out = ops.attention(query, key, value, causal=True).out
        runs.append(torch.autograd.grad(out.square().sum(), (query, key, value)))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("shape", ["expanded", "transposed", "every_other"])
def test_gradients_and_arrays_may_lie_anyhow(shape):
    query, key, value = heads_of(grad=False)
    upstream = {
        "expanded": torch.ones(()).expand(query.shape),
        "transposed": randn(2, 4, 5, 6, grad=False).transpose(1, 2),
        "every_other": randn(2, 5, 4, 12, grad=False)[..., ::2],
    }[shape]
    heads_first = [array.transpose(1, 2).contiguous().requires_grad_() for array in (query, key, value)]
    ops.attention(*(array.transpose(1, 2) for array in heads_first)).out.backward(upstream)
    plain = [array.clone().requires_grad_() for array in (query, key, value)]
    ops.attention(*plain).out.backward(upstream.contiguous())
    assert all(torch.equal(a.grad.transpose(1, 2), b.grad) for a, b in zip(heads_first, plain, strict=True))


def test_one_array_may_be_query_key_and_value():
    same = randn(1, 6, 2, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.attention(x, x, x, causal=True).out, (same,), fast_mode=True)


def test_nothing_to_compute_has_gradients_of_nothing():
    for batch, queries in ((0, 3), (2, 0)):
        query, key, value = heads_of(batch=batch, queries=queries, keys=4)
        ops.attention(query, key, value).out.sum().backward()
        assert query.grad.shape == query.shape and not key.grad.any()


# When torch is asked


def test_plain_calls_do_not_go_through_torch(monkeypatch):
    def never(*args, **rest):
        raise AssertionError("went through torch")

    monkeypatch.setattr("headrace.ops.torch_attention.attention", never)
    query, key, value = heads_of(grad=False)
    assert not ops.attention(query, key, value).out.requires_grad
    with torch.no_grad():
        assert not ops.attention(query.requires_grad_(), key, value).out.requires_grad
    with torch.inference_mode():
        assert ops.attention(*heads_of(grad=False)).out.shape == query.shape
    with pytest.raises(AssertionError, match="went through torch"):
        ops.attention(query, key, value)


def test_the_operator_gives_the_same_bits_as_the_plain_call():
    query, key, value = heads_of(queries=40, keys=50, dim=64)
    tracked = ops.attention(query, key, value, causal=True)
    with torch.no_grad():
        plain = ops.attention(query, key, value, causal=True)
    assert isinstance(tracked, ops.AttentionResult)
    assert torch.equal(tracked.out, plain.out) and torch.equal(tracked.lse, plain.lse)


def test_numpy_arrays_may_stand_beside_tensors():
    (query, key, value), starts = ragged_of()
    as_numpy = {name: array.numpy() for name, array in starts.items()}
    assert torch.equal(ops.attention(query, key, value, **as_numpy).out, ops.attention(query, key, value, **starts).out)


def test_a_result_of_another_type_has_gradients_of_the_first():
    query, key, value = heads_of(dtype=torch.bfloat16)
    wide = ops.attention(query, key, value, out_dtype="float32", require=("deterministic",))
    assert wide.out.dtype == torch.float32
    wide.out.sum().backward()
    assert query.grad.dtype == key.grad.dtype == value.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"window": 7}, "window: expected"),
        ({"scale": "1"}, "scale: expected a finite number"),
        ({"causal": 1}, "causal: expected True or False"),
        ({"sinks": torch.zeros(5)}, "sinks: expected"),
        ({"query_starts": starts_of([5])}, "query_starts: expected None"),
        ({"require": ("speed",)}, "require: expected names among"),
    ],
)
def test_mistakes_are_named_where_gradients_are_wanted_too(changes, text):
    with pytest.raises(ArgumentError, match=text):
        ops.attention(*heads_of(), **changes)
    with pytest.raises(ArgumentError, match="key: expected the query's head_dim"):
        ops.attention(randn(1, 2, 2, 8), randn(1, 2, 2, 4), randn(1, 2, 2, 4))


REFUSED = {
    "mask": lambda: {"mask": torch.zeros(5, 7, requires_grad=True)},
    "alibi_slopes": lambda: {"alibi_slopes": torch.zeros(4, requires_grad=True)},
    "out": lambda: {"out": torch.empty(2, 5, 4, 6)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_gradients_that_nobody_computes_are_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=f"{name}: "):
        ops.attention(*heads_of(), **REFUSED[name]())


def test_scales_have_no_gradients():
    arrays = tensors(attention_batch(CASES["ragged_int8"]))
    arrays["key_scales"].requires_grad_()
    with pytest.raises(NotImplementedError, match="key_scales: "):
        ops.attention(**arrays)


# torch's own checks


def operands(arrays, options=(), **rest):
    """The arguments of torch.ops.headrace.attention."""
    given = dict(zip(("query", "key", "value"), arrays, strict=True)) | rest
    return [given.get(name) for name in ATTENTION.tensors], OPTIONS | CHOICE | dict(options)


OPCHECKED = {
    "dense": lambda: operands(heads_of()),
    "causal_narrow": lambda: operands(
        heads_of(dtype=torch.bfloat16, grad=False), {"causal": True, "out_dtype": "float32"}
    ),
    "double": lambda: operands(heads_of(dtype=torch.float64, value_dim=3), {"softcap": 5.0, "align": "top_left"}),
    "window_mask_sinks": lambda: operands(
        heads_of(),
        {"window_left": 3, "window_right": 1, "scale": 0.3},
        sinks=randn(4),
        mask=torch.zeros(5, 7),
        alibi_slopes=torch.ones(4),
    ),
    "key_lens": lambda: operands(heads_of(), key_lens=torch.tensor([7, 3], dtype=torch.int32)),
    "ragged": lambda: operands(ragged_of()[0], {"precision": "exact", "require": "exact"}, **ragged_of()[1]),
    "quantized": lambda: operands(
        [randn(1, 3, 2, 8), *torch.randint(-9, 9, (2, 1, 4, 2, 8), dtype=torch.int8)],
        key_scales=torch.ones(1, 4, 2),
        value_scales=torch.ones(1, 4, 2),
    ),
}


@pytest.mark.parametrize("name", OPCHECKED)
def test_the_operator_passes_torchs_checks(name):
    tensors_, options = OPCHECKED[name]()
    torch.library.opcheck(torch.ops.headrace.attention.default, tensors_, options)


@pytest.mark.parametrize("name", ["dense", "ragged", "quantized"])
def test_the_backward_operator_passes_torchs_checks(name):
    tensors_, options = OPCHECKED[name]()
    tensors_ = [array if array is None else array.detach() for array in tensors_]
    out, lse = torch.ops.headrace.attention(*tensors_, **options)
    given = [torch.ones_like(out), out, lse, *tensors_[:3], None, *tensors_[3:]]
    options = {key: option for key, option in options.items() if key in OPTIONS}
    torch.library.opcheck(torch.ops.headrace.attention_backward.default, given, options)
