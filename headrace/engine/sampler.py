"""Draws next tokens as the last op of a step: each row's parameters and random stream; edits and penalties after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from headrace.config import SamplingParams
from headrace.engine.row_edits import RowEdits, Text
from headrace.errors import ArgumentError, HeadraceError, NotFiniteError
from headrace.kernels.arrays import Buffer
from headrace.ops.sampling import NO_TOKEN, NOT_DRAWN, is_penalized, sample, sample_rows, settings


class Answer(Protocol):
    """What is drawn for: a request's parameters and its tokens."""

    params: SamplingParams
    seed: int
    prompt_ids: list[int]
    token_ids: list[int]
    edits: RowEdits

    def fail(self, error: HeadraceError) -> None: ...


@dataclass(slots=True)
class Row:
    """A row of logits: the request it is for, and the guesses it has behind its text there."""

    request: Answer
    ahead: tuple[int, ...] = ()

    @property
    def answer_ids(self) -> list[int]:
        """The answer up to here."""
        return [*self.request.token_ids, *self.ahead] if self.ahead else self.request.token_ids

    @property
    def late(self) -> bool:
        """Whether it is drawn after the step: what a request has seen has no fixed length, and its edits are Python."""
        return is_penalized(self.request.params) or bool(self.request.edits)


class Sampler:
    """The draws of a program that leaves these logits: `prepare` before it runs, `drawn` after.

    The n-th draw of a request depends on its seed, n and its row of logits alone, whoever else is drawn for. One whose
    row is not finite, or whose edits or penalties leave nothing to draw from, fails alone; its token means nothing.
    """

    def __init__(self, logits: Buffer) -> None:
        rows = logits.shape[0]
        self._reals, self._integers = settings([SamplingParams(temperature=0)] * rows, [0] * rows, [NOT_DRAWN] * rows)
        self._tokens = np.zeros(rows, np.int32)
        self._requests: list[Answer | None] = [None] * rows  # whose parameters a row has
        self._late = [False] * rows  # whether it is drawn after the step
        sample_rows(logits, [self._reals, self._integers], self._tokens)

    def prepare(self, rows: Sequence[Row | None]) -> None:
        """The next run draws from the first rows of its logits, for these; from None and those behind it does not."""
        draws = [NOT_DRAWN] * len(self._late)
        for place, row in enumerate(rows):
            if row is None:
                continue
            request = row.request
            if self._requests[place] is not request:
                self._settle(place, row)
            if not self._late[place]:
                draws[place] = len(request.token_ids) + len(row.ahead)
        self._integers[:, 2] = draws

    def _settle(self, place: int, row: Row) -> None:
        request = row.request
        reals, integers = settings([request.params], [request.seed], [NOT_DRAWN])
        self._reals[place], self._integers[place] = reals[0], integers[0]
        self._requests[place], self._late[place] = request, row.late

    def drawn(self, logits: np.ndarray, rows: Sequence[Row | None]) -> list[int]:
        """The next token of each, after the run that left these logits [rows, vocab]; they stay as they are."""
        tokens: list[int] = self._tokens[: len(rows)].tolist()
        for place, row in enumerate(rows):
            if row is None:
                continue
            if self._late[place]:
                tokens[place] = _draw_late(logits[place], row)
            elif tokens[place] == NO_TOKEN:
                tokens[place] = 0
                row.request.fail(_not_finite(logits[place]) or ArgumentError("logits: expected a finite one"))
        return tokens


def _draw_late(logits: np.ndarray, row: Row) -> int:
    request, answer_ids, row_of_model = row.request, row.answer_ids, logits
    try:
        if request.edits:
            logits = logits.copy()
            request.edits.apply(logits, Text([*request.prompt_ids, *answer_ids], len(answer_ids), len(row.ahead)))
        tokens = sample(
            logits[None],
            [request.params],
            seeds=[request.seed],
            steps=[len(answer_ids)],
            prompt_ids=[request.prompt_ids],
            answer_ids=[answer_ids],
        )
        return int(tokens[0])
    except HeadraceError as error:
        request.fail(_not_finite(row_of_model) or error)
        return 0


def _not_finite(row: np.ndarray) -> NotFiniteError | None:
    """The error of a row that the model itself spoilt."""
    bad = np.flatnonzero(~np.isfinite(row))
    if not bad.size:
        return None
    return NotFiniteError(f"the model computed {row[bad[0]]} where the logit of token {bad[0]} should be")
