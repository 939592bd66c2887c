"""The pace of steps: while a long prompt enters, answers wait at most twice as long for their next tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, median

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
    most, tried = int(0.8 / share * (1 - 1e-9)), [count for count in counts if count]
    assert all(now >= min(most, 2 * before) for before, now in pairwise(tried[:-1]))


@given(seconds, st.floats(0.02, 0.1))
def test_deeper_tokens_which_take_longer_are_fewer_a_step(alone_s: float, share: float) -> None:
    depth = 0

    def deeper_s(tokens: int) -> float:
        nonlocal depth
        depth += tokens
        return tokens * share * alone_s * (1 + 4 * depth / PROMPT_LEN)

    _, *others = entering(alone_s, deeper_s)
    assert all(taken_s <= 2.2 * alone_s for _, taken_s in others)  # prices lag, by half of what is remembered


@given(seconds, shares)
def test_now_and_then_a_step_tells_what_answers_take_alone(alone_s: float, share: float) -> None:
    counts = [tokens for tokens, _ in entering(alone_s, lambda tokens: tokens * share * alone_s)]
    assert counts.count(0) == (len(counts) - 1) // 65


@given(seconds, st.floats(1e-3, 1.0))
def test_tokens_computed_in_tiles_hold_answers_up_by_a_tile_more_at_most(alone_s: float, share: float) -> None:
    _, *others = entering(alone_s, lambda tokens: -(-tokens // TILE) * share * alone_s)
    assert all(taken_s <= (2 + share) * alone_s * (1 + 1e-9) for _, taken_s in others)


@pytest.mark.parametrize("seed", range(20))
def test_prompts_enter_on_a_machine_that_others_use_too(seed: int) -> None:
    counts = [tokens for tokens, _ in beside_others(seed) if tokens]
    assert min(counts) >= 1 and fmean(counts) >= 3  # 16 where nothing disturbs


def test_answers_wait_no_longer_on_a_machine_that_others_use_too() -> None:
    """Taken together: a single run is as lucky as its noise."""
    taken = [seconds for seed in range(20) for _, seconds in beside_others(seed)]
    alone = [noisy_s(random.Random(seed), 0) for seed in range(1000)]
    assert median(taken) <= 2 * median(alone)


def noisy_s(chance: random.Random, prompt_tokens: int) -> float:
    return (0.01 + 0.0005 * prompt_tokens) * (1 + 3 * chance.expovariate(1))


def beside_others(seed: int) -> list[tuple[int, float]]:
    """(prompt tokens, seconds) of steps that noise makes up to several times longer."""
    chance, pace, steps = random.Random(seed), Pace(), list[tuple[int, float]]()
    for _ in range(20):
        pace.observe(ANSWERS, 0, noisy_s(chance, 0))
    for _ in range(200):
        tokens = pace.prompt_tokens(ANSWERS)
        steps.append((tokens, noisy_s(chance, tokens)))
        pace.observe(ANSWERS, *steps[-1])
    return steps


def test_as_many_answers_as_never_before_take_a_step_alone_first() -> None:
    pace = Pace()
    pace.observe(16, 0, 1.0)
    pace.observe(16, 10, 1.1)
    assert pace.prompt_tokens(18) > 0 == pace.prompt_tokens(5)
    pace.observe(5, 0, 0.5)
    assert pace.prompt_tokens(5) == 20


def test_a_slow_moment_changes_nothing() -> None:
    pace = Pace()
    for _ in range(9):
        pace.observe(4, 0, 1.0)
        pace.observe(4, 10, 1.1)
    before = pace.prompt_tokens(4)
    for _ in range(3):
        pace.observe(4, 10, 50.0)
        pace.observe(4, 0, 50.0)
    assert pace.prompt_tokens(4) == before == 20


def test_what_holds_from_now_on_is_learned() -> None:
    pace = Pace()
    for _ in range(9):
        pace.observe(4, 0, 1.0)
        pace.observe(4, 10, 1.1)
    for _ in range(16):
        pace.observe(4, 10, 3.0)
    assert pace.prompt_tokens(4) == 4
