"""scaled_dot_product_attention by headrace: torch's own function in float64 is the oracle, argument by argument."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from plain_attention import hold, random, shuffled
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from headrace.compat.sdpa import scaled_dot_product_attention
from headrace.errors import ArgumentError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_torch(query, key, value, *, dtype, order=None, **options):
    """torch's plain composition in dtype, products summed in an order of that seed."""
    places = shuffled(query.shape[-1], order)
    query, key = query[..., places], key[..., places]
    options.setdefault("scale", None)
    mask = options.get("attn_mask")
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        options["attn_mask"] = mask.to(dtype)
    with sdpa_kernel(SDPBackend.MATH):
        return [F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), **options)]


def assert_as_torch(query, key, value, **options):
    got = scaled_dot_product_attention(query, key, value, **options)
    assert got.dtype == query.dtype
    hold([got], functools.partial(by_torch, query, key, value, **options), query.dtype)


def arrays(dtype=torch.float32, heads=6, kv_heads=6, queries=33, keys=33, dim=24, value_dim=24, batch=2):
    return (
        random(batch, heads, queries, dim, dtype=dtype, seed=1),
        random(batch, kv_heads, keys, dim, dtype=dtype, seed=2),
        random(batch, kv_heads, keys, value_dim, dtype=dtype, seed=3),
    )


def test_the_signature_is_torchs():
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    empty = inspect.Parameter.empty
    found = inspect.signature(scaled_dot_product_attention).parameters
    assert list(found) == names
    assert [found[name].default for name in names] == [empty, empty, empty, None, 0.0, False, None, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries,keys", [(1, 1), (1, 70), (33, 33), (40, 17), (17, 40), (130, 130)])
def test_lengths_and_top_left_causality(dtype, is_causal, queries, keys):
    assert_as_torch(*arrays(dtype, queries=queries, keys=keys), is_causal=is_causal)


def test_float64_is_far_more_exact_than_float32():
    given = [array.double() for array in arrays()]
    exact = by_torch(*given, dtype=torch.float64, is_causal=True)[0]
    single = by_torch(*given, dtype=torch.float32, is_causal=True)[0]
    mine = scaled_dot_product_attention(*given, is_causal=True)
    assert mine.dtype == torch.float64
    assert (mine - exact).abs().max() < (single - exact).abs().max() / 2**20


@pytest.mark.parametrize("scale", [None, 0.05, 1.0, 3, -0.5, 0.0])
def test_any_scale(scale):
    assert_as_torch(*arrays(), scale=scale)


def test_another_value_dim():
    assert_as_torch(*arrays(value_dim=40, keys=50))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 2, 3)])
def test_two_three_and_more_dimensions(shape):
    query, key, value = (random(*shape, tokens, 16, seed=tokens) for tokens in (9, 12, 12))
    got = scaled_dot_product_attention(query, key, value)
    assert got.shape == (*shape, 9, 16)
    assert_as_torch(query, key, value)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 6, 9, 16), (1, 6, 12, 16), (2, 1, 12, 16)],
        [(2, 6, 9, 16), (2, 1, 12, 16), (2, 1, 12, 16)],
        [(1, 1, 9, 16), (2, 6, 12, 16), (2, 6, 12, 16)],
        [(3, 1, 6, 9, 16), (1, 2, 6, 12, 16), (6, 12, 16)],
        [(9, 16), (2, 3, 12, 16), (2, 3, 12, 16)],
    ],
)
def test_leading_dimensions_broadcast(shapes):
    assert_as_torch(*(random(*shape, seed=i) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(kv_heads, is_causal):
    assert_as_torch(*arrays(kv_heads=kv_heads), is_causal=is_causal, enable_gqa=True)


def test_grouped_heads_of_three_dimensions():
    query, key, value = (array[0] for array in arrays(kv_heads=2))
    assert_as_torch(query, key, value, enable_gqa=True)


def test_keys_and_values_may_be_grouped_differently():
    query, key, _ = arrays(kv_heads=2)
    value = arrays(kv_heads=3)[2]
    assert_as_torch(query, key, value, enable_gqa=True)


def test_heads_that_do_not_fit_are_refused_without_grouping():
    with pytest.raises(RuntimeError, match="broadcast"):
        scaled_dot_product_attention(*arrays(kv_heads=2))


# Masks


def seen(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


MASKS = [(33,), (33, 33), (1, 33), (33, 1), (6, 33, 33), (2, 1, 33, 33), (2, 6, 33, 33), (1, 6, 1, 33), (2, 1, 1, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASKS)
def test_bool_masks_broadcast(dtype, shape):
    assert_as_torch(*arrays(dtype), attn_mask=seen(*shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASKS)
def test_float_masks_broadcast(dtype, shape):
    assert_as_torch(*arrays(dtype), attn_mask=2 * random(*shape, dtype=dtype))


def test_float_masks_of_float64():
    given = [array.double() for array in arrays()]
    assert_as_torch(*given, attn_mask=random(33, 33, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(33, 33), (1, 1, 33, 33), (2, 1, 1, 33, 33), (1, 2, 6, 1, 33)])
def test_masks_of_five_dimensions(shape):
    query, key, value = (torch.stack([array, -array]) for array in arrays())
    assert_as_torch(query, key, value, attn_mask=seen(*shape))


def test_masks_of_three_dimensions():
    query, key, value = (array[0] for array in arrays())
    for shape in [(33, 33), (6, 33, 33), (1, 1, 33)]:
        assert_as_torch(query, key, value, attn_mask=seen(*shape))


def test_an_expanded_mask_is_read_where_it_lies():
    assert_as_torch(*arrays(), attn_mask=seen(2, 1, 1, 33).expand(2, 6, 33, 33))


@pytest.mark.parametrize("floats", [False, True])
def test_rows_that_see_nothing_are_zero(floats):
    mask = seen(33, 33)
    mask[4] = False
    given = torch.where(mask, 0.0, -torch.inf) if floats else mask
    query, key, value = arrays()
    assert (scaled_dot_product_attention(query, key, value, attn_mask=given)[:, :, 4] == 0).all()
    assert_as_torch(query, key, value, attn_mask=given)


@pytest.mark.parametrize("queries,keys", [(33, 33), (17, 40), (40, 17)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_biases(bias, queries, keys):
    given = arrays(queries=queries, keys=keys)
    got = scaled_dot_product_attention(*given, attn_mask=bias(queries, keys))
    lower = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if bias is causal_lower_right else 0)
    assert torch.equal(got, scaled_dot_product_attention(*given, attn_mask=lower))
    hold([got], functools.partial(by_torch, *given, attn_mask=lower), torch.float32)


def test_a_mask_beside_is_causal_is_refused():
    mask = torch.ones(33, 33, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="attn_mask, is_causal"):
        scaled_dot_product_attention(*arrays(), attn_mask=mask, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask, is_causal"):
        scaled_dot_product_attention(*arrays(), attn_mask=causal_upper_left(33, 33), is_causal=True)


def test_masks_of_integers_are_refused():
    with pytest.raises(ArgumentError, match="mask: expected bool"):
        scaled_dot_product_attention(*arrays(), attn_mask=torch.ones(33, 33, dtype=torch.int64))


# What lies how in memory


def test_views_are_read_where_they_lie():
    tokens_first = [random(2, 33, 6, 24, seed=i) for i in range(3)]
    query, key, value = (array.transpose(1, 2) for array in tokens_first)
    copies = [array.contiguous() for array in (query, key, value)]
    assert torch.equal(scaled_dot_product_attention(query, key, value), scaled_dot_product_attention(*copies))
    strided = [array.transpose(-1, -2).contiguous().transpose(-1, -2) for array in copies]
    assert torch.equal(scaled_dot_product_attention(*strided), scaled_dot_product_attention(*copies))


@pytest.mark.parametrize(
    "batch,heads,queries,keys", [(0, 6, 5, 7), (2, 6, 0, 7), (2, 6, 5, 0), (2, 0, 5, 7), (0, 0, 0, 0)]
)
def test_nothing_at_all(batch, heads, queries, keys):
    given = arrays(heads=heads, kv_heads=heads, queries=queries, keys=keys, batch=batch, value_dim=8)
    got, expected = scaled_dot_product_attention(*given), by_torch(*given, dtype=torch.float32)[0]
    assert got.shape == expected.shape and torch.equal(got, expected)


# What is not done


def test_dropout_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"dropout_p: .* got 0.1; pass 0.0, or call torch.nn.functional"):
        scaled_dot_product_attention(*arrays(), dropout_p=0.1)


def test_a_mask_that_wants_a_gradient_is_refused_by_name():
    mask = torch.zeros(33, 33, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"attn_mask: .*attn_mask.detach"):
        scaled_dot_product_attention(*arrays(), attn_mask=mask)
    with torch.no_grad():
        scaled_dot_product_attention(*arrays(), attn_mask=mask)
