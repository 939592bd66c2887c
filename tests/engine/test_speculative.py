"""Guessing ahead: the same text as without, drawn or greedy, whatever is guessed; off by itself where it loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.engine.pace import Pace
from headrace.engine.request import Request
from headrace.engine.speculative import Lookup, Trust, num_accepted
from headrace.ops.sampling import reference
from headrace.token_rules import TokenRules

CHANCE = np.random.default_rng(9)
PROMPTS = [[int(i) for i in CHANCE.integers(0, 300, length)] for length in (3, 40, 66, 12)]
REPEATING = [7, 8, 9, 10, 11, 12] * 8
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
WAYS = {
    "greedy": GREEDY,
    "drawn": replace(GREEDY, temperature=1.3, top_p=0.95, seed=3),
    "penalized": replace(GREEDY, temperature=0.9, seed=4, repetition_penalty=1.3, frequency_penalty=0.4),
}
Open = Callable[..., LLM]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel())
    return lambda **options: LLM(path, **({"kv_dtype": "float32"} | options))


class Guesses:
    """Guesses from a known answer, every `wrong`-th of them wrong."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: int) -> None:
        self.answers, self.wrong, self.count = answers, wrong, 0

    def guess(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        return [self._one(self.answers[tuple(r.prompt_ids)][len(r.token_ids) :][:most]) for r in requests]

    def _one(self, guesses: list[int]) -> list[int]:
        self.count += len(guesses)
        return [(g + 1) % 300 if (self.count + i) % self.wrong == 0 else g for i, g in enumerate(guesses)]


def answers(llm: LLM, params: SamplingParams, prompts: list[list[int]]) -> list[Request]:
    requests = [llm.engine.request(prompt, params) for prompt in prompts]
    for request in requests:
        llm.engine.add(request)
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.prefixes.clear()
    assert llm.engine.pool.num_free == llm.engine.pool.num_pages
    return requests


@pytest.mark.costly
@pytest.mark.parametrize("wrong", [1, 2, 3, 1000])
@pytest.mark.parametrize("way", WAYS)
def test_right_and_wrong_guesses_leave_the_text_as_it_is(tiny: Open, way: str, wrong: int) -> None:
    llm, params = tiny(max_requests=4), WAYS[way]
    plain = [request.token_ids for request in answers(llm, params, PROMPTS)]
    llm.engine.guesser._drafts = Guesses(dict(zip(map(tuple, PROMPTS), plain, strict=True)), wrong)
    guessed = answers(llm, replace(params, speculate=5), PROMPTS)
    assert [request.token_ids for request in guessed] == plain
    assert sum(request.num_guessed for request in guessed) > 0
    if wrong == 1000:
        assert all(request.num_accepted == request.num_guessed for request in guessed)
    if wrong == 1:
        assert not any(request.num_accepted for request in guessed)


@pytest.mark.parametrize("way", WAYS)
def test_guesses_from_earlier_text_leave_the_text_as_it_is(tiny: Open, way: str) -> None:
    llm, params = tiny(), WAYS[way]
    plain, guessed = (llm.generate(REPEATING, replace(params, speculate=most)).token_ids for most in (0, 6))
    assert guessed == plain


def test_an_answer_ends_where_it_would_have_ended(tiny: Open) -> None:
    llm = tiny()
    [plain] = answers(llm, GREEDY, PROMPTS[:1])
    llm.engine.guesser._drafts = Guesses({tuple(PROMPTS[0]): plain.token_ids}, 1000)
    for max_tokens in range(1, 12):
        [short] = answers(llm, replace(GREEDY, max_tokens=max_tokens, speculate=4), PROMPTS[:1])
        assert short.token_ids == plain.token_ids[:max_tokens] and short.finish_reason == "length"
    end = plain.token_ids[9]
    request = llm.engine.request(
        PROMPTS[0], replace(GREEDY, ignore_eos=False, speculate=4), TokenRules(frozenset([end]))
    )
    assert list(llm.engine.run(request)) == plain.token_ids[: plain.token_ids.index(end) + 1]
    assert request.finish_reason == "stop"
    alone = llm.engine.request(PROMPTS[0], replace(GREEDY, ignore_eos=False), TokenRules(frozenset([end])))
    assert list(llm.engine.run(alone)) == request.token_ids and alone.logits_hash == request.logits_hash


def test_a_draft_model_guesses_what_it_would_draw(tmp_path: Any) -> None:
    same = write_tiny_model(tmp_path / "tiny.gguf", TinyModel())
    other = write_tiny_model(tmp_path / "other.gguf", TinyModel(seed=1))
    plain = LLM(same, kv_dtype="float32")
    for draft, way in [(same, "drawn"), (same, "greedy"), (other, "drawn"), (other, "penalized")]:
        llm = LLM(same, kv_dtype="float32", draft_model=draft, max_requests=3)
        guessed = answers(llm, replace(WAYS[way], speculate=3), PROMPTS)
        assert [r.token_ids for r in guessed] == [plain.generate(p, WAYS[way]).token_ids for p in PROMPTS]
        assert all(r.num_accepted == r.num_guessed for r in guessed) == (draft == same)


class Likeliest:
    """Guesses what is likeliest behind an answer, out of a table."""

    def __init__(self, table: dict[tuple[int, ...], int]) -> None:
        self.table = table

    def guess(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        return [self._one(tuple(request.token_ids), most) for request in requests]

    def _one(self, answer: tuple[int, ...], most: int) -> list[int]:
        guesses = list[int]()
        while len(guesses) < most:
            guesses.append(self.table[(*answer, *guesses)])
        return guesses


def answers_of_three(llm: LLM, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every beginning of an answer of three tokens, and how likely the model makes it."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for answer in found_ahead(found, 3):
        probabilities = reference(llm.logits([*PROMPTS[0], *answer])[-1], params)
        for token in np.flatnonzero(probabilities):
            found[(*answer, int(token))] = found[answer] * probabilities[token]
    return found


def found_ahead(found: dict[tuple[int, ...], float], length: int) -> Iterator[tuple[int, ...]]:
    """All answers shorter than that, those included that are found while it goes."""
    for shorter in range(length):
        yield from [answer for answer in found if len(answer) == shorter]


@pytest.mark.slow
def test_guesses_leave_the_distribution_as_it_is(tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of whole answers; it notices when one guess in ten is accepted unseen."""
    monkeypatch.setattr(Trust, "allowed", lambda trust: trust.most)
    monkeypatch.setattr(Pace, "step_s", lambda pace, answers: 1.0)
    llm, count = tiny(max_requests=16), 4000
    params = SamplingParams(max_tokens=3, temperature=4.0, top_k=3, ignore_eos=True, speculate=2)
    found = answers_of_three(llm, params)
    following = {answer[:-1]: int(answer[-1]) for answer in sorted(found, key=found.__getitem__) if answer}
    llm.engine.guesser._drafts = Likeliest(following)
    requests = [llm.engine.request(PROMPTS[0], replace(params, seed=seed)) for seed in range(count)]
    for request in requests:
        llm.engine.add(request)
    while llm.engine.has_work:
        llm.engine.step()
    drawn = Counter(tuple(request.token_ids) for request in requests)
    whole = [answer for answer in found if len(answer) == 3]
    unseen = {a: found[a] / found[a[:2]] * found[a[:1]] * (a[1] == following[a[:1]]) for a in whole}
    faulty = {answer: 0.9 * found[answer] + 0.1 * unseen[answer] for answer in whole}
    assert set(drawn) <= set(whole) and 0 < llm.engine.guesser.num_accepted < llm.engine.guesser.num_guessed
    right, wrong = (
        sum((drawn[answer] - count * table[answer]) ** 2 / (count * table[answer]) for answer in whole)
        for table in (found, faulty)
    )
    freedom = len(whole) - 1  # the mean; the variance is twice that
    assert len(whole) == 27 and right < freedom + 4 * np.sqrt(2 * freedom) < wrong
    for request in requests:
        assert request.num_accepted == sum(request.accepted_at) and request.num_drafts <= 2


def test_a_draft_model_must_have_the_same_tokens(tmp_path: Any) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", TinyModel())
    other = write_tiny_model(tmp_path / "other.gguf", TinyModel(vocab_size=299))
    with pytest.raises(ValueError, match="draft_model: expected a model with the same 300 tokens, got 299"):
        LLM(model, draft_model=other)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_lookup_says_what_followed_the_longest_repeated_end(ids: list[int], most: int) -> None:
    grown = Lookup()
    for length in range(len(ids) + 1):
        text = ids[:length]
        expected: list[int] = []
        for end_len in (4, 3, 2):
            places = [i for i in range(end_len, length) if text[i - end_len : i] == text[length - end_len :]]
            if length > end_len and places:
                expected = text[places[-1] :][:most]
                break
        assert grown.guess(text, most) == expected


def test_guesses_that_do_not_pay_are_rarely_made() -> None:
    trust = Trust(4)
    made = 0
    for _ in range(1000):
        if trust.allowed():
            made += 1
            trust.observe(0, cost=1.5)
    assert made <= 12
    paying = Trust(4)
    for _ in range(100):
        assert paying.allowed() == 4
        paying.observe(2, cost=1.5)


def test_num_accepted() -> None:
    assert num_accepted([1, 2, 3], [1, 2, 4, 9]) == 2
    assert num_accepted([], [5]) == 0 and num_accepted([1], [1, 2]) == 1
