"""Many sequences in a step: each says what the naive loop says of it alone, whoever else is there, comes or goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import NaiveDecoder, TinyModel, write_tiny_model
from headrace.config import EngineConfig
from headrace.engine.batch import Batch
from headrace.engine.runner import Runner
from headrace.engine.sequence import CachedSequence, NewTokens, run_step
from headrace.errors import ArgumentError, CapacityError
from headrace.kernels import cpu
from headrace.kv_cache.pages import PagePool
from headrace.weights.gguf import open_gguf
from headrace.weights.load import load_config, load_weights

MODELS = {
    "llama": TinyModel(),
    "qwen3": TinyModel("qwen3", seed=3),
    "window": TinyModel(sliding_window=11, seed=4),
    "odd": TinyModel(dim=60, num_heads=5, num_kv_heads=1, head_dim=12, ffn_dim=70, seed=5),
    "q8_0": TinyModel(matrix_format="Q8_0", ffn_dim=96, seed=6),
}
LENS = (1, 5, 23, 40, 2, 17, 31, 9)  # of prompts
ANSWER_LEN = 6
LEVELS = [level for level in ("portable", "avx2", "avx512") if cpu.ISAS.index(level) <= cpu.ISAS.index(cpu.best_isa())]


def prompts() -> list[list[int]]:
    chance = np.random.default_rng(11)
    return [[int(i) for i in chance.integers(0, 300, length)] for length in LENS]


class Cache:
    """A runner of a tiny model and its pages."""

    def __init__(self, path: Path, *, num_pages: int = 64, **options: Any) -> None:
        engine = EngineConfig(**({"page_size": 4, "chunk_len": 16, "max_requests": 3, "kv_dtype": "float32"} | options))
        with open_gguf(path) as file:
            config = load_config(file)
            weights = load_weights(file, config, cpu.default_pool())
        self.pool = PagePool(num_pages)
        self.runner = Runner(weights, config, engine, cpu.default_pool(), num_pages)
        self.page_size = engine.page_size

    def step(self, *parts: NewTokens) -> np.ndarray:
        return run_step(self.runner, self.pool, parts).copy()

    def free(self, sequence: CachedSequence) -> None:
        sequence.forget(0, self.pool, self.page_size)

    def alone(self, ids: list[int]) -> np.ndarray:
        """Logits [tokens, vocab] of a text by itself, token by token."""
        sequence = CachedSequence()
        logits = np.concatenate([self.step(NewTokens(sequence, [token])) for token in ids])
        self.free(sequence)
        return logits


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_model(folder / f"{name}.gguf", model) for name, model in MODELS.items()}


class Run:
    """A prompt on its way to an answer."""

    def __init__(self, prompt: list[int]) -> None:
        self.sequence, self.waiting, self.answer = CachedSequence(), list(prompt), list[int]()

    def next(self, most: int) -> NewTokens:
        """Some of what waits; the last of it gives the logits of the next token."""
        ids, self.waiting = self.waiting[:most], self.waiting[most:]
        return NewTokens(self.sequence, ids, 0 if self.waiting else 1)

    def take(self, logits: Iterator[np.ndarray]) -> None:
        if not self.waiting:
            token = int(np.argmax(next(logits)))
            self.answer.append(token)
            self.waiting.append(token)


def served(cache: Cache, waiting: list[Run]) -> set[int]:
    """Runs them all, each as soon as there is room, a few tokens at a time. The kinds of steps: tokens of a request."""
    chance, running, kinds = np.random.default_rng(5), list[Run](), set[int]()
    queue = list(waiting)
    while queue or running:
        while queue and len(running) < 3:
            running.append(queue.pop(0))
        chance.shuffle(running)  # type: ignore[arg-type]
        parts = [run.next(int(chance.integers(1, 6))) for run in running]
        kinds |= {len(part.ids) for part in parts} if len(parts) > 1 else set()
        logits = iter(cache.step(*parts))
        for run in running:
            run.take(logits)
        assert next(logits, None) is None
        for run in [run for run in running if len(run.answer) == ANSWER_LEN]:
            cache.free(run.sequence)
            running.remove(run)
    return kinds


@pytest.mark.parametrize("name", [name for name in MODELS if name != "q8_0"])  # whose products are not the loop's
def test_sequences_that_come_and_go_are_the_naive_loop(paths: dict[str, Path], name: str) -> None:
    num_pages = 28  # what the three longest need
    assert sum(-(-(length + ANSWER_LEN - 1) // 4) for length in LENS) > 1.5 * num_pages  # pages are used again
    cache, naive = Cache(paths[name], num_pages=num_pages), NaiveDecoder(MODELS[name])
    runs = [Run(prompt) for prompt in prompts()]
    assert served(cache, runs) == {1, 2, 3, 4, 5}
    for run, prompt in zip(runs, prompts(), strict=True):
        assert run.answer == naive.greedy(prompt, ANSWER_LEN)
    assert cache.pool.num_free == num_pages


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_in_a_batch_bits_are_those_of_alone(paths: dict[str, Path], name: str, kv_dtype: str, level: str) -> None:
    with cpu.limit_isa(level):
        cache, texts = Cache(paths[name], kv_dtype=kv_dtype), prompts()[1:4]
        alone = [cache.alone(text) for text in texts]
        sequences = [CachedSequence() for _ in texts]
        cache.step(*(NewTokens(s, text[:n], 0) for s, text, n in zip(sequences, texts, (1, 9, 3), strict=True)))
        # One at its next token, one with a few, one with a chunk of its prompt.
        together = cache.step(
            NewTokens(sequences[0], texts[0][1:2]),
            NewTokens(sequences[1], texts[1][9:12], 2),
            NewTokens(sequences[2], texts[2][3:15], 12),
        )
    expected = np.concatenate([alone[0][1:2], alone[1][10:12], alone[2][3:15]])
    assert together.tobytes() == expected.tobytes()


def test_more_requests_than_a_chunk_has_tokens(paths: dict[str, Path]) -> None:
    cache = Cache(paths["llama"], chunk_len=2, max_requests=70, num_pages=70)
    ids = list(range(70))
    logits = cache.step(*(NewTokens(CachedSequence(), [token]) for token in ids))
    one_by_one = [cache.step(NewTokens(s, [token])) for s, token in reused(cache, ids)]
    assert logits.tobytes() == np.concatenate(one_by_one).tobytes()


def reused(cache: Cache, ids: list[int]) -> Iterator[tuple[CachedSequence, int]]:
    """A new sequence per token, on pages that others left."""
    cache.pool.free(range(cache.pool.num_pages))
    for token in ids:
        sequence = CachedSequence()
        yield sequence, token
        cache.free(sequence)


@pytest.mark.parametrize(
    "lens,outputs,text",
    [
        ((1, 1, 1, 1), 1, "requests: expected at most 3 in a step, got one more"),
        ((8, 9), 1, "tokens: expected at most 16 in a step, got 17"),
        ((48,), 0, "tokens: expected at most 16 in a step, got 48"),
        ((12, 2, 2), 1, "pages: expected 5 free, got 4 of 4"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    paths: dict[str, Path], lens: tuple[int, ...], outputs: int, text: str
) -> None:
    cache = Cache(paths["llama"], num_pages=4 if text.startswith("pages") else 64)
    sequences = [CachedSequence() for _ in lens]
    parts = [NewTokens(s, [7] * n, min(n, outputs)) for s, n in zip(sequences, lens, strict=True)]
    with pytest.raises(CapacityError, match=text):
        cache.step(*parts)
    assert cache.pool.num_free == cache.pool.num_pages
    assert all(not s.ids and not s.pages for s in sequences)
    first = cache.step(NewTokens(sequences[0], [7], 1))
    assert first.tobytes() == cache.alone([7]).tobytes()


def test_rows_of_logits_are_counted() -> None:
    batch = Batch(tokens=8, requests=2, outputs=2, max_pages=2, page_size=4)
    batch.add([7, 7], 0, [0], 1)
    with pytest.raises(CapacityError, match="outputs: expected at most 2 in a step, got 3"):
        batch.add([7, 7], 0, [1], 2)
    assert (batch.num_tokens, batch.num_requests, batch.num_outputs) == (2, 1, 1)


def test_a_sequence_ends_with_its_context(paths: dict[str, Path]) -> None:
    cache, sequence = Cache(paths["llama"], context_len=10), CachedSequence()
    cache.step(NewTokens(sequence, [7] * 12))  # whole pages
    with pytest.raises(CapacityError, match="pages of a request: expected at most 3 in a step, got 4"):
        cache.step(NewTokens(sequence, [7]))
    assert (len(sequence.ids), len(sequence.pages), cache.pool.num_free) == (12, 3, 61)


def test_one_at_a_time_goes_on_beside_others(paths: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    llm = LLM(paths["llama"], max_requests=3)
    expected, text = LLM(paths["llama"]).generate([5, 6, 7], params).token_ids, prompts()[2]
    whole, others = LLM(paths["llama"]).logits(text), [CachedSequence(), CachedSequence()]
    tokens = []
    for piece, own in zip(llm.stream([5, 6, 7], params), text, strict=False):
        tokens.append(piece.token_id)
        logits = run_step(llm.engine.runner, llm.engine.pool, [NewTokens(other, [own]) for other in others])
        assert logits[0].tobytes() == logits[1].tobytes() == whole[len(others[0].ids) - 1].tobytes()
    assert tokens == expected


def test_no_requests_are_refused() -> None:
    with pytest.raises(ArgumentError, match="max_requests: expected a whole number >= 1, got 0"):
        EngineConfig(max_requests=0)
