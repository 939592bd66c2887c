"""Triton's attention over dense and ragged keys: within its budget, from its own keys alone, every option."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from headrace.check.attention_batch import NARROW, attention_batch, reference, straightforward
from headrace.check.attention_cases import DENSE, RAGGED, dense, heads, ragged
from headrace.check.attention_expected import assert_close, assert_kernel_holds, computed_on
from headrace.check.guards import Guarded, as_numpy
from headrace.errors import ArgumentError
from headrace.kernels.gpu_products import product_types
from headrace.ops.attention_formula import capped, per_head
from headrace.ops.attention_options import AttentionResult

KERNEL = "triton_attention"
CASES = {case.name: case for case in RAGGED + DENSE}
# Between them every option, both layouts, packed and single heads: what else there is takes longer.
QUICK = (
    ("dense_one", "float32"),
    ("dense_scale", "float32"),
    ("dense_key_lens_causal", "float16"),
    ("dense_top_left_tall", "float32"),
    ("dense_heads_first_decode", "float16"),
    ("dense_mask_tree", "float16"),
    ("dense_sinks", "float32"),
    ("dense_softcap", "float32"),
    ("dense_alibi_top_left", "float16"),
    ("dense_int4", "float32"),
    ("dense_float8", "float16"),
    ("dense_no_keys", "float32"),
    ("dense_no_queries", "float16"),
    ("ragged_one", "float16"),
    ("ragged_top_left", "float16"),
    ("ragged_float_mask_per_head", "float32"),
    ("ragged_no_requests", "float32"),
)
REST = [name for name in CASES if name not in dict(QUICK)]
SLOW = [(name, ("float32", "float16")[number % 2]) for number, name in enumerate(REST)]
BFLOAT16 = ("dense_mask_padded_decode", "dense_top_left")

OWN_TILES = (
    # Of the interpreter's tiles, 64 rows and 32 keys: one off each, a whole one among parts, a head of two parts.
    dense("tiles_seen_whole", 1, 65, 97, window=(70, None), **heads(2, 1, 48, 20)),
    ragged("tiles_of_three", (63, 65, 1), (63, 100, 33), causal=False, window=(31, 32), **heads(2, 1, 17)),
)


@pytest.mark.costly
@pytest.mark.parametrize("name,dtype", QUICK)
def test_within_budget(name, dtype):
    assert_kernel_holds(CASES[name], KERNEL, dtype, dtype, out_dtype=dtype, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name,dtype", SLOW)
def test_every_case_is_within_budget(name, dtype):
    assert_kernel_holds(CASES[name], KERNEL, dtype, dtype, out_dtype=dtype, device="cpu")


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_within_budget(name):
    assert_kernel_holds(CASES[name], KERNEL, "bfloat16", "bfloat16", out_dtype="bfloat16", device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_within_budget_on_the_gpu(name, dtype):
    assert_kernel_holds(CASES[name], KERNEL, dtype, dtype, out_dtype=dtype, device="cuda")


@pytest.mark.parametrize("case", OWN_TILES, ids=lambda case: case.name)
def test_edges_of_tiles_are_within_budget(case, device):
    assert_kernel_holds(case, KERNEL, "float16", "float16", device=device)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("query_dtype,dtype", [("float32", "float32"), ("float16", "float16"), ("float32", "float16")])
def test_precision_is_what_was_asked_for(query_dtype, dtype, precision, device):
    assert_kernel_holds(CASES["dense_scale"], KERNEL, dtype, query_dtype, precision=precision, device=device)


def test_products_are_never_narrower_than_asked():
    assert product_types("float32", "float32", "auto") == ("float32", "float32")
    assert product_types("float32", "bfloat16", "auto") == ("float32", "float32")
    assert product_types("bfloat16", "float16", "auto") == ("float32", "float32")
    assert product_types("bfloat16", "bfloat16", "auto") == ("bfloat16", "bfloat16")
    assert product_types("float16", "int8", "auto") == ("float16", "float16")
    assert product_types("float16", "float16", "exact") == ("float16", "float32")
    assert product_types("float16", "float16", "fast") == ("float16", "float16")
    assert product_types("float32", "float32", "fast") == ("bfloat16", "bfloat16")


# What a row's bits depend on


def test_bits_depend_on_neither_neighbours_nor_chunks(device):
    three, one = (ragged("of_bits", (lens,), (lens,), **heads(2, 1, 16)) for lens in (117, 5))
    case = ragged("three", (40, 7, 70), (90, 30, 70), **heads(2, 1, 16))
    batch = attention_batch(case, "float16", "float16")
    together = computed_on(device, three, batch, kernel=KERNEL, deterministic=True)
    starts, keys = batch["query_starts"], batch["key_starts"]
    for r in range(3):
        rows = slice(starts[r + 1] - 5, starts[r + 1])  # the last five alone
        own = {name: batch[name][keys[r] : keys[r + 1]] for name in ("key", "value")}
        own |= {"query": batch["query"][rows], "query_starts": np.array([0, 5], np.int32)}
        own |= {"key_starts": np.array([0, keys[r + 1] - keys[r]], np.int32)}
        alone = computed_on(device, one, batch | own, kernel=KERNEL, deterministic=True)
        assert np.array_equal(alone.out, together.out[rows]) and np.array_equal(alone.lse, together.lse[rows])


def test_the_same_call_gives_the_same_bits(device):
    batch = attention_batch(CASES["ragged_float_mask_per_head"])
    first, second = (computed_on(device, CASES["ragged_float_mask_per_head"], batch, kernel=KERNEL) for _ in range(2))
    assert np.array_equal(first.out, second.out) and np.array_equal(first.lse, second.lse)


# Memory


def test_keys_of_nobody_are_not_read(device):
    case = ragged("gaps", (9, 20), (80, 60), causal=False, **heads(2, 1, 16))
    batch = attention_batch(case)
    kept = {"key_starts": np.array([3, 50], np.int32), "key_lens": np.array([40, 61], np.int32)}
    for name in ("key", "value"):
        batch[name] = batch[name].copy()
        batch[name][:3] = batch[name][43:50] = batch[name][111:] = np.nan
    got = computed_on(device, case, batch | kept, kernel=KERNEL)
    exact = reference(case, batch | kept)
    assert_close(got, exact, straightforward(case, batch | kept, exact))


def test_tiles_hidden_by_a_mask_are_not_read(device):
    case = dense("hidden", 1, 70, 320, causal=False, mask="bool", mask_heads=2, **heads(2, 1, 16))
    batch = attention_batch(case)
    batch["mask"] = np.zeros((1, 2, 70, 320), bool)
    batch["mask"][..., :40] = batch["mask"][..., 300:] = True
    batch["mask"][..., 20, 300:] = False
    clean = computed_on(device, case, batch, kernel=KERNEL)
    for name in ("key", "value"):
        batch[name] = batch[name].copy()
        batch[name][:, 128:256] = np.nan  # whole tiles on any device
    assert np.array_equal(computed_on(device, case, batch, kernel=KERNEL).out, clean.out)


def amid_nan(array):
    """The same numbers, NaN around each of its rows."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 2:
        return array
    whole = np.full([n + 3 for n in array.shape], np.nan, array.dtype)
    inner = whole[tuple(slice(1, n + 1) for n in array.shape)]
    inner[...] = array
    return inner


@pytest.mark.parametrize("name", ["ragged_float_mask_per_head", "dense_top_left"])
def test_arrays_may_have_any_strides(name, device):
    batch = attention_batch(CASES[name])
    spread = {argument: amid_nan(array) for argument, array in batch.items()}
    got = computed_on(device, CASES[name], spread, kernel=KERNEL)
    plain = computed_on(device, CASES[name], batch, kernel=KERNEL)
    assert np.array_equal(got.out, plain.out) and np.array_equal(got.lse, plain.lse)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_numbers_of_a_row_must_lie_side_by_side(name, device):
    batch = attention_batch(CASES["dense_scale"])
    batch[name] = np.repeat(batch[name], 2, axis=-1)[..., ::2]
    with pytest.raises(ArgumentError, match=f"{name}: expected a contiguous last dimension"):
        computed_on(device, CASES["dense_scale"], batch, kernel=KERNEL)


# Masks


def test_a_mask_is_packed_to_bits_and_what_its_tiles_say(device):
    from headrace.kernels.triton.attention_mask import packed_mask

    random = np.random.default_rng(3)
    mask = random.random((2, 1, 70, 77)) < 0.5
    mask[0, :, :64, :32], mask[1, :, 64:, 32:64] = False, True
    guarded = Guarded(device)
    words, states = map(as_numpy, packed_mask(guarded.tensor(mask), 64, 32))
    guarded.assert_untouched()
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    assert np.array_equal(bits[..., :77].astype(bool), mask) and not bits[..., 77:].any()
    assert states.shape == (2, 1, 2, 3)
    assert states[0, 0, 0, 0] == 1 and states[1, 0, 1, 1] == 2
    assert (states == 3).sum() == states.size - 2


# tf32x3: the interpreter multiplies in float32 whatever it is told, so that the split is proved here.


def split_products(a, b):
    """a b^T in three products of tf32 parts, the smallest left out."""
    big_a, big_b = NARROW["tf32"](a), NARROW["tf32"](b)
    small_a, small_b = NARROW["tf32"](a - big_a), NARROW["tf32"](b - big_b)
    return small_a @ big_b.T + big_a @ small_b.T + big_a @ big_b.T


def single_products(a, b):
    return NARROW["tf32"](a) @ NARROW["tf32"](b).T


def whole_products(a, b):
    return a @ b.T


def emulated(query, keys, values, *, bias, options, sinks, scores_by, values_by):
    """The formula in float32 with these products."""
    group = query.shape[1] // keys.shape[1]
    keys, values = per_head(keys, group).astype(np.float32), per_head(values, group).astype(np.float32)
    out, lse = np.zeros((*query.shape[:2], values.shape[-1]), np.float32), np.zeros(query.shape[:2], np.float32)
    for h in range(query.shape[1]):
        scores = scores_by(query[:, h].astype(np.float32), keys[:, h]) * np.float32(options.scale)
        scores = capped(scores, options.softcap) + bias[0].astype(np.float32)
        top = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        out[:, h] = values_by(weights, np.ascontiguousarray(values[:, h].T)) / total
        lse[:, h] = (np.log(total) + top)[:, 0]
    return out, lse


def assert_split_holds(scores_by, values_by):
    case = dense("of_products", 1, 60, 200, **heads(4, 2, 128))
    batch = attention_batch(case)
    exact = reference(case, batch)
    got = reference(case, batch, functools.partial(emulated, scores_by=scores_by, values_by=values_by))
    rounded = AttentionResult(got.out.astype(np.float32), got.lse.astype(np.float32))
    assert_close(rounded, exact, straightforward(case, batch, exact))


def test_three_products_of_tf32_are_float32():
    assert_split_holds(split_products, split_products)


@pytest.mark.parametrize("scores_by,values_by", [(single_products, split_products), (split_products, single_products)])
def test_one_product_of_tf32_is_not(scores_by, values_by):
    assert_split_holds(whole_products, whole_products)
    with pytest.raises(AssertionError, match="allowed"):
        assert_split_holds(scores_by, values_by)


# Launches


def test_sizes_of_a_call_compile_no_kernel_of_their_own():
    from headrace.kernels.triton.attention_call import disguised

    numbers = disguised(*range(5000))
    assert min(numbers) > 1 and not any(number % 16 == 0 for number in numbers)
    assert [(number - 3) >> 1 for number in numbers] == list(range(5000))


def test_a_tile_follows_from_the_options_where_bits_must_not_depend_on_the_batch():
    from headrace.kernels.triton.attention_call import forward_call
    from headrace.kernels.triton.attention_variants import OPTIONS, dense_arrays

    def tiles(**options):
        calls = [forward_call(dense_arrays(128, tokens=n), OPTIONS | options, "sm_90") for n in (1, 4, 5, 4096)]
        return [(call.arguments["form"].rows, call.arguments["form"].keys, call.num_warps) for call in calls]

    assert len(set(tiles(batch_invariant=True))) == 1
    assert tiles()[0] == tiles()[1] != tiles()[2] == tiles()[3]


HUGE, LEAST = 2**31 - 1, -(2**31)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"query_starts": [0, HUGE, 40]},
        {"query_starts": [39, 20, LEAST]},
        {"query_starts": [-5, 20, 90]},
        {"key_starts": [HUGE, LEAST]},
        {"key_lens": [HUGE, -1]},
        {"key_starts": [60, 69], "key_lens": [70, 70]},
        {"first_keys": [LEAST] * 20 + [HUGE] * 20, "last_keys": [HUGE] * 40},
    ],
    ids=lambda given: "-".join(given),
)
def test_numbers_outside_the_arrays_lead_nowhere_else(given):
    """Far outside, the interpreter reads from memory that is not there."""
    from headrace.kernels.triton import attention, attention_backward
    from headrace.kernels.triton.attention_variants import OPTIONS

    def array(*shape):
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    arrays = {"query": array(40, 2, 16), "key": array(70, 1, 16), "value": array(70, 1, 16), "out": array(40, 2, 16)}
    numbers = {"query_starts": [0, 20, 40], "key_starts": [0, 30], "key_lens": [30, 40]} | given
    arrays |= {name: np.array(listed, np.int32) for name, listed in numbers.items()} | {"lse": array(40, 2)}
    arrays |= {f"d_{name}": array(*arrays[name].shape) for name in ("out", "query", "key", "value")}
    guarded = Guarded("cpu")
    tensors = guarded.tensors(arrays)
    attention.run({name: tensor for name, tensor in tensors.items() if not name.startswith("d_")}, OPTIONS)
    attention_backward.run(tensors, OPTIONS)
    guarded.assert_untouched()
