"""Many requests at once on tiny models: each gets what it gets alone, whoever comes, goes, or has to make room."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import NaiveDecoder, TinyModel, write_tiny_model
from headrace.engine.pace import Pace
from headrace.engine.request import Request
from headrace.errors import ArgumentError
from headrace.token_rules import TokenRules

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


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts enter as fast as they fit, however long a step takes: the same happens on any machine."""
    monkeypatch.setattr(Pace, "prompt_tokens", lambda self, answers: 512)


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


EVERYTHING = [
    SamplingParams(
        max_tokens=12,
        temperature=1.4,
        seed=seed,
        top_k=200,
        top_p=0.97,
        min_p=0.001,
        typical_p=0.95,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        dry_multiplier=0.7,
        logit_bias={seed: 2.0, 299: -100.0},
        min_tokens=4,
        stop_token_ids=tuple(range(40)),
        logprobs=2,
        prompt_logprobs=seed % 3 if seed % 2 else None,
    )
    for seed in range(len(PROMPTS))
]
RULES = TokenRules(bad_words=((50,), (60, 61)), dry_breakers=frozenset({3}))


def test_alone_is_among_others_with_every_parameter(tiny: Open) -> None:
    llm, expected = tiny(), list[Request]()
    for prompt, params in zip(PROMPTS, EVERYTHING, strict=True):
        llm.engine.clear()
        expected.append(llm.engine.request(prompt, params, RULES))
        assert list(llm.engine.run(expected[-1])) == expected[-1].token_ids
    llm = tiny(max_requests=16, kv_cache_bytes=CONTEXT_BYTES)
    guessing = [dataclasses.replace(params, speculate=i % 3) for i, params in enumerate(EVERYTHING)]
    requests = [llm.engine.request(p, params, RULES) for p, params in zip(PROMPTS, guessing, strict=True)]
    for request in (*requests, *[llm.engine.request(prompt, GREEDY) for prompt in PROMPTS]):
        llm.engine.add(request)
    for _ in range(6):
        llm.engine.step()
    llm.engine.scheduler.preempt_all()
    assert llm.engine.scheduler.num_preemptions > 0
    finish(llm)
    assert nothing_is_lost(llm)
    assert {request.finish_reason for request in requests} == {"stop", "length"}
    for got, other in zip(requests, expected, strict=True):
        assert (got.token_ids, got.finish_reason) == (other.token_ids, other.finish_reason)
        assert len(got.logprobs) == len(got.token_ids) >= 4
        assert len(got.prompt_logprobs) == (len(got.prompt_ids) if got.params.prompt_logprobs is not None else 0)


class Broken:
    """A form that cannot be followed."""

    def start(self) -> Broken:
        return self

    def restrict(self, row: np.ndarray) -> None:
        raise ArgumentError("form: too costly")

    def advance(self, token: int) -> None:
        raise AssertionError("nothing was drawn")


def test_one_that_cannot_be_drawn_for_takes_nobody_along(tiny: Open, alone: list[list[int]]) -> None:
    llm = tiny(max_requests=16)
    requests = [
        llm.engine.request(prompt, params, TokenRules(form=Broken()) if i % 5 == 0 else None)
        for i, (prompt, params) in enumerate(zip(PROMPTS, SAMPLED, strict=True))
    ]
    for request in requests:
        llm.engine.add(request)
    finish(llm)
    for i, request in enumerate(requests):
        assert (request.finish_reason, request.token_ids) == (("error", []) if i % 5 == 0 else ("length", alone[i]))
    assert isinstance(requests[0].error, ArgumentError) and nothing_is_lost(llm)
    with pytest.raises(ArgumentError, match="too costly"):
        list(llm.engine.run(llm.engine.request([1], GREEDY, TokenRules(form=Broken()))))


def test_known_beginnings_answer_as_computed_ones(tiny: Open, alone: list[list[int]]) -> None:
    llm = tiny(max_requests=8)
    for _ in range(2):
        requests = added(llm, SAMPLED)
        finish(llm)
        assert [request.token_ids for request in requests] == alone
    assert all(request.reused_len >= len(request.prompt_ids) - 1 for request in requests)


@pytest.mark.usefixtures("hurry")
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
