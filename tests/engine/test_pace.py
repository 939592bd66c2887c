"""The pace of steps: while a long prompt enters, answers wait at most twice as long for their next tokens."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.pace import Pace

PROMPT_LEN, TILE = 4096, 16
seconds = st.floats(1e-5, 1.0)


def entering(alone_s: float, cost_s: Callable[[int], float], answers: int = 5) -> list[tuple[int, float]]:
    """(prompt tokens, seconds) of the steps in which a prompt enters beside answers that take `alone_s` a step."""
    pace, left, steps = Pace(), PROMPT_LEN, list[tuple[int, float]]()
    pace.observe(answers, 0, alone_s)
    while left:
        tokens = min(left, pace.prompt_tokens(answers))
        steps.append((tokens, alone_s + cost_s(tokens)))
        pace.observe(answers, *steps[-1])
        left -= tokens
    return steps


@given(seconds, seconds)
def test_a_step_with_a_prompt_takes_at_most_twice_as_long(alone_s: float, token_s: float) -> None:
    first, *others = entering(alone_s, lambda tokens: tokens * token_s)
    assert first[0] == 8  # nothing is known of a prompt's tokens yet
    slowest = max(2 * alone_s, alone_s + token_s)  # one token enters in any case
    assert all(taken_s <= slowest * (1 + 1e-9) for _, taken_s in others)


@given(seconds, seconds)
def test_a_prompt_enters_as_fast_as_that_allows(alone_s: float, token_s: float) -> None:
    steps = entering(alone_s, lambda tokens: tokens * token_s)
    most = max(int(alone_s / token_s * (1 - 1e-9)), 1)
    assert all(tokens >= most for tokens, _ in steps[1:-1])


@given(seconds, seconds)
def test_tokens_computed_in_tiles_hold_answers_up_by_a_tile_more_at_most(alone_s: float, tile_s: float) -> None:
    _, *others = entering(alone_s, lambda tokens: -(-tokens // TILE) * tile_s)
    assert all(taken_s <= 2 * alone_s + tile_s * (1 + 1e-9) for _, taken_s in others)


def test_a_slow_moment_is_forgotten() -> None:
    pace = Pace()
    pace.observe(4, 0, 1.0)
    pace.observe(4, 10, 1.1)
    before = pace.prompt_tokens(4)
    pace.observe(4, 10, 50.0)
    assert pace.prompt_tokens(4) < before
    for _ in range(60):
        pace.observe(4, 10, 1.1)
    assert pace.prompt_tokens(4) >= before - 1
