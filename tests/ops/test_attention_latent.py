"""Latent attention: every kernel inside the budget, any format, query in one piece or two, and both forms the same."""

import ml_dtypes
import numpy as np
import pytest

from headrace.check.attention_batch import latent_batch, reference, straightforward
from headrace.check.attention_cases import LATENT as CASES
from headrace.check.attention_expected import assert_close, prepared
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.errors import ArgumentError
from headrace.kernels.arrays import Fixed
from headrace.kernels.cpu.arrays import as_tensor
from headrace.machine import this_machine
from headrace.ops import attention_latent as op
from headrace.ops import choices, latent_projection, reset_choices

KERNELS = [kernel.name for kernel in op.kernels() if "cpu" in kernel.devices]
TYPES = [("float32", "float32"), ("float32", "float16"), ("bfloat16", "bfloat16"), ("float64", "float64")]
SMALL = CASES[1]


def computed(case, batch, **options):
    out = poisoned(case.out_shape, options.pop("out_dtype", str(batch["query"].dtype)))
    return op.mla_attention(**batch, out=out, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("query_dtype,dtype", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_within_budget(kernel, case, query_dtype, dtype):
    if case.kv_format and query_dtype != "float32":
        pytest.skip("the case has a type of its own")
    batch, as_paged = latent_batch(case, dtype, query_dtype)
    [found] = [each for each in op.kernels() if each.name == kernel]
    asked = op.prepared(**batch).request()
    if reasons := found.why_not(asked):
        pytest.skip("; ".join(map(str, reasons)))
    exact = reference(case, as_paged)
    plain = straightforward(case, as_paged, exact, found.planned(asked, this_machine()).arithmetic)
    out_dtype = "float64" if query_dtype == "float64" else "float32"
    assert_close(computed(case, batch, kernel=kernel, out_dtype=out_dtype), exact, plain)


def test_the_reference_is_that_of_paged_attention():
    batch, as_paged = latent_batch(CASES[3])
    told, expected = op.reference(**batch), reference(CASES[3], as_paged)
    assert np.array_equal(told.out, expected.out) and np.array_equal(told.lse, expected.lse)


def test_the_query_may_come_in_two_pieces():
    batch, _ = latent_batch(SMALL)
    whole = computed(SMALL, batch)
    pieces = batch | {"query": batch["query"][..., :32], "query_rope": batch["query"][..., 32:]}
    assert np.array_equal(computed(SMALL, pieces).out, whole.out)


def test_torch_arrays_and_memory_of_the_runtime_give_the_same_bits():
    torch = pytest.importorskip("torch")
    batch, _ = latent_batch(SMALL, "bfloat16", "bfloat16")
    whole = op.mla_attention(**batch)
    as_torch = {
        name: torch.from_numpy(array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
        for name, array in batch.items()
        if isinstance(array, np.ndarray)
    }
    query, pages = (as_torch.pop(name).view(torch.bfloat16) for name in ("query", "latent_pages"))
    rest = {name: value for name, value in batch.items() if name not in as_torch} | as_torch
    rest |= {"query": query[..., :32], "query_rope": query[..., 32:], "latent_pages": pages}
    told = op.mla_attention(**rest)
    assert told.out.dtype == torch.bfloat16
    assert np.array_equal(told.out.view(torch.uint16).numpy(), whole.out.view(np.uint16))
    fixed = batch | {"latent_pages": Fixed(as_tensor(batch["latent_pages"], "latent_pages"))}
    assert np.array_equal(op.mla_attention(**fixed).out, whole.out)


def test_it_is_counted_as_what_it_is():
    reset_choices()
    op.mla_attention(**latent_batch(SMALL)[0])
    assert [name for name, _ in choices()] == ["mla_attention"]


# The two forms


def layer(dtype, seed=0, tokens=6, keys=40, num_heads=3):
    """What both forms start from: a prompt of `keys` tokens of which the last `tokens` are asked for."""
    random = np.random.default_rng(seed)
    nope, rope, value_dim, latent = 24, 8, 20, 32

    def array(*shape):
        return rounded(random.standard_normal(shape), dtype)

    query, latents, key_rope = array(tokens, num_heads, nope + rope), array(keys, latent), array(keys, rope)
    key_up, value_up = array(num_heads, nope, latent) / 6, array(num_heads, value_dim, latent) / 6
    return {"query": query, "latent": latents, "key_rope": key_rope, "key_up": key_up, "value_up": value_up}


def unabsorbed_exact(given, dtype=np.float64, order=slice(None)):
    """The formula of the un-absorbed form, head by head; `order`: in which the latent is summed."""
    query, latent, rope, up, down = (given[name].astype(dtype) for name in given)
    latent, up, down = latent[:, order], up[..., order], down[..., order]
    tokens, keys, scale = len(query), len(latent), dtype(query.shape[2] ** -0.5)
    seen = np.arange(keys) <= np.arange(tokens)[:, None] + keys - tokens
    outs = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ np.concatenate([latent @ up[head].T, rope], axis=1).T * scale
        weights = np.exp(np.where(seen, scores - scores.max(axis=1, keepdims=True), -np.inf))
        outs.append(weights / weights.sum(axis=1, keepdims=True) @ (latent @ down[head].T))
    return np.stack(outs, axis=1)


def absorbed(given, page_size=8):
    """The absorbed form through pages."""
    tokens, num_heads, dim = given["query"].shape
    nope = given["key_up"].shape[1]
    keys, latent = given["latent"].shape
    pages = np.concatenate([given["latent"], given["key_rope"]], axis=1).reshape(keys // page_size, page_size, -1)
    query = latent_projection.absorb_query(given["query"][..., :nope], given["key_up"])
    mixed = op.mla_attention(
        query,
        pages,
        np.arange(keys // page_size, dtype=np.int32)[None],
        np.array([keys], np.int32),
        query_starts=np.array([0, tokens], np.int32),
        query_rope=given["query"][..., nope:],
        value_dim=latent,
        scale=dim**-0.5,
    )
    assert mixed.out.shape == (tokens, num_heads, latent)
    return latent_projection.expand_value(mixed.out, given["value_up"])


def unabsorbed(given):
    tokens, keys = len(given["query"]), len(given["latent"])
    starts = {"query_starts": np.array([0, tokens], np.int32), "key_starts": np.array([0, keys], np.int32)}
    return latent_projection.mla_prefill(**given, **starts).out


@pytest.mark.parametrize("form", [absorbed, unabsorbed])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_forms_are_within_the_budget_of_the_formula(form, dtype):
    given = layer(dtype)
    exact = unabsorbed_exact(given, np.longdouble).astype(np.float64)
    random = np.random.default_rng(1)
    plain, low = exact, getattr(np, dtype)
    for _ in range(5):
        other = unabsorbed_exact(given, low, random.permutation(32)).astype(np.float64)
        plain = np.where(np.abs(other - exact) > np.abs(plain - exact), other, plain)
    assert_within_budget(form(given), exact, plain, dtype)


def test_torch_layers_give_torch_outputs():
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(array) for name, array in layer("float32").items()}
    starts = {"query_starts": np.array([0, 6], np.int32), "key_starts": np.array([0, 40], np.int32)}
    out = latent_projection.mla_prefill(**given, **starts).out
    exact = unabsorbed_exact(layer("float32"))
    assert_within_budget(out, exact, unabsorbed_exact(layer("float32"), np.float32), "float32")
    query = latent_projection.absorb_query(given["query"][..., :24].bfloat16(), given["key_up"])
    assert query.dtype == torch.bfloat16 and query.shape == (6, 3, 32)


@pytest.mark.parametrize(
    "changes,text",
    [
        (
            {"latent_pages": np.zeros((4, 40), np.float32)},
            r"latent_pages: expected \[pages, page_size, latent \+ rope\]",
        ),
        ({"latent_pages": None}, "latent_pages: expected an array"),
        ({"query": np.zeros((4, 5, 39), np.float32)}, r"query: expected \[tokens, heads, 40\] as of latent_pages"),
        ({"query": np.zeros((4, 40), np.float32)}, r"query: expected \[tokens, heads, latent \+ rope\]"),
        ({"query_rope": np.zeros((4, 4, 8), np.float32)}, r"query_rope: expected \[4, 5, rope\]"),
        ({"value_dim": 41}, "value_dim: expected a whole number from 1 to 40"),
        ({"value_dim": 0}, "value_dim: expected a whole number from 1 to 40"),
        ({"value_dim": True}, "value_dim: expected a whole number"),
        ({"scale": None}, "scale: expected a number, got None"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"latent_scales": np.ones((3, 7), np.float32)}, "latent_scales: expected"),
        ({"page_table": np.zeros((2, 6), np.int64)}, "page_table: expected int32"),
    ],
)
def test_bad_arguments_are_named(changes, text):
    with pytest.raises(ArgumentError, match=text):
        op.mla_attention(**(latent_batch(SMALL)[0] | changes))


@pytest.mark.parametrize(
    "function,arrays,text",
    [
        (latent_projection.absorb_query, [(2, 3, 4), (3, 5, 6)], r"key_up: expected \[3, 4, latent\]"),
        (latent_projection.absorb_query, [(2, 3), (3, 5, 6)], r"query_nope: expected \[tokens, heads, nope\]"),
        (latent_projection.expand_value, [(2, 3, 4), (3, 5, 6)], r"value_up: expected \[3, value_dim, 4\]"),
    ],
)
def test_projections_that_do_not_fit_are_named(function, arrays, text):
    with pytest.raises(ArgumentError, match=text):
        function(*(np.zeros(shape, np.float32) for shape in arrays))


def test_int4_latents_need_an_even_value_dim():
    batch, _ = latent_batch(CASES[-1])
    with pytest.raises(ArgumentError, match="value_dim: expected an even number"):
        op.mla_attention(**(batch | {"value_dim": 33}))


def test_a_cached_row_is_counted_once():
    batch, as_paged = latent_batch(SMALL)
    latents, apart = op.prepared(**batch).request().traffic, prepared(as_paged).request().traffic
    assert apart.num_bytes - latents.num_bytes == sum(SMALL.key_lens) * SMALL.value_dim * 4
    assert apart.flops == latents.flops
