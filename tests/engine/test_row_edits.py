"""What is done to a row of logits before its draw: each edit does what its formula says, in any text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import SamplingParams
from headrace.engine.row_edits import LONGEST_PASSAGE, MOST_PENALTY, RowEdits, Text
from headrace.token_rules import TokenRules

VOCAB = 12
texts = st.lists(st.integers(0, 3), max_size=40)


def edited(
    params: SamplingParams, rules: TokenRules, ids: Sequence[int], num_answered: int = 0, row: np.ndarray | None = None
) -> np.ndarray:
    row = np.zeros(VOCAB, np.float32) if row is None else row
    RowEdits(params, rules).apply(row, Text(ids, num_answered))
    return row


def passage_len(text: Sequence[int], end: int, breakers: frozenset[int]) -> int:
    """How long a passage ending at `end` is the end of the text too."""
    length = 0
    while length <= end and text[end - length] == text[-1 - length] and text[-1 - length] not in breakers:
        length += 1
    return min(length, LONGEST_PASSAGE)


def dry_reference(text: Sequence[int], params: SamplingParams, breakers: frozenset[int]) -> np.ndarray:
    x = np.zeros(VOCAB)
    for end in range(len(text) - 1):
        length, token = passage_len(text, end, breakers), text[end + 1]
        if length >= params.dry_allowed_len and token not in breakers:
            x[token] = min(x[token], -params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_len))
    return x


@given(texts, st.integers(1, 4), st.sampled_from([frozenset(), frozenset({0}), frozenset({1, 3})]))
def test_dry_is_its_formula(text: list[int], allowed_len: int, breakers: frozenset[int]) -> None:
    params = SamplingParams(dry_multiplier=0.8, dry_allowed_len=allowed_len, dry_base=1.25)
    exact = dry_reference(text, params, breakers)
    got = edited(params, TokenRules(dry_breakers=breakers), text)
    assert np.max(np.abs(got - exact)) <= 4 * 2.0**-24 * np.max(np.abs(exact))


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_dry_remembers_the_text_it_has_seen_and_no_guesses(pieces: list[tuple[list[int], list[int]]]) -> None:
    params, rules = SamplingParams(dry_multiplier=1.0), TokenRules(dry_breakers=frozenset({2}))
    edits, text = RowEdits(params, rules), list[int]()
    for piece, guesses in pieces:
        text += piece
        for num_guessed in range(len(guesses) + 1):
            row, guessed = np.zeros(VOCAB, np.float32), [*text, *guesses[:num_guessed]]
            edits.apply(row, Text(guessed, 0, num_guessed))
            assert np.array_equal(row, edited(params, rules, guessed))


def test_dry_of_a_text_that_repeats_itself_stays_finite() -> None:
    params = SamplingParams(dry_multiplier=1e30, dry_base=1e9)
    row = edited(params, TokenRules(), [1] * 5000)
    assert row[1] == np.float32(-MOST_PENALTY) and not row[[0, 2]].any()


def test_biases_are_added() -> None:
    row = edited(SamplingParams(logit_bias={3: 1.5, 7: -100}), TokenRules(), [1])
    assert row[3] == 1.5 and row[7] == -100 and np.count_nonzero(row) == 2


def test_ends_are_held_back_until_the_answer_is_long_enough() -> None:
    params, rules = SamplingParams(min_tokens=3, stop_token_ids=(5,)), TokenRules(end_ids=frozenset({7}))
    for num_answered in range(5):
        row = edited(params, rules, [1] * 5, num_answered)
        assert np.flatnonzero(row == -np.inf).tolist() == ([5, 7] if num_answered < 3 else [])
    row = edited(dataclasses.replace(params, ignore_eos=True), rules, [1])
    assert np.flatnonzero(row == -np.inf).tolist() == [5]


@given(texts, st.integers(0, 40))
def test_no_banned_word_can_be_completed(text: list[int], num_answered: int) -> None:
    words = ((9,), (1, 2), (1, 1, 3), (0, 0, 0, 0))
    answer = text[len(text) - min(num_answered, len(text)) :]
    row = edited(SamplingParams(), TokenRules(bad_words=words), text, len(answer))
    expected = {word[-1] for word in words if answer[len(answer) - len(word) + 1 :] == list(word[:-1])}
    expected -= {word[-1] for word in words if len(word) - 1 > len(answer)}
    assert set(np.flatnonzero(row == -np.inf)) == expected


def test_bans_that_leave_nothing_are_lifted() -> None:
    every = TokenRules(bad_words=tuple((token,) for token in range(VOCAB)))
    assert not edited(SamplingParams(), every, [1]).any()


class Only:
    """A form, and a constraint, that allows some tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def start(self) -> Only:
        return self

    def restrict(self, row: np.ndarray) -> None:
        kept = row[self.tokens].copy()
        row[:] = -np.inf
        row[self.tokens] = kept

    def advance(self, token: int) -> None:
        pass


def test_the_form_stays_when_bans_are_lifted() -> None:
    rules = TokenRules(bad_words=((4,), (5,)), form=Only(4, 5))
    assert np.flatnonzero(edited(SamplingParams(), rules, [1]) == 0).tolist() == [4, 5]
    rules = dataclasses.replace(rules, form=Only(4, 6))
    assert np.flatnonzero(edited(SamplingParams(), rules, [1]) == 0).tolist() == [6]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5, presence_penalty=1.0)])
def test_who_asks_for_nothing_has_nothing(params: SamplingParams) -> None:
    assert not RowEdits(params, TokenRules(end_ids=frozenset({1})))
    assert math.isfinite(edited(params, TokenRules(), [1]).sum())
