"""Logprobs: the model's distribution in double precision, its likeliest tokens, for answers and prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.engine.logprobs import mean_logprob, token_logprobs
from headrace.engine.request import Request
from headrace.kernels.numpy.logprobs import largest

PROMPT = [int(i) for i in np.random.default_rng(8).integers(0, 300, 150)]
Open = Callable[..., LLM]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel())

    def open_model(**options: Any) -> LLM:
        return LLM(path, kv_dtype="float32", **options)

    return open_model


def reference(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=700), st.integers(1, 30))
def test_the_largest_are_those_of_a_stable_sort(values: list[int], count: int) -> None:
    x = np.array(values, np.float32)
    assert largest(x, count).tolist() == np.argsort(-x, kind="stable")[:count].tolist()


@pytest.mark.parametrize("vocab,spread", [(1, 1.0), (63, 3.0), (64, 0.0), (1000, 30.0), (49152, 2.0)])
def test_logprobs_are_those_of_the_softmax(vocab: int, spread: float) -> None:
    x = (np.random.default_rng(vocab).standard_normal(vocab) * spread).astype(np.float32)
    exact, token = reference(x), vocab // 2
    got = token_logprobs(x, token, 5)
    assert got.token_id == token and len(got.top) == min(5, vocab)
    # Weights and their sum are rounded to float32, and so is the largest logit's distance from each of the others.
    allowed = 2.0**-23 * (4 + np.max(np.abs(exact)))
    for i, logprob in ((token, got.logprob), *got.top):
        assert abs(logprob - exact[i]) <= allowed
    assert [i for i, _ in got.top] == np.argsort(-x, kind="stable")[:5].tolist()


def answered(llm: LLM, prompt: list[int], params: SamplingParams) -> Request:
    request = llm.engine.request(prompt, params)
    llm.engine.add(request)
    while llm.engine.has_work:
        llm.engine.step()
    return request


def assert_alike(got: list[Any], expected: np.ndarray, ids: list[int]) -> None:
    """The logprobs of these tokens, from rows of logits that another run computed."""
    assert [each.token_id for each in got] == ids
    for each, row in zip(got, expected, strict=True):
        exact = reference(row)
        assert abs(each.logprob - exact[each.token_id]) <= 1e-3  # of logits, as everywhere on these models
        assert [i for i, _ in each.top] == largest(row, len(each.top)).tolist()


def test_answers_have_the_models_own_logprobs_however_they_are_drawn(tiny: Open) -> None:
    llm = tiny()
    for params in (
        SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3),
        SamplingParams(max_tokens=8, temperature=2.0, seed=1, top_k=40, logit_bias={7: 50.0}, bad_words=(), logprobs=3),
    ):
        request = answered(llm, PROMPT[:20], params)
        rows = llm.logits(request.ids)[len(request.prompt_ids) - 1 : -1]
        assert_alike(request.logprobs, rows, request.token_ids)
    assert 7 in request.token_ids and mean_logprob(request.logprobs) < -1
    assert answered(llm, PROMPT[:20], SamplingParams(max_tokens=2)).logprobs == []


@pytest.mark.parametrize("prompt_len", [1, 2, 64, 65, 150])
@pytest.mark.parametrize("chunk_len", [16, 512])
def test_prompts_have_logprobs_whatever_the_cache_holds(tiny: Open, prompt_len: int, chunk_len: int) -> None:
    llm, prompt = tiny(chunk_len=chunk_len, max_requests=3), PROMPT[:prompt_len]
    rows = tiny().logits(prompt)
    for params in (SamplingParams(max_tokens=3, prompt_logprobs=2),) * 2:
        request = answered(llm, prompt, params)
        assert request.prompt_logprobs[0] is None and request.reused_len == 0
        assert_alike(request.prompt_logprobs[1:], rows[:-1], prompt[1:])


def test_scored_prompts_change_nobodys_answer(tiny: Open) -> None:
    plain = [SamplingParams(max_tokens=9, temperature=1.3, seed=i, ignore_eos=True) for i in range(6)]
    scored = [
        SamplingParams(max_tokens=9, temperature=1.3, seed=i, ignore_eos=True, prompt_logprobs=1) for i in range(6)
    ]
    prompts = [PROMPT[7 * i : 7 * i + length] for i, length in enumerate((80, 3, 100, 64, 1, 90))]
    alone = [answered(tiny(), prompt, params) for prompt, params in zip(prompts, scored, strict=True)]
    for given_params in (plain, scored, [*plain[:3], *scored[3:]]):
        llm = tiny(max_requests=4, kv_cache_bytes=256 * 512)  # so little that some have to make room
        requests = [llm.engine.request(p, params) for p, params in zip(prompts, given_params, strict=True)]
        for request in requests:
            llm.engine.add(request)
        while llm.engine.has_work:
            llm.engine.step()
        for request, expected in zip(requests, alone, strict=True):
            assert request.token_ids == expected.token_ids
            if request.prompt_logprobs:
                got = [each.token_id for each in request.prompt_logprobs[1:] if each]
                assert got == request.prompt_ids[1:]
