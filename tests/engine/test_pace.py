"""The pace of steps: while a long prompt enters, answers wait at most twice as long for their next tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.pace import Pace

PROMPT_LEN, TILE, ANSWERS = 4096, 16, 5
seconds = st.floats(1e-4, 1.0)
shares = st.floats(1e-3, 1 / ANSWERS)  # what a token takes, of a step of answers: no more than each of these


def entering(alone_s: float, cost_s: Callable[[int], float]) -> list[tuple[int, float]]:
    """(prompt tokens, seconds) of the steps in which a prompt enters beside answers that take `alone_s` a step."""
    pace, left, steps = Pace(), PROMPT_LEN, list[tuple[int, float]]()
    pace.observe(ANSWERS, 0, alone_s)
    while left:
        tokens = min(left, pace.prompt_tokens(ANSWERS))
        steps.append((tokens, alone_s + cost_s(tokens)))
        pace.observe(ANSWERS, *steps[-1])
        left -= tokens
    return steps


@given(seconds, shares)
def test_a_step_with_a_prompt_takes_at_most_twice_as_long(alone_s: float, share: float) -> None:
    first, *others = entering(alone_s, lambda tokens: tokens * share * alone_s)
    assert first[0] == 8  # nothing is known of a prompt's tokens yet
    assert all(taken_s <= 2 * alone_s * (1 + 1e-9) for _, taken_s in others)


@given(seconds, shares)
def test_a_prompt_enters_as_fast_as_that_allows(alone_s: float, share: float) -> None:
    counts = [tokens for tokens, _ in entering(alone_s, lambda tokens: tokens * share * alone_s)]
    most = int(0.8 / share * (1 - 1e-9))
    assert all(now >= min(most, 2 * before) for before, now in pairwise(counts[:-1]))


@given(seconds, st.floats(1e-3, 1.0))
def test_tokens_computed_in_tiles_hold_answers_up_by_a_tile_more_at_most(alone_s: float, share: float) -> None:
    _, *others = entering(alone_s, lambda tokens: -(-tokens // TILE) * share * alone_s)
    assert all(taken_s <= (2 + share) * alone_s * (1 + 1e-9) for _, taken_s in others)


@pytest.mark.parametrize("seed", range(20))
def test_prompts_enter_on_a_machine_that_others_use_too(seed: int) -> None:
    chance = random.Random(seed)

    def noisy_s(prompt_tokens: int) -> float:
        return (0.01 + 0.0005 * prompt_tokens) * (1 + 3 * chance.expovariate(1))

    pace, counts = Pace(), list[int]()
    for _ in range(20):
        pace.observe(ANSWERS, 0, noisy_s(0))
    for _ in range(200):
        counts.append(pace.prompt_tokens(ANSWERS))
        pace.observe(ANSWERS, counts[-1], noisy_s(counts[-1]))
    assert min(counts) >= ANSWERS and fmean(counts) >= 6  # 16 where nothing disturbs


def test_a_slow_moment_is_forgotten() -> None:
    pace = Pace()
    pace.observe(4, 0, 1.0)
    for _ in range(60):
        pace.observe(4, 10, 1.1)
    before = pace.prompt_tokens(4)
    pace.observe(4, 10, 50.0)
    assert pace.prompt_tokens(4) == 4 < before
    for _ in range(60):
        pace.observe(4, 10, 1.1)
    assert pace.prompt_tokens(4) == before
