"""Several answers to one prompt, and several prompts at once: each is the answer that comes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace import LLM, SamplingParams, talk
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.engine.answers import answer_requests, likeliest
from headrace.engine.logprobs import mean_logprob
from headrace.errors import ArgumentError, PromptTooLongError
from headrace.ops.sampling import derived_seed

CHANCE = np.random.default_rng(6)
PROMPTS = [[int(i) for i in CHANCE.integers(0, 300, length)] for length in (5, 70, 1, 33, 64)]
SAMPLED = SamplingParams(max_tokens=9, temperature=1.2, seed=5, ignore_eos=True)
Open = Callable[..., LLM]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel())

    def open_model(**options: Any) -> LLM:
        return LLM(path, kv_dtype="float32", **options)

    return open_model


def test_seeds_of_answers_are_all_different() -> None:
    seeds = [derived_seed(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(200)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert [derived_seed(seed, 0) for seed in (0, 7)] == [0, 7]


def test_answer_i_is_the_same_whatever_n_is(tiny: Open) -> None:
    llm, prompt = tiny(), PROMPTS[1]
    texts = [[c.token_ids for c in llm.generate(prompt, dataclasses.replace(SAMPLED, n=n)).choices] for n in (1, 3, 5)]
    assert texts[0] == texts[2][:1] and texts[1] == texts[2][:3] and len({*map(tuple, texts[2])}) == 5
    alone = [dataclasses.replace(SAMPLED, seed=derived_seed(5, i)) for i in range(5)]
    assert texts[2] == [tiny().generate(prompt, params).token_ids for params in alone]


def test_the_best_are_the_likeliest(tiny: Open) -> None:
    llm, params = tiny(), dataclasses.replace(SAMPLED, n=2, best_of=6)
    completion = llm.generate(PROMPTS[0], params)
    everything = llm.generate(PROMPTS[0], dataclasses.replace(SAMPLED, n=6, logprobs=0)).choices
    ranked = sorted(everything, key=lambda choice: -mean_logprob(choice.logprobs or []))
    assert [choice.token_ids for choice in completion.choices] == [choice.token_ids for choice in ranked[:2]]
    assert completion.logprobs is None and completion.token_ids == ranked[0].token_ids
    assert llm.engine.pool.num_spare == len(llm.engine.prefixes)


def test_prompt_logprobs_are_computed_once(tiny: Open) -> None:
    llm = tiny()
    requests = answer_requests(llm.engine, PROMPTS[3], dataclasses.replace(SAMPLED, n=3, prompt_logprobs=1))
    llm.engine.add(requests[0])
    while llm.engine.has_work:
        llm.engine.step()
    assert [len(each.prompt_logprobs) for each in requests] == [33, 0, 0]
    assert likeliest(requests, 3) == requests


def test_a_list_of_prompts_is_answered_as_each_of_them_alone(tiny: Open) -> None:
    params = [dataclasses.replace(SAMPLED, seed=i, n=1 + i % 2, logprobs=1) for i in range(len(PROMPTS))]
    told = list[tuple[str, int, int | None]]()
    llm = tiny(max_requests=3)
    together = llm.generate(PROMPTS, params, progress=lambda *news: told.append(news))
    alone = [tiny().generate(prompt, each) for prompt, each in zip(PROMPTS, params, strict=True)]
    for got, expected in zip(together, alone, strict=True):
        assert got.prompt_token_ids == expected.prompt_token_ids
        assert [c.token_ids for c in got.choices] == [c.token_ids for c in expected.choices]
        assert [c.text for c in got.choices] == [c.text for c in expected.choices] and got.text == got.choices[0].text
        assert got.logprobs is not None and [each.token_id for each in got.logprobs] == got.token_ids
    assert told[-1] == ("answering", 7, 7) and [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert [c.text for c in llm.generate(["a b", "c"], SAMPLED)] == [
        llm.generate(p, SAMPLED).text for p in ("a b", "c")
    ]


def test_a_list_shows_how_far_it_is_on_a_terminal_alone(
    tiny: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = tiny()
    monkeypatch.setattr(talk, "_QUIET_S", 0.0)
    monkeypatch.setattr(talk, "_TERMINAL_PERIOD_S", 0.0)
    llm.generate(PROMPTS, SAMPLED)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(talk.sys.stderr, "isatty", lambda: True)
    llm.generate(PROMPTS, SAMPLED, progress=False)
    llm.generate(PROMPTS[0], SAMPLED)
    assert capsys.readouterr() == ("", "")
    llm.generate(PROMPTS, SAMPLED)
    out, err = capsys.readouterr()
    assert out == "" and "\ranswering 0%" in err and "\ranswering 100%" in err and err.endswith(" \r")


def test_a_stop_string_ends_one_answer_alone(tiny: Open) -> None:
    llm = tiny()
    plain = llm.generate(PROMPTS[0], SAMPLED)
    middle = plain.text[len(plain.text) // 2 :][:3]
    for speculate in (0, 4):
        params = dataclasses.replace(SAMPLED, stop=(middle,), speculate=speculate, logprobs=0)
        stopped, other = llm.generate([PROMPTS[0]] * 2, [params, SAMPLED])
        assert stopped.text == plain.text[: plain.text.index(middle)] and stopped.finish_reason == "stop"
        assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)] and stopped.logits_hash
        assert len(stopped.logprobs or []) == len(stopped.token_ids) and other.text == plain.text


def test_one_wrong_prompt_leaves_nothing_behind(tiny: Open) -> None:
    llm = tiny()
    for prompts, error in (
        ([[1], [300]], ArgumentError),
        ([[1], [1] * 256], PromptTooLongError),
        ([[1], []], ArgumentError),
    ):
        with pytest.raises(error):
            llm.generate(prompts, SAMPLED)
        assert not llm.engine.has_work
    with pytest.raises(ArgumentError, match="params: expected one, or 2 for as many prompts, got 3"):
        llm.generate([[1], [2]], [SAMPLED] * 3)


def test_a_stream_is_of_one_answer(tiny: Open) -> None:
    with pytest.raises(ArgumentError, match="n: expected 1"):
        tiny().stream(PROMPTS[0], dataclasses.replace(SAMPLED, n=2))
    with pytest.raises(ArgumentError, match="best_of: expected 1"):
        tiny().stream(PROMPTS[0], dataclasses.replace(SAMPLED, best_of=2))


@pytest.mark.parametrize("speculate", [0, 4])
def test_nothing_is_lost_of_tokens_that_come_together(tiny: Open, speculate: int) -> None:
    llm, params = tiny(), SamplingParams(max_tokens=30, ignore_eos=True, speculate=speculate)
    plain = llm.generate([7, 8, 9] * 9, params)
    end = plain.token_ids[25]
    ended = dataclasses.replace(params, stop_token_ids=(end,))
    stream = llm.stream([7, 8, 9] * 9, ended)
    shown = "".join(piece.text for piece in stream)
    count = plain.token_ids.index(end)
    assert stream.completion.token_ids == plain.token_ids[: count + 1]
    assert shown == llm.tokenizer.decode(plain.token_ids[:count], skip_special=True) or count == 0
