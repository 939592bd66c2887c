"""The formula of attention against PyTorch and counting by hand: what all kernels are held to must itself be right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.check.attention_batch import attention_batch, reference
from headrace.check.attention_cases import ATTENTION, dense, heads
from headrace.errors import ArgumentError
from headrace.ops import attention_dense, attention_paged
from headrace.ops.attention_formula import decoded, position_bias, visible
from headrace.ops.attention_options import AttentionOptions, checked_options
from headrace.ops.attention_request import keys_read, seen_pairs


def by_hand(query, keys, values, bias, options, sinks):
    """out and lse of one query and head, key by key, without array arithmetic."""
    scores = []
    for key, add in zip(keys, bias, strict=True):
        score = options.scale * math.fsum(a * b for a, b in zip(query, key, strict=True))
        score = score if options.softcap is None else options.softcap * math.tanh(score / options.softcap)
        scores.append(score + add)
    weights = [math.exp(score) for score in scores]
    total = math.fsum(weights)
    divisor = total + (0 if sinks is None else math.exp(sinks))
    if total == 0:
        return [0.0] * values.shape[1], -math.inf
    return [math.fsum(w * v for w, v in zip(weights, column, strict=True)) / divisor for column in values.T], math.log(
        total
    )


options = st.builds(
    AttentionOptions,
    causal=st.booleans(),
    align=st.sampled_from(["bottom_right", "top_left"]),
    window=st.tuples(*[st.none() | st.integers(0, 12)] * 2),
    softcap=st.none() | st.floats(0.5, 50),
    scale=st.floats(0.01, 2),
)
lens = st.integers(0, 11)


def sees(i, j, num_queries, num_keys, options):
    """Straight from the definition."""
    own = num_keys - num_queries + i if options.align == "bottom_right" else i
    left, right = options.window
    return not (
        (options.causal and j > own) or (left is not None and j < own - left) or (right is not None and j > own + right)
    )


@given(options, lens, lens)
def test_visibility_is_its_definition(options, num_queries, num_keys):
    expected = [[sees(i, j, num_queries, num_keys, options) for j in range(num_keys)] for i in range(num_queries)]
    got = visible(num_queries, num_keys, options)
    assert got.tolist() == expected
    assert seen_pairs(num_queries, num_keys, options) == got.sum()
    columns = np.flatnonzero(got.any(axis=0))
    assert keys_read(num_queries, num_keys, options) >= len(columns)
    if options.window == (None, None):
        assert keys_read(num_queries, num_keys, options) == len(columns)


@settings(max_examples=60, deadline=None)
@given(options, lens, lens, st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_the_formula_is_its_definition(options, num_queries, num_keys, group, with_sinks, with_slopes, seed):
    random = np.random.default_rng(seed)
    query = random.standard_normal((num_queries, 2 * group, 5))
    key, value = random.standard_normal((num_keys, 2, 5)), random.standard_normal((num_keys, 2, 3))
    mask = random.random((2 * group, num_queries, num_keys)) < 0.7
    sinks = random.standard_normal(2 * group) if with_sinks else None
    slopes = random.random(2 * group) if with_slopes else None
    starts = {"query_starts": np.array([0, num_queries]), "key_starts": np.array([0, num_keys])}
    kept = {name: getattr(options, name) for name in ("causal", "align", "window", "softcap", "scale")}
    got = attention_dense.reference(query, key, value, **starts, mask=mask, sinks=sinks, alibi_slopes=slopes, **kept)
    bias = position_bias(num_queries, num_keys, options, mask=mask, alibi_slopes=slopes)
    bias = np.broadcast_to(bias, (2 * group, num_queries, num_keys))
    for i in range(num_queries):
        for h in range(2 * group):
            sink = None if sinks is None else sinks[h]
            out, lse = by_hand(query[i, h], key[:, h // group], value[:, h // group], bias[h, i], options, sink)
            assert got.out[i, h] == pytest.approx(out, rel=1e-12, abs=1e-12)
            assert got.lse[i, h] == pytest.approx(lse, rel=1e-12, abs=1e-12)


def sdpa(batch, **options):
    arrays = [torch.from_numpy(batch[name].astype(np.float64)).transpose(1, 2) for name in ("query", "key", "value")]
    found = torch.nn.functional.scaled_dot_product_attention(*arrays, enable_gqa=True, **options)
    return found.transpose(1, 2).numpy()


def spread(values):
    """How far two float64 computations may be apart: rounding of the largest value, for each term of a sum of 100."""
    return 100 * 2.0**-53 * np.abs(values).max()


@pytest.mark.parametrize(
    "case,mask",
    [
        (dense("plain", 2, 9, 33, causal=False, **heads(6, 2, 20, 31)), False),
        (dense("top_left", 2, 9, 33, align="top_left", **heads(7, 1, 16)), False),
        (dense("square", 2, 33, 33, **heads(4, 4, 16)), False),
        (dense("float_mask", 2, 9, 33, mask="float", causal=False), True),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_the_formula_is_what_pytorch_computes(case, mask):
    batch = attention_batch(case)
    if mask:
        batch["mask"] = np.maximum(batch["mask"], np.float32(-50))  # PyTorch's rows that see nothing are NaN
        theirs = sdpa(batch, attn_mask=torch.from_numpy(batch["mask"]).double())
    else:
        theirs = sdpa(batch, is_causal=case.causal)
    ours = reference(case, batch).out
    assert np.abs(ours - theirs).max() <= spread(theirs)


def test_layouts_agree():
    case = dense("dense", 3, 20, 50, softcap=5.0, sinks=True, alibi="heads", window=(30, None))
    batch = attention_batch(case)
    rows = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in ("query", "key", "value")}
    starts = {"query_starts": np.arange(0, 61, 20), "key_starts": np.arange(0, 151, 50)}
    ragged = attention_dense.reference(**batch | rows | starts)
    pages = {"key_pages": batch["key"].reshape(15, 10, 2, 64), "value_pages": batch["value"].reshape(15, 10, 2, 64)}
    table = {"page_table": np.arange(15).reshape(3, 5), "sequence_lens": np.full(3, 50)}
    rest = {name: value for name, value in batch.items() if name not in ("key", "value")}
    table |= {"query": rows["query"], "query_starts": starts["query_starts"]}
    paged = attention_paged.reference(**rest | pages | table)
    whole = attention_dense.reference(**batch)
    for other in (ragged, paged):
        assert np.array_equal(other.out, whole.out.reshape(other.out.shape))
        assert np.array_equal(other.lse, whole.lse.reshape(other.lse.shape))


def test_int4_is_two_codes_a_byte():
    codes = decoded(np.array([[[0x7F, 0x80]]], np.uint8), np.array([[2.0]], np.float32))
    assert codes.tolist() == [[[-2.0, 14.0, 0.0, -16.0]]]


@pytest.mark.parametrize("name,bad", [("window", (1, 2, 3)), ("scale", 0), ("softcap", True), ("align", None)])
def test_options_are_checked(name, bad):
    with pytest.raises(ArgumentError, match=f"{name}: expected"):
        checked_options(64, **{name: bad})


def test_options_as_the_native_side_takes_them():
    found = checked_options(64, causal=True, window=(np.int32(5), 3)).native()
    assert (found["window_left"], found["window_right"], found["softcap"]) == (5, 0, 0.0)
    assert found["scale"] == 0.125 and not found["top_left"]
    assert checked_options(64, window=(None, 3)).native()["window_left"] == -1


def test_cases_have_names_of_their_own():
    assert len({case.name for case in ATTENTION}) == len(ATTENTION)
