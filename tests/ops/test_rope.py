"""rope: frequencies as transformers computes them, the table at any position, rotation and pages inside the budget."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.config import RopeConfig
from headrace.errors import ArgumentError
from headrace.ops import norm, rope

KERNELS = list(rope.append_kernels())
STYLES = list(itertools.product([True, False], [True, False]))


def from_transformers(kind, config, **parameters):
    """Inverse frequencies and magnitude, from the library whose checkpoints these are."""
    module = pytest.importorskip("transformers.modeling_rope_utils")
    torch = pytest.importorskip("torch")
    parameters = {"rope_type": kind, "rope_theta": config.theta, "factor": config.factor, **parameters}
    fake = SimpleNamespace(
        rope_parameters=parameters,
        rope_theta=config.theta,
        rope_scaling=parameters,
        hidden_size=config.rotary_dim,
        num_attention_heads=1,
        head_dim=config.rotary_dim,
        max_position_embeddings=parameters.get("original_max_position_embeddings", 4096),
        standardize_rope_params=lambda: None,
    )
    frequencies, magnitude = module.ROPE_INIT_FUNCTIONS[kind](fake, torch.device("cpu"))
    return frequencies.numpy(), magnitude


@pytest.mark.parametrize(
    "kind,config,parameters",
    [
        ("linear", RopeConfig(theta=1e4, rotary_dim=64, scaling="linear", factor=4.0), {}),
        (
            "yarn",
            RopeConfig(theta=1e6, rotary_dim=128, scaling="yarn", factor=4.0, original_context_len=32768),
            {"original_max_position_embeddings": 32768},
        ),
        (
            "yarn",
            RopeConfig(1e4, 64, scaling="yarn", factor=16.0, original_context_len=2048, yarn_beta_fast=20.0),
            {"original_max_position_embeddings": 2048, "beta_fast": 20.0},
        ),
    ],
)
def test_frequencies_are_those_of_transformers(kind, config, parameters):
    expected, magnitude = from_transformers(kind, config, **parameters)
    plain = 1 / (np.float32(config.theta) ** (np.arange(0, config.rotary_dim, 2, dtype=np.float32) / config.rotary_dim))
    exact = config.theta ** (-np.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    got = rope.inverse_frequencies(config)
    assert got.dtype == np.float64
    assert np.max(np.abs(got / expected - 1)) <= 2 * np.max(np.abs(plain / exact - 1)) + 2.0**-22
    assert rope.magnitude(config) == pytest.approx(magnitude, abs=0, rel=2.0**-50)


def test_llama3_factors_give_the_frequencies_of_transformers():
    config = RopeConfig(theta=5e5, rotary_dim=128, scaling="llama3")
    parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected, _ = from_transformers("llama3", RopeConfig(theta=5e5, rotary_dim=128, factor=8.0), **parameters)
    plain = rope.inverse_frequencies(RopeConfig(theta=5e5, rotary_dim=128))
    factors = (plain / expected).astype(np.float32)  # what a converter writes to rope_freqs.weight
    got = rope.inverse_frequencies(config, factors)
    assert factors.max() > 7.9 and factors.min() < 1.1
    assert np.max(np.abs(got / expected - 1)) <= 2.0**-23


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_table_is_exact_at_any_position(dtype):
    positions = np.array([0, 1, 2, 1000, 99_999, 100_000, 2**31 - 1], np.int32)
    frequencies = rope.inverse_frequencies(RopeConfig(theta=1e4, rotary_dim=66)).astype(dtype)
    table = rope.rope_table(positions, frequencies, magnitude=1.25, out=poisoned((7, 66), "float32"))
    exact = rope.table_reference(positions, frequencies, 1.25)
    assert_within_budget(table, exact, exact.astype(np.float32), "float32")


def call_arrays(case, dtype, seed=0):
    random = np.random.default_rng(seed)
    num_pages = case.tokens // case.page_size + 2
    slots = random.permutation(num_pages * case.page_size)[: case.tokens].astype(np.int32)
    shape = (num_pages, case.page_size, case.kv_heads)

    def values(heads, dim):
        return random.standard_normal((case.tokens, heads, dim)).astype(np.float32)

    positions = random.integers(0, 5000, case.tokens).astype(np.int32)
    frequencies = rope.inverse_frequencies(RopeConfig(rotary_dim=case.rotary_dim))
    return {
        "query": values(case.heads, case.head_dim),
        "key": values(case.kv_heads, case.head_dim),
        "value": values(case.kv_heads, case.value_dim),
        "key_pages": poisoned((*shape, case.head_dim), dtype),
        "value_pages": poisoned((*shape, case.value_dim), dtype),
        "slots": slots,
        "table": rope.table_reference(positions, frequencies).astype(np.float32),
    }


def straightforward(x, table, interleaved, weight, eps):
    if weight is not None:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps)) * weight
    pairs = table.shape[1] // 2
    c, s = table[:, None, :pairs], table[:, None, pairs:]
    first, second = (np.s_[..., 0 : 2 * pairs : 2], np.s_[..., 1 : 2 * pairs : 2])
    if not interleaved:
        first, second = np.s_[..., :pairs], np.s_[..., pairs : 2 * pairs]
    y = x.copy()
    y[first], y[second] = x[first] * c - x[second] * s, x[second] * c + x[first] * s
    return y


@pytest.mark.parametrize("interleaved,normed", STYLES, ids=lambda flag: str(flag))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", cases.ROPE, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_append_is_within_budget(kernel, case, dtype, interleaved, normed):
    reasons = kernel.why_not(None)
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))
    arrays = call_arrays(case, dtype)
    weights = (
        np.random.default_rng(1).standard_normal((2, case.head_dim)).astype(np.float32) if normed else (None, None)
    )
    options = {"query_norm": weights[0], "key_norm": weights[1], "interleaved": interleaved, "eps": 1e-5}
    out = poisoned(arrays["query"].shape, "float32")
    assert rope.rope_append(**arrays, **options, out=out, kernel=kernel.name) is out
    slots, style = arrays["slots"], (arrays["table"], interleaved)
    exact = rope.head_reference(arrays["query"], *style, weights[0], 1e-5)
    assert_within_budget(out, exact, straightforward(arrays["query"], *style, weights[0], 1e-5), "float32")
    keys = arrays["key_pages"].reshape(-1, case.kv_heads, case.head_dim)
    exact = rope.head_reference(arrays["key"], *style, weights[1], 1e-5)
    assert_within_budget(
        keys[slots], exact, rounded(straightforward(arrays["key"], *style, weights[1], 1e-5), dtype), dtype
    )
    values = arrays["value_pages"].reshape(-1, case.kv_heads, case.value_dim)
    assert np.array_equal(values[slots], rounded(arrays["value"], dtype))
    untouched = np.delete(np.arange(len(keys)), slots)
    assert np.isnan(keys[untouched].astype(np.float32)).all() and np.isnan(values[untouched].astype(np.float32)).all()


def test_queries_are_rotated_in_place_without_out():
    case = cases.ROPE[2]
    arrays = call_arrays(case, "float16")
    query = arrays["query"].copy()
    expected = rope.rope_append(**(arrays | {"query": query}), out=np.empty_like(query))
    assert rope.rope_append(**arrays) is arrays["query"]
    assert np.array_equal(arrays["query"], expected)
    assert not np.array_equal(query, expected)


def test_norm_comes_before_rotation():
    case = cases.ROPE[1]
    arrays = call_arrays(case, "float32")
    weight = np.linspace(0.5, 2, case.head_dim, dtype=np.float32)
    normed = norm.rms_norm(arrays["query"].reshape(-1, case.head_dim), weight).reshape(arrays["query"].shape)
    expected = rope.rope_append(**(arrays | {"query": normed}), out=np.empty_like(normed))
    assert np.array_equal(rope.rope_append(**arrays, query_norm=weight, out=np.empty_like(normed)), expected)


@pytest.mark.parametrize("slot", [-1, 3 * 64, 2**31 - 1, -(2**31)])
def test_a_slot_outside_the_pages_is_an_error_and_never_written(slot):
    arrays = call_arrays(cases.ROPE[2], "float16")
    guarded = np.full((5, *arrays["key_pages"].shape[1:]), 7, np.float16)
    arrays["key_pages"] = guarded[1:4]
    arrays["slots"][-1] = slot
    with pytest.raises(ArgumentError, match="slots: expected 0 to 191"):
        rope.rope_append(**arrays)
    assert (guarded[[0, 4]] == 7).all()


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"query": np.zeros((70, 576), np.float32)}, "query: expected [tokens, heads, head_dim]"),
        ({"query": np.zeros((70, 9, 64), np.float16)}, "expected float32"),
        ({"key": np.zeros((70, 3, 32), np.float32)}, "key: expected [70, any, 64]"),
        ({"value": np.zeros((69, 3, 64), np.float32)}, "value: expected [70, 3, any]"),
        ({"slots": np.zeros(70, np.int64)}, "slots: expected int32"),
        ({"slots": np.zeros(69, np.int32)}, "slots: expected [70]"),
        ({"table": np.zeros((70, 66), np.float32)}, "table: expected [tokens, rotary_dim]"),
        ({"key_pages": np.zeros((3, 64, 2, 64), np.float16)}, "key_pages: expected [any, any, 3, 64]"),
        ({"value_pages": np.zeros((2, 64, 3, 64), np.float16)}, "value_pages: expected [3, 64, 3, 64]"),
        ({"key_norm": np.zeros(63, np.float32)}, "key_norm: expected [64]"),
        ({"eps": -1.0}, "eps: expected a finite number"),
        ({"out": np.zeros((70, 9, 63), np.float32)}, "out: expected [70, 9, 64]"),
        ({"value": None}, "value: expected an array"),
    ],
)
def test_bad_arguments_are_named(changes, text):
    with pytest.raises(ArgumentError) as caught:
        rope.rope_append(**(call_arrays(cases.ROPE[2], "float16") | changes))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"rotary_dim": 7}, "rotary_dim: expected an even number"),
        ({"scaling": "magic"}, "scaling: expected none, linear, llama3 or yarn"),
        ({"scaling": "llama3"}, "factors: expected one per frequency"),
        ({"scaling": "yarn"}, "original_context_len: expected at least 1"),
        ({"theta": 0.0}, "theta, factor: expected"),
    ],
)
def test_configs_that_make_no_sense_are_named(changes, text):
    with pytest.raises(ArgumentError) as caught:
        rope.inverse_frequencies(RopeConfig(**({"rotary_dim": 64} | changes)))
    assert text in str(caught.value)
