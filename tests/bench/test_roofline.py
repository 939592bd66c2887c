"""Ceilings: what binds, and that they add up to what the model's file holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.bench.roofline import ModelWork, decode_ceiling, model_work, prefill_ceiling
from headrace.machine import Machine
from headrace.weights.gguf import open_gguf
from headrace.weights.load import load_config

WORK = ModelWork(1000, 10, {"int8": 2000}, {"int8": 500}, 4)
MACHINE = Machine(
    {},
    measured=True,
    cores=2,
    reads={1: {1000: 50.0}, 2: {1000: 100.0}},
    products={"int8": {1: 500.0, 2: 1000.0}, "fp32": {1: 50.0, 2: 100.0}},
)


def test_decode_reads_the_weights_and_the_cache() -> None:
    ceiling = decode_ceiling(WORK, MACHINE, 99, 2)
    assert ceiling.num_bytes == 1000 + 10 * 100
    assert ceiling.memory_s == 20.0
    assert ceiling.compute_s == (2000 + 500) / 1000 + 4 * 100 / 100
    assert ceiling.bound == "memory" and ceiling.tokens_per_s == 1 / 20


def test_a_batch_reads_the_weights_once_and_every_cache() -> None:
    ceiling = decode_ceiling(WORK, MACHINE, 99, 2, batch=8)
    assert ceiling.num_bytes == 1000 + 8 * 10 * 100
    one = decode_ceiling(WORK, MACHINE, 99, 2)
    assert ceiling.flops == 8 * one.flops and ceiling.compute_s == 8 * one.compute_s
    assert (one.bound, ceiling.bound) == ("memory", "memory") and ceiling.tokens_per_s == 8 / 90
    crowded = decode_ceiling(WORK, MACHINE, 0, 2, batch=8)
    assert crowded.bound == "compute" and crowded.tokens_per_s == 8 / crowded.compute_s


def test_prefill_multiplies_every_token_and_the_head_once() -> None:
    ceiling = prefill_ceiling(WORK, MACHINE, 10, 100, 2)
    pairs = 10 * 100 + 100 * 101 // 2
    assert ceiling.flops == 100 * 2000 + 500 + 4 * pairs
    assert ceiling.compute_s == pytest.approx((100 * 2000 + 500) / 1000 + 4 * pairs / 100)
    assert ceiling.bound == "compute" and ceiling.tokens_per_s == 100 / ceiling.compute_s


def test_fewer_threads_have_lower_ceilings() -> None:
    for ceiling in (decode_ceiling, lambda *args: prefill_ceiling(*args[:3], 64, args[3])):
        assert ceiling(WORK, MACHINE, 10, 1).seconds == 2 * ceiling(WORK, MACHINE, 10, 2).seconds


def test_rates_are_in_the_unit_that_binds() -> None:
    memory, compute = decode_ceiling(WORK, MACHINE, 0, 2), prefill_ceiling(WORK, MACHINE, 0, 100, 2)
    assert memory.rate_text(memory.tokens_per_s * 1e9) == "100.0 GB/s"
    assert compute.rate_text(compute.tokens_per_s).endswith("TFLOP/s")


def test_the_work_of_the_default_model_is_that_of_its_matrices(default_model_path: Path) -> None:
    with open_gguf(default_model_path) as file:
        config = load_config(file)
        work = model_work(file, config, 1, 1)
    kv_dim = config.num_kv_heads * config.head_dim
    per_layer = config.dim * (2 * config.dim + 2 * kv_dim + 3 * config.ffn_dim)
    assert sum(work.layer_flops.values()) == 2 * config.num_layers * per_layer
    assert sum(work.head_flops.values()) == 2 * config.dim * config.vocab_size
    assert work.attention_flops == 4 * config.num_layers * config.num_heads * config.head_dim
