"""The engine over every type of cache: it says what a naive loop over one says, whatever the pages held before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import NaiveDecoder, TinyModel, write_tiny_model
from headrace.config import KV_DTYPES
from headrace.errors import ArgumentError
from headrace.kernels import cpu
from headrace.kernels.arrays import Fixed
from headrace.kv_cache.pages import pages_needed

PROMPT = [int(i) for i in np.random.default_rng(3).integers(0, 300, 37)]
LONG = [int(i) for i in np.random.default_rng(4).integers(0, 300, 150)]  # three pages
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
MODELS = {
    "llama": TinyModel(),
    "qwen2": TinyModel("qwen2", seed=2),
    "qwen3": TinyModel("qwen3", seed=3),
    "window": TinyModel(sliding_window=11, seed=4),
    "odd": TinyModel(dim=60, num_heads=5, num_kv_heads=1, head_dim=12, ffn_dim=70, seed=5),
}
NARROW = KV_DTYPES[1:]

Tiny = Callable[..., LLM]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Opens a tiny model by name."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, model in MODELS.items():
        write_tiny_model(folder / f"{name}.gguf", model)
    return lambda name, **options: LLM(folder / f"{name}.gguf", **options)


def cached_arrays(llm: LLM) -> Iterator[Fixed]:
    for layer in llm.engine.runner.storage.layers:
        yield from (array for array in vars(layer).values() if array is not None)


@pytest.mark.costly
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_naive_loop_over_such_a_cache(tiny: Tiny, name: str, kv_dtype: str) -> None:
    answer = tiny(name, kv_dtype=kv_dtype).generate(PROMPT, GREEDY)
    assert answer.token_ids == NaiveDecoder(MODELS[name], kv_dtype).greedy(PROMPT, GREEDY.max_tokens)


@pytest.mark.costly
@pytest.mark.parametrize("level", cpu.ISAS[:3])
@pytest.mark.parametrize("kv_dtype", NARROW)
def test_logits_are_as_far_off_as_such_a_cache_is(tiny: Tiny, kv_dtype: str, level: str) -> None:
    if cpu.ISAS.index(level) > cpu.ISAS.index(cpu.best_isa()):
        pytest.skip(f"this CPU has {cpu.best_isa()}")
    with cpu.limit_isa(level):
        got = tiny("llama", kv_dtype=kv_dtype).logits(LONG)
    exact, naive = (NaiveDecoder(MODELS["llama"], dtype).logits(LONG) for dtype in (None, kv_dtype))
    one_rounding = np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(got - exact).max() <= 2 * np.abs(naive - exact).max() + one_rounding


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_cached_beginning_is_a_computed_one(tiny: Tiny, kv_dtype: str) -> None:
    """In chunks of 32 both compute the last tokens in the same step, so that even where chunks show the bits agree."""
    llm, fresh = (tiny("llama", kv_dtype=kv_dtype, chunk_len=32) for _ in range(2))
    llm.generate([*LONG[:128], 7, 8, 9], GREEDY)
    again = llm.stream(LONG, GREEDY)
    tokens = [piece.token_id for piece in again]
    expected = fresh.generate(LONG, GREEDY)
    assert again._request.reused_len == 128
    assert (tokens, again.completion.logits_hash) == (expected.token_ids, expected.logits_hash)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", ["llama", "window"])
def test_what_nobody_wrote_is_never_read(tiny: Tiny, name: str, kv_dtype: str) -> None:
    """All ones are NaN in every float, in scales too."""
    llm, expected = tiny(name, kv_dtype=kv_dtype), tiny(name, kv_dtype=kv_dtype).generate(LONG, GREEDY)
    for array in cached_arrays(llm):
        array.numpy().view(np.uint8)[:] = 255
    answer = llm.generate(LONG, GREEDY)
    assert (answer.token_ids, answer.logits_hash) == (expected.token_ids, expected.logits_hash)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_pages_are_used_again(tiny: Tiny, kv_dtype: str) -> None:
    llm, fresh = (tiny("llama", kv_dtype=kv_dtype, max_requests=1) for _ in range(2))
    for first in range(5, 9):
        llm.generate([first, *LONG], GREEDY)
    assert llm.engine.pool.num_free < pages_needed(len(LONG), llm.engine.page_size)
    answer, expected = llm.generate(LONG, GREEDY), fresh.generate(LONG, GREEDY)
    assert (answer.token_ids, answer.logits_hash) == (expected.token_ids, expected.logits_hash)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_cache_is_of_the_type_and_its_bytes_are_counted(tiny: Tiny, kv_dtype: str) -> None:
    llm = tiny("llama", kv_dtype=kv_dtype)
    storage = llm.engine.runner.storage
    assert storage.dtype == kv_dtype
    held = sum(array.numpy().nbytes for array in cached_arrays(llm))
    assert llm.kv_bytes_per_token * storage.num_pages * storage.page_size == held


def test_fewer_bits_are_fewer_bytes(tiny: Tiny) -> None:
    sizes = [tiny("llama", kv_dtype=kv_dtype).kv_bytes_per_token for kv_dtype in KV_DTYPES]
    rows = 2 * 2 * 2  # layers, KV heads, keys and values
    assert sizes == [rows * size for size in (64, 32, 32, 16, 16 + 4, 8 + 4)]


def test_int4_needs_an_even_head_dim(tmp_path: Path) -> None:
    odd = TinyModel(head_dim=15, extra={"rope.dimension_count": 14})
    path = write_tiny_model(tmp_path / "odd.gguf", odd)
    with pytest.raises(ArgumentError, match="kv_dtype: int4 needs an even head_dim, this model's is 15"):
        LLM(path, kv_dtype="int4")


@pytest.mark.parametrize("wrong", ["fp8", "uint8", "", "INT8", None])
def test_another_type_is_refused_with_those_there_are(tiny: Tiny, wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=r"kv_dtype: expected float32, .* float8_e4m3fn, int8 or int4, got "):
        tiny("llama", kv_dtype=wrong)
