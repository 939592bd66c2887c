"""Attention over pages of torch tensors: gradients of the formula over gathered keys, shared pages added up."""

import numpy as np
import pytest
import torch
import torch_formula
from torch_formula import as_type, gradients, numpy_of, tensors, weights_for

from headrace import ops
from headrace.check.attention_batch import attention_batch
from headrace.check.attention_cases import PAGED as CASES
from headrace.check.attention_gradients import reference, straightforward
from headrace.check.compare import assert_within_budget, rounded
from headrace.errors import ArgumentError
from headrace.ops import attention_dense
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
CHOICE = {"out_dtype": None, "kernel_name": None, "require": "", "cascade": "auto"}
EXACT = {case.name: case for case in CASES if not case.kv_format}
SOME = [
    "one",
    "decode_block_edges",
    "decode_no_sharing",
    "append",
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
    return torch_formula.attention(query, keys, values, key_starts=starts_of(sequence_lens), **rest)


def latent_by_formula(query, latent_pages, page_table, sequence_lens, *, value_dim, **rest):
    return by_formula(
        query, latent_pages[:, :, None], latent_pages[:, :, None, :value_dim], page_table, sequence_lens, **rest
    )


def taken(pages, page_table, sequence_lens):
    places = places_of(pages, page_table, sequence_lens)
    return pages[places] if len(places[0]) else pages.new_zeros(0, *pages.shape[2:])


def places_of(pages, page_table, sequence_lens):
    """The page and the place within it of every key of every request."""
    keys = [torch.arange(count) for count in sequence_lens.tolist()]
    page = [page_table[r, each // pages.shape[1]].long() for r, each in enumerate(keys)]
    return torch.cat(page), torch.cat(keys) % pages.shape[1]


def assert_gradients(function, formula, arrays, names, *, value_dim):
    """Every gradient is within the budget that a plain loop over the gathered keys sets."""
    weights = tuple(array.float() for array in weights_for((*arrays["query"].shape[:-1], value_dim)))
    _, got = gradients(function, arrays, names, weights)
    _, exact = gradients(formula, as_type(arrays, torch.float64, names), names, weights)
    plain = plain_gradients(arrays, weights, value_dim)
    for name in names:
        assert got[name].shape == arrays[name].shape and got[name].dtype == arrays[name].dtype
        assert_within_budget(numpy_of(got[name]), numpy_of(exact[name]), rounded(plain[name], "float32"), "float32")


def plain_gradients(arrays, weights, value_dim):
    """Of all arrays by name, by a plain loop over keys and values taken from their pages."""
    places = arrays["page_table"], arrays["sequence_lens"]
    pages = {"key": arrays.get("key_pages"), "value": arrays.get("value_pages")}
    if latents := arrays.get("latent_pages") is not None:
        pages = {"key": arrays["latent_pages"][:, :, None], "value": arrays["latent_pages"][:, :, None, :value_dim]}
    batch = {name: array for name, array in arrays.items() if not (name.endswith("_pages") or name in NOT_RAGGED)}
    batch |= {name: taken(each, *places) for name, each in pages.items()} | {"key_starts": starts_of(places[1])}
    batch = {"causal": True} | {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    found = attention_dense.reference(**batch)
    results = {"out": found.out, "lse": found.lse, "d_out": weights[0].numpy(), "d_lse": weights[1].numpy()}
    batch |= {name: array.astype(np.float32) for name, array in results.items()}
    plain = straightforward(batch, reference(batch))
    rows = {name: scattered(getattr(plain, name), each, *places) for name, each in pages.items()}
    if latents:
        rows["key"][..., :value_dim] += rows["value"]
        return {"query": plain.query, "latent_pages": rows["key"][:, :, 0], "sinks": plain.sinks}
    return {"query": plain.query, "key_pages": rows["key"], "value_pages": rows["value"], "sinks": plain.sinks}


NOT_RAGGED = ("page_table", "sequence_lens", "value_dim", "cascade")


def starts_of(lens):
    return torch.tensor([0, *np.cumsum(lens.numpy())], dtype=torch.int32)


def scattered(rows, pages, page_table, sequence_lens):
    """Gradients of rows added up where they were taken from, in float32."""
    found = np.zeros(pages.shape, np.float32)
    np.add.at(found, tuple(each.numpy() for each in places_of(pages, page_table, sequence_lens)), rows)
    return found


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

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


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
    arrays = latent() | {"scale": 0.3} | options
    names = [name for name in ("query", "latent_pages", "sinks") if name in arrays]
    given = {"value_dim": 7}
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

    assert torch.autograd.gradcheck(function, (nope, rope, pages), fast_mode=True)


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
