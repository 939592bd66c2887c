"""Attention over pages of torch tensors: gradients of the formula over gathered keys, shared pages added up."""

import numpy as np
import pytest
import torch
import torch_formula
from torch_formula import as_type, gradients, numpy_of, tensors, weights_for

from headrace import ops
from headrace.check.attention_batch import attention_batch
from headrace.check.attention_cases import PAGED as CASES
from headrace.check.compare import assert_within_budget
from headrace.errors import ArgumentError
from headrace.ops.torch_latent import LATENT
from headrace.ops.torch_paged import PAGED

OPTIONS = {
    "causal": True,
    "align": "bottom_right",
    "window_left": None,
    "window_right": None,
    "softcap": None,
    "scale": 0.25,
    "precision": "auto",
    "deterministic": False,
}
CHOICE = {"out_dtype": None, "kernel": None, "require": "", "cascade": "auto"}
EXACT = {case.name: case for case in CASES if not case.kv_format}
SOME = [
    "one",
    "decode_block_edges",
    "decode_no_sharing",
    "append",
    "mixture",
    "fewer_keys_than_queries",
    "both_sides",
    "tree_of_drafts",
    "prefill_everything",
    "decode_alibi",
]


def by_formula(query, key_pages, value_pages, page_table, sequence_lens, **rest):
    """The formula over keys taken from the pages one by one: what torch differentiates."""
    rest = {"causal": True} | rest
    keys, values = (taken(pages, page_table, sequence_lens) for pages in (key_pages, value_pages))
    starts = torch.tensor([0, *np.cumsum(sequence_lens.numpy())], dtype=torch.int32)
    return torch_formula.attention(query, keys, values, key_starts=starts, **rest)


def latent_by_formula(query, latent_pages, page_table, sequence_lens, *, value_dim, **rest):
    return by_formula(
        query, latent_pages[:, :, None], latent_pages[:, :, None, :value_dim], page_table, sequence_lens, **rest
    )


def taken(pages, page_table, sequence_lens):
    rows = [
        pages[int(page_table[r, j // pages.shape[1]]), j % pages.shape[1]]
        for r, count in enumerate(sequence_lens.tolist())
        for j in range(count)
    ]
    return torch.stack(rows) if rows else pages.new_zeros(0, *pages.shape[2:])


def assert_gradients(function, formula, arrays, names, *, value_dim, dtype="float32"):
    weights = weights_for((*arrays["query"].shape[:-1], value_dim))
    _, got = gradients(function, arrays, names, weights)
    _, exact = gradients(formula, as_type(arrays, torch.float64, names), names, weights)
    _, plain = gradients(formula, arrays, names, weights)
    for name in names:
        assert got[name].shape == arrays[name].shape and got[name].dtype == arrays[name].dtype
        assert_within_budget(numpy_of(got[name]), numpy_of(exact[name]), numpy_of(plain[name]), dtype)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_those_of_the_formula(name):
    batch = attention_batch(EXACT[name])
    arrays = tensors({{"key": "key_pages", "value": "value_pages"}.get(n, n): array for n, array in batch.items()})
    names = [n for n in ("query", "key_pages", "value_pages", "sinks") if n in arrays]
    dim = EXACT[name].value_dim or EXACT[name].head_dim
    assert_gradients(ops.paged_attention, by_formula, arrays, names, value_dim=dim)


def cache(num_pages=6, page_size=4, kv_heads=2, dim=6, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(num_pages, page_size, kv_heads, dim, dtype=dtype, generator=random)


def shared(dtype=torch.float32):
    """Three requests that begin with the same two pages."""
    return {
        "query": torch.randn(6, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(9)),
        "key_pages": cache(dtype=dtype, seed=1),
        "value_pages": cache(dtype=dtype, seed=2),
        "page_table": torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 10**9]], dtype=torch.int32),
        "sequence_lens": torch.tensor([11, 9, 7], dtype=torch.int32),
        "query_starts": torch.tensor([0, 1, 4, 6], dtype=torch.int32),
    }


@pytest.mark.parametrize("cascade", [True, False])
def test_requests_that_share_pages_add_up(cascade):
    arrays = shared()

    def function(**arrays):
        return ops.paged_attention(**arrays, cascade=cascade)

    assert_gradients(function, by_formula, arrays, ["query", "key_pages", "value_pages"], value_dim=6)
    _, found = gradients(function, arrays, ["key_pages"], weights_for((6, 4, 6)))
    assert found["key_pages"][:3].any() and not found["key_pages"][4:].any()


def test_gradients_are_those_of_small_changes():
    arrays = shared(torch.float64)
    names = ("query", "key_pages", "value_pages")
    leaves = [arrays.pop(name).requires_grad_() for name in names]

    def function(*leaves):
        result = ops.paged_attention(**dict(zip(names, leaves, strict=True)), **arrays, softcap=4.0)
        return result.out, result.lse

    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_are_the_same_bits_every_time():
    runs = [gradients(ops.paged_attention, shared(), ["key_pages"], weights_for((6, 4, 6)))[1] for _ in range(3)]
    assert all(torch.equal(run["key_pages"], runs[0]["key_pages"]) for run in runs)


def test_queries_have_gradients_over_a_quantized_cache():
    name = next(case.name for case in CASES if case.name == "int8_page_scales")
    [case] = [case for case in CASES if case.name == name]
    arrays = tensors(
        {{"key": "key_pages", "value": "value_pages"}.get(n, n): v for n, v in attention_batch(case).items()}
    )
    known = dict(arrays)
    for kind in ("key", "value"):
        pages, scales = known[f"{kind}_pages"], known.pop(f"{kind}_scales")
        known[f"{kind}_pages"] = pages.float() * scales[..., None]
    weights = weights_for((*arrays["query"].shape[:-1], case.head_dim))
    _, got = gradients(ops.paged_attention, arrays, ["query"], weights)
    _, exact = gradients(
        by_formula, as_type(known, torch.float64, ("query", "key_pages", "value_pages")), ["query"], weights
    )
    _, plain = gradients(by_formula, known, ["query"], weights)
    assert_within_budget(numpy_of(got["query"]), numpy_of(exact["query"]), numpy_of(plain["query"]), "float32")


def test_no_gradient_goes_through_chosen_keys():
    arrays = shared()
    arrays["query"].requires_grad_()
    with pytest.raises(NotImplementedError, match="indices: "):
        ops.paged_attention(**arrays, indices=torch.zeros(6, 2, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="sequence_lens: expected"):
        ops.paged_attention(**{**arrays, "sequence_lens": torch.tensor([11, 9, 99], dtype=torch.int32)})


# Latent attention


def latent(dtype=torch.float32):
    arrays = shared(dtype)
    random = torch.Generator().manual_seed(3)
    arrays |= {
        "query": torch.randn(6, 4, 10, dtype=dtype, generator=random),
        "latent_pages": cache(dim=10, dtype=dtype)[:, :, 0],
    }
    return {name: array for name, array in arrays.items() if name not in ("key_pages", "value_pages")}


@pytest.mark.parametrize(
    "options", [{}, {"window": (5, None), "softcap": 3.0}, {"sinks": torch.tensor([1.0, 0, -1, 2])}]
)
def test_latent_gradients_are_those_of_the_formula(options):
    arrays = latent() | options
    names = [name for name in ("query", "latent_pages", "sinks") if name in arrays]
    given = {"value_dim": 7, "scale": 0.3}
    assert_gradients(
        lambda **arrays: ops.mla_attention(**arrays, **given),
        lambda **arrays: latent_by_formula(**arrays, **given),
        arrays,
        names,
        value_dim=7,
    )


def test_latent_gradients_are_those_of_small_changes():
    arrays = latent(torch.float64)
    query, pages = arrays.pop("query"), arrays.pop("latent_pages").requires_grad_()
    nope, rope = query[..., :7].clone().requires_grad_(), query[..., 7:].clone().requires_grad_()

    def function(nope, rope, pages):
        result = ops.mla_attention(nope, pages, query_rope=rope, value_dim=7, scale=0.4, **arrays)
        return result.out, result.lse

    assert torch.autograd.gradcheck(function, (nope, rope, pages))


# torch's own checks


def given_to(signature, arrays):
    tensors_ = [arrays.get(name) for name in signature.tensors]
    return [
        array.requires_grad_()
        if name in signature.differentiable and array is not None and array.is_floating_point()
        else array
        for name, array in zip(signature.tensors, tensors_, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_passes_torchs_checks(dtype):
    given = given_to(PAGED, shared(dtype))
    torch.library.opcheck(torch.ops.headrace.paged_attention.default, given, OPTIONS | CHOICE)


def test_the_latent_operator_passes_torchs_checks():
    given = given_to(LATENT, latent())
    torch.library.opcheck(torch.ops.headrace.mla_attention.default, given, OPTIONS | CHOICE | {"value_dim": 7})


@pytest.mark.parametrize("name", ["paged_attention", "mla_attention"])
def test_the_backward_operators_pass_torchs_checks(name):
    signature, arrays = (PAGED, shared()) if name == "paged_attention" else (LATENT, latent())
    options = OPTIONS if name == "paged_attention" else OPTIONS | {"value_dim": 7}
    given = [arrays.get(each) for each in signature.tensors]
    out, lse = getattr(torch.ops.headrace, name)(*given, **options, **CHOICE)
    required = len(signature.required)
    given = [torch.ones_like(out), out, lse, *given[:required], torch.ones_like(lse), *given[required:]]
    torch.library.opcheck(getattr(torch.ops.headrace, f"{name}_backward").default, given, options)
