"""append_pages on the device: the reference's codes bit for bit, rotation inside the budget, nothing beside written."""

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.appended import STORES, assert_codes_may_be, assert_same, make_pages, rotated_in_float32, written
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.guards import Guarded, as_numpy
from headrace.config import RopeConfig
from headrace.errors import ArgumentError
from headrace.ops import page_append as op
from headrace.ops import rope
from headrace.ops.kv_formats import FORMATS
from headrace.ops.page_append import append_latent_pages, append_pages, head_reference, spread_reference

NAME = "triton_append"
CASES = {case.name: case for case in cases.APPEND}
EPS = 1e-5
WRITTEN = ("key_pages", "value_pages", "key_scales", "value_scales", "query")


def call_arrays(case, store, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    num_pages = case.tokens // case.page_size + 2
    shape = (num_pages, case.page_size, case.kv_heads)

    def values(heads, dim):
        spread = np.exp(random.uniform(-6, 2, (case.tokens, heads, 1)))
        return rounded(spread * random.standard_normal((case.tokens, heads, dim)), dtype)

    positions = random.integers(0, 5000, case.tokens).astype(np.int32)
    frequencies = rope.inverse_frequencies(RopeConfig(rotary_dim=case.rotary_dim))
    key_pages, key_scales = make_pages(shape, case.head_dim, store)
    value_pages, value_scales = make_pages(shape, case.value_dim, store)
    return {
        "query": values(case.heads, case.head_dim),
        "key": values(case.kv_heads, case.head_dim),
        "value": values(case.kv_heads, case.value_dim),
        "key_pages": key_pages,
        "value_pages": value_pages,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "slots": random.permutation(num_pages * case.page_size)[: case.tokens].astype(np.int32),
        "table": rope.table_reference(positions, frequencies).astype(np.float32),
    }


def appended(device, arrays, append=append_pages, **options):
    """What the arrays hold afterwards, and what was returned, as arrays; AssertionError for a write beside them."""
    guarded = Guarded(device)
    tensors = guarded.tensors(arrays)
    given = {name: guarded.tensor(a, name) if isinstance(a, np.ndarray) else a for name, a in options.items()}
    found = append(**tensors, **given, kernel=NAME)
    guarded.assert_untouched()
    after = {name: as_numpy(array) if hasattr(array, "cpu") else array for name, array in tensors.items()}
    return after, None if found is None else as_numpy(found)


def tiers(quick, stores=STORES):
    return [
        pytest.param(
            case, store, id=f"{case.name}-{'-'.join(store)}", marks=[] if quick(case, store) else pytest.mark.slow
        )
        for case in cases.APPEND
        for store in stores
        if case.tokens < 70
    ]


@pytest.mark.parametrize(
    "case,store", tiers(lambda case, store: (case.name == "odd_widths" and store[0] != "float16") or case.name == "one")
)
def test_what_is_not_rotated_is_the_reference_bit_for_bit(case, store, device):
    dtype = {"float16": "bfloat16", "int8": "float16"}.get(store[0], "float32")
    arrays = call_arrays(case, store, dtype)
    del arrays["query"], arrays["table"]
    got, returned = appended(device, arrays)
    assert returned is None
    for which in ("key", "value"):
        rows = arrays[which].astype(np.float32)
        pages, scales = op.reference(rows, arrays[f"{which}_pages"], arrays["slots"], arrays[f"{which}_scales"])
        assert_same(got[f"{which}_pages"], pages)
        assert_same(got[f"{which}_scales"], scales)


@pytest.mark.parametrize("interleaved,normed", [(True, False), (False, True)])
@pytest.mark.parametrize(
    "case,store",
    tiers(
        lambda case, store: case.name == "partial_below_lanes" and store == ("int8", "token"),
        [("float32", ""), ("float8_e4m3fn", ""), ("int8", "token")],
    ),
)
def test_rotated_rows_are_within_budget(case, store, interleaved, normed, device):
    arrays = call_arrays(case, store)
    weights = np.random.default_rng(1).standard_normal((2, case.head_dim)).astype(np.float32)
    query_norm, key_norm = weights if normed else (None, None)
    options = {"query_norm": query_norm, "key_norm": key_norm, "interleaved": interleaved, "eps": EPS}
    got, out = appended(device, arrays, out=poisoned(arrays["query"].shape, "float32"), **options)
    style = (arrays["table"], interleaved)
    exact = head_reference(arrays["query"], *style, query_norm, EPS)
    assert_within_budget(out, exact, rotated_in_float32(arrays["query"], *style, query_norm, EPS), "float32")
    exact = head_reference(arrays["key"], *style, key_norm, EPS)
    plain = rotated_in_float32(arrays["key"], *style, key_norm, EPS)
    stored = written(got["key_pages"], got["key_scales"], arrays["slots"])
    if FORMATS[store[0]].largest:
        assert_codes_may_be(stored, store[0], exact, plain)
    else:
        assert_within_budget(stored[0], exact, rounded(plain, store[0]), store[0])
    pages, _ = op.reference(arrays["value"], arrays["value_pages"], arrays["slots"], arrays["value_scales"])
    assert_same(got["value_pages"], pages)


@pytest.mark.parametrize("name", ["partial_below_lanes", pytest.param("llama_8b", marks=pytest.mark.slow)])
def test_queries_and_keys_are_spread_in_place_and_values_are_not(name, device):
    case = CASES[name]
    arrays = call_arrays(case, ("float32", ""))
    got, returned = appended(device, arrays, spread=True)
    assert_same(returned, got["query"])
    for which, now in (("query", got["query"]), ("key", written(got["key_pages"], None, arrays["slots"])[0])):
        exact = head_reference(arrays[which], arrays["table"], True, spread=True)
        plain = spread_reference(rotated_in_float32(arrays[which], arrays["table"], True, None, EPS))
        assert_within_budget(now, exact, plain, "float32")
    pages, _ = op.reference(arrays["value"], arrays["value_pages"], arrays["slots"])
    assert_same(got["value_pages"], pages)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "int4"])
def test_rows_of_zeros_and_rows_that_are_not_finite(name, device):
    arrays = call_arrays(CASES["llama_8b"], (name, "token"))
    del arrays["query"], arrays["table"]
    key = arrays["key"]
    key[0] = 0
    key[1, 3, 17], key[2, 0, -1] = np.nan, -np.inf
    key[3] *= 1e-44  # as small as numbers are: some rows' scales are 0
    key[4, 1] = key[4, 1] / np.max(np.abs(key[4, 1])) * np.float32(3e38)
    got, _ = appended(device, arrays)
    pages, scales = op.reference(key, arrays["key_pages"], arrays["slots"], arrays["key_scales"])
    assert_same(got["key_pages"], pages)
    assert_same(got["key_scales"], scales)


def test_ties_go_to_the_even_code_of_float8(device):
    """Every number halfway between two codes, those below the smallest normal one too; and NaN and infinity."""
    codes = np.arange(0x7F, dtype=np.uint8).view(make_pages((1, 1, 1), 1, ("float8_e4m3fn", ""))[0].dtype)
    numbers = codes.astype(np.float32)
    halfway = (numbers[1:] + numbers[:-1]) / 2
    row = np.concatenate([numbers, halfway, -halfway, np.nextafter(halfway, 0), [np.nan, np.inf, -np.inf, -0.0, 500]])
    key = row.astype(np.float32)[None, None]
    pages, _ = make_pages((1, 2, 1), key.shape[2], ("float8_e4m3fn", ""))
    arrays = {"key": key, "value": None, "key_pages": pages, "value_pages": None, "slots": np.array([1], np.int32)}
    got, _ = appended(device, arrays)
    assert_same(got["key_pages"], op.reference(key, pages, arrays["slots"])[0])


@pytest.mark.parametrize("slot", [-1, 3 * 64, 2**31 - 1, -(2**31)])
def test_a_slot_outside_the_pages_is_not_written_to(slot, device):
    case = CASES["llama_8b"]
    arrays = call_arrays(case, ("int8", "token"))
    del arrays["query"], arrays["table"]
    arrays["slots"][-1] = slot
    got, _ = appended(device, arrays)
    slots = arrays["slots"][:-1]
    pages, scales = op.reference(arrays["key"][:-1], arrays["key_pages"], slots, arrays["key_scales"])
    assert_same(got["key_pages"], pages)
    assert_same(got["key_scales"], scales)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", cases.APPEND_LATENT, ids=lambda case: case.name)
def test_latents_and_rotated_keys_lie_side_by_side(case, scaled, device):
    random = np.random.default_rng(0)
    num_pages, dim = case.tokens // case.page_size + 2, case.latent_dim + case.rope_dim
    pages, scales = make_pages((num_pages, case.page_size, 1), dim, ("int8", "token") if scaled else ("float32", ""))
    frequencies = rope.inverse_frequencies(RopeConfig(rotary_dim=case.rope_dim))
    arrays = {
        "latent": random.standard_normal((case.tokens, case.latent_dim)).astype(np.float32),
        "rope_key": random.standard_normal((case.tokens, case.rope_dim)).astype(np.float32),
        "query_rope": random.standard_normal((case.tokens, case.heads, case.rope_dim)).astype(np.float32),
        "latent_pages": pages[:, :, 0],
        "slots": random.permutation(num_pages * case.page_size)[: case.tokens].astype(np.int32),
        "table": rope.table_reference(np.arange(case.tokens), frequencies).astype(np.float32),
        "scales": scales,
    }
    got, _ = appended(device, arrays, append_latent_pages)
    exact = head_reference(arrays["rope_key"][:, None], arrays["table"], True)
    plain = rotated_in_float32(arrays["rope_key"][:, None], arrays["table"], True, None, EPS)
    stored = written(got["latent_pages"][:, :, None], got["scales"], arrays["slots"])
    exact, plain = (np.concatenate([arrays["latent"][:, None], x], axis=2) for x in (exact, plain))
    if scaled:
        assert_codes_may_be(stored, "int8", exact, plain)
    else:
        assert_within_budget(stored[0], exact, plain, "float32")


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"query": np.zeros((6, 4096), np.float32)}, "query: expected [tokens, heads, dim]"),
        ({"key": np.zeros((5, 8, 128), np.float32)}, "slots: expected [5]"),
        ({"value": np.zeros((6, 7, 128), np.float32)}, "value: expected [6, 8, value_dim]"),
        ({"slots": np.zeros(6, np.int64)}, "slots: expected int32"),
        ({"table": np.zeros((6, 130), np.float32)}, "table: expected [tokens, rotary_dim]"),
        ({"key_pages": np.zeros((3, 64, 8, 64), np.float16)}, "key_pages: expected [pages, page_size, 8, 128]"),
        ({"key_pages": np.zeros((3, 64, 8, 128), np.int8)}, "key_scales: expected an array for pages of int8"),
        ({"value_pages": np.zeros((3, 64, 8, 128), np.float16)}, "value_pages: expected [2, 64, kv_heads"),
        ({"key_norm": np.zeros(63, np.float32)}, "key_norm: expected [128]"),
        ({"out": np.zeros((6, 32, 64), np.float32)}, "out: expected [6, 32, 128]"),
    ],
)
def test_bad_arguments_are_named(changes, text):
    arrays = call_arrays(CASES["llama_8b"], ("float16", "")) | changes
    with pytest.raises(ArgumentError) as caught:
        appended("cpu", arrays)
    assert text in str(caught.value)
