"""rope: frequencies as transformers computes them, the table exact at any position."""

from types import SimpleNamespace

import numpy as np
import pytest

from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.config import RopeConfig
from headrace.errors import ArgumentError
from headrace.ops import rope


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


@pytest.mark.parametrize("dtype", rope.DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [2, 34, 80])
def test_heads_are_turned_in_place_and_elsewhere(rotary_dim, interleaved, dtype):
    random = np.random.default_rng(rotary_dim)
    x = rounded(random.standard_normal((5, 3, 90)), dtype)[:, :, 5:85]
    table = rope.table_reference(np.arange(5) * 7, rope.inverse_frequencies(RopeConfig(rotary_dim=rotary_dim)))
    table = table.astype(np.float32)
    exact = rope.rotate_reference(x, table, interleaved)
    straightforward = rope.rotate_reference(x, table, interleaved).astype(np.float32).astype(x.dtype)
    assert_within_budget(rope.rotate(x, table, interleaved=interleaved), exact, straightforward, dtype)
    assert rope.rotate(x, table, interleaved=interleaved, out=x) is x
    assert_within_budget(x, exact, straightforward, dtype)


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"x": np.zeros((2, 8), np.float32)}, "x: expected [tokens, heads, head_dim]"),
        ({"table": np.zeros((2, 10), np.float32)}, "table: expected [2, rotary_dim]"),
        ({"table": np.zeros((3, 8), np.float32)}, "table: expected [2, rotary_dim]"),
        ({"table": np.zeros((2, 8))}, "table: expected float32"),
        ({"out": np.zeros((2, 1, 7), np.float32)}, "out: expected [2, 1, 8]"),
    ],
)
def test_rotations_that_make_no_sense_are_named(changes, text):
    call = {"x": np.zeros((2, 1, 8), np.float32), "table": np.zeros((2, 8), np.float32)} | changes
    with pytest.raises(ArgumentError) as caught:
        rope.rotate(call.pop("x"), call.pop("table"), **call)
    assert text in str(caught.value)
