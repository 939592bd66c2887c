"""Many requests at once on tiny models: each gets what it gets alone, whoever comes, goes, or has to make room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import NaiveDecoder, TinyModel, write_tiny_model
from headrace.engine.request import Request

CHANCE = np.random.default_rng(5)
BEGINNING = [int(i) for i in CHANCE.integers(0, 300, 70)]
PROMPTS = [
    *([int(i) for i in CHANCE.integers(0, 300, length)] for length in (1, 2, 17, 64, 65, 40, 90, 33)),
    *([*BEGINNING, *(int(i) for i in CHANCE.integers(0, 300, length))] for length in (1, 9, 30, 64, 2, 13, 5, 21)),
]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SAMPLED = [SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.2, seed=seed) for seed in range(len(PROMPTS))]
CONTEXT_BYTES = 256 * 512  # 2 layers, 2 KV heads of 16, float32
Open = Callable[..., LLM]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel())

    def open_model(**options: Any) -> LLM:
        return LLM(path, **({"kv_dtype": "float32"} | options))

    return open_model


@pytest.fixture(scope="module")
def alone(tiny: Open) -> list[list[int]]:
    """Sampled answers of a model that sees one prompt at a time and nothing before it."""
    llm, answers = tiny(), list[list[int]]()
    for prompt, params in zip(PROMPTS, SAMPLED, strict=True):
        llm.engine.clear()
        answers.append(llm.generate(prompt, params).token_ids)
    return answers


def added(llm: LLM, params: list[SamplingParams]) -> list[Request]:
    requests = [llm.engine.request(prompt, each) for prompt, each in zip(PROMPTS, params, strict=True)]
    for request in requests:
        llm.engine.add(request)
    return requests


def finish(llm: LLM) -> None:
    while llm.engine.has_work:
        llm.engine.step()


def nothing_is_lost(llm: LLM) -> bool:
    llm.engine.prefixes.clear()
    return llm.engine.pool.num_free == llm.engine.pool.num_pages


def test_greedy_answers_of_many_are_the_naive_ones(tiny: Open) -> None:
    llm, naive = tiny(max_requests=16), NaiveDecoder(TinyModel())
    requests = added(llm, [GREEDY] * len(PROMPTS))
    finish(llm)
    assert [r.token_ids for r in requests] == [naive.greedy(prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk_len", [16, 50, 512])
@pytest.mark.parametrize("max_requests", [3, 16])
def test_alone_is_among_others(tiny: Open, alone: list[list[int]], max_requests: int, chunk_len: int) -> None:
    llm = tiny(max_requests=max_requests, chunk_len=chunk_len)
    requests = added(llm, SAMPLED)
    finish(llm)
    assert [request.token_ids for request in requests] == alone
    assert all(request.logits_hash for request in requests) and nothing_is_lost(llm)


def test_known_beginnings_answer_as_computed_ones(tiny: Open, alone: list[list[int]]) -> None:
    llm = tiny(max_requests=8)
    for _ in range(2):
        requests = added(llm, SAMPLED)
        finish(llm)
        assert [request.token_ids for request in requests] == alone
    assert all(request.reused_len >= len(request.prompt_ids) - 1 for request in requests)


def test_a_request_that_had_to_make_room_answers_the_same(tiny: Open, alone: list[list[int]]) -> None:
    llm = tiny(max_requests=16, kv_cache_bytes=3 * CONTEXT_BYTES // 4)
    requests = added(llm, SAMPLED)
    finish(llm)
    assert llm.engine.scheduler.num_preemptions > 0
    assert [request.token_ids for request in requests] == alone and nothing_is_lost(llm)


def test_those_who_leave_take_nothing_along(tiny: Open, alone: list[list[int]]) -> None:
    llm = tiny(max_requests=8)
    requests = added(llm, SAMPLED)
    for step in range(6):
        llm.engine.step()
        llm.engine.cancel(requests[2 * step])
    finish(llm)
    for i, request in enumerate(requests):
        assert request.token_ids == alone[i][: len(request.token_ids)]
        assert (request.finish_reason == "cancelled") == (i in range(0, 12, 2)) or len(request.token_ids) == 12
    assert nothing_is_lost(llm)


def test_answers_to_one_prompt_compute_it_once(tiny: Open) -> None:
    llm, prompt = tiny(max_requests=4), PROMPTS[6]
    params = [SamplingParams(max_tokens=8, temperature=1.5, seed=seed, ignore_eos=True) for seed in range(4)]
    first, *copies = [llm.engine.request(prompt, each) for each in params]
    first.copies = list(copies)
    llm.engine.add(first)
    finish(llm)
    assert {copy.reused_len for copy in copies} == {len(prompt) - 1}
    assert [r.token_ids for r in (first, *copies)] == [tiny().generate(prompt, each).token_ids for each in params]
    assert nothing_is_lost(llm)
