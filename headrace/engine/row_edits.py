"""What a request changes in a row of logits before its token is drawn: biases, DRY, bans, and the form of its answer.

Each costs what it touches, and a request that asks for none of them has none.

    DRY: of a token that would continue a passage of L >= allowed_len tokens which the text ends with and which came
    before, x - multiplier * base^(L - allowed_len) with the longest such L. A passage holds no breaker, and a breaker
    is never penalized. Passages longer than 64 tokens count as 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.config import SamplingParams
from headrace.token_rules import Constraint, TokenRules

LONGEST_PASSAGE = 64
MOST_PENALTY = 1e30  # more would not be finite in a row of float32


@dataclass(frozen=True)
class Text:
    """The text before a token: prompt and answer, the last `num_guessed` tokens of it guessed for now."""

    ids: Sequence[int]
    num_answered: int
    num_guessed: int = 0


Edit = Callable[[np.ndarray, Text], None]


class RowEdits:
    """The edits of one request, in order. They remember its text, so they are no one else's."""

    def __init__(self, params: SamplingParams, rules: TokenRules) -> None:
        self._shifts = list[Edit]()
        self._bans = list[Edit]()
        self.constraint: Constraint | None = rules.form.start() if rules.form else None
        if params.logit_bias:
            self._shifts.append(bias(params.logit_bias))  # type: ignore[arg-type]
        if params.dry_multiplier:
            self._shifts.append(Dry(params, rules.dry_breakers))
        ends = [*params.stop_token_ids, *(() if params.ignore_eos else rules.end_ids)]
        if params.min_tokens and ends:
            self._bans.append(hold_back(ends, params.min_tokens))
        if rules.bad_words:
            self._bans.append(ban_words(rules.bad_words))

    def __bool__(self) -> bool:
        return bool(self._shifts or self._bans or self.constraint)

    def apply(self, row: np.ndarray, text: Text) -> None:
        """Changes the row. Bans that would leave nothing are lifted; the form is kept in any case."""
        for edit in self._shifts:
            edit(row, text)
        before = row.copy() if self._bans else row
        for edit in self._bans:
            edit(row, text)
        self._restrict(row)
        if self._bans and row.max() == -math.inf:
            row[:] = before
            self._restrict(row)

    def _restrict(self, row: np.ndarray) -> None:
        if self.constraint:
            self.constraint.restrict(row)


def bias(pairs: Sequence[tuple[int, float]]) -> Edit:
    """Adds to the logits of some tokens."""
    tokens, biases = np.array([token for token, _ in pairs]), np.array([each for _, each in pairs], np.float32)

    def edit(row: np.ndarray, text: Text) -> None:
        row[tokens] += biases

    return edit


def hold_back(tokens: Sequence[int], min_tokens: int) -> Edit:
    """Bans tokens until the answer has this length."""
    held = np.array(sorted(tokens))

    def edit(row: np.ndarray, text: Text) -> None:
        if text.num_answered < min_tokens:
            row[held] = -np.inf

    return edit


def ban_words(words: Sequence[tuple[int, ...]]) -> Edit:
    """Bans the last token of each word where the answer ends with the others."""
    single = np.array([word[0] for word in words if len(word) == 1], np.int64)
    longer = [(list(word[:-1]), word[-1]) for word in words if len(word) > 1]

    def edit(row: np.ndarray, text: Text) -> None:
        row[single] = -np.inf
        for beginning, last in longer:
            if text.num_answered >= len(beginning) and text.ids[-len(beginning) :] == beginning:
                row[last] = -np.inf

    return edit


class Dry:
    """Subtracts from tokens that would repeat a passage. Keeps the text as an array, which only grows."""

    def __init__(self, params: SamplingParams, breakers: frozenset[int]) -> None:
        self._multiplier, self._base = params.dry_multiplier, params.dry_base
        self._allowed_len = params.dry_allowed_len
        self._breakers = breakers
        self._text = np.zeros(256, np.int32)  # a breaker is -1: equal to nothing that is looked for
        self._len = 0

    def __call__(self, row: np.ndarray, text: Text) -> None:
        self._append(text.ids[self._len :])
        for token, length in self._repeating().items():
            row[token] -= self.penalty(length)
        self._len -= text.num_guessed

    def penalty(self, length: int) -> float:
        """Of a token behind a repeated passage of this length."""
        exponent = (length - self._allowed_len) * math.log(self._base) + math.log(self._multiplier)
        return math.exp(min(exponent, math.log(MOST_PENALTY)))

    def _append(self, new_ids: Sequence[int]) -> None:
        end = self._len + len(new_ids)
        if end > len(self._text):
            self._text = np.resize(self._text, 2 * end)
        self._text[self._len : end] = [-1 if token in self._breakers else token for token in new_ids]
        self._len = end

    def _repeating(self) -> dict[int, int]:
        """Tokens that came behind what the text ends with now, and the longest such passage of each."""
        text, last = self._text[: self._len], self._len - 1
        ends = np.arange(last)  # of passages that the text's end has been compared with so far
        found = dict[int, int]()
        for length in range(1, min(LONGEST_PASSAGE, last) + 1):
            wanted = text[last - length + 1]
            ends = ends[ends >= length - 1]
            ends = ends[text[ends - length + 1] == wanted]
            if wanted < 0 or not len(ends):
                break
            if length >= self._allowed_len:
                found.update(dict.fromkeys(text[ends + 1].tolist(), length))
        found.pop(-1, None)
        return found
