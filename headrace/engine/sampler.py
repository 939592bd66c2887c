"""Draws next tokens as the last op of a step: each row's parameters and random stream; penalties after the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from headrace.config import SamplingParams
from headrace.kernels.cpu.arrays import Buffer
from headrace.ops.sampling import NOT_DRAWN, is_penalized, sample, sample_rows, settings


class Answer(Protocol):
    """What is drawn for: a request's parameters and its tokens."""

    params: SamplingParams
    seed: int
    prompt_ids: list[int]
    token_ids: list[int]


@dataclass(frozen=True)
class Row:
    """A row of logits: the request it is for, and the guesses it has behind its text there."""

    request: Answer
    ahead: tuple[int, ...] = ()

    @property
    def answer_ids(self) -> list[int]:
        """The answer up to here."""
        return [*self.request.token_ids, *self.ahead] if self.ahead else self.request.token_ids


class Sampler:
    """The draws of a program that leaves these logits: `prepare` before it runs, `drawn` after.

    The n-th draw of a request depends on its seed, n and its row of logits alone, whoever else is drawn for.
    """

    def __init__(self, logits: Buffer) -> None:
        rows = logits.shape[0]
        self._reals, self._integers = settings([SamplingParams(temperature=0)] * rows, [0] * rows, [NOT_DRAWN] * rows)
        self._tokens = np.zeros(rows, np.int32)
        self._requests: list[Answer | None] = [None] * rows  # whose parameters a row has
        sample_rows(logits, [self._reals, self._integers], self._tokens)

    def prepare(self, rows: Sequence[Row]) -> None:
        """The next run draws from the first rows of its logits, for these; from those behind them it does not."""
        self._integers[:, 2] = NOT_DRAWN
        for place, row in enumerate(rows):
            request = row.request
            if is_penalized(request.params):
                continue  # what a request has seen has no fixed length
            if self._requests[place] is not request:
                reals, integers = settings([request.params], [request.seed], [0])
                self._reals[place], self._integers[place] = reals[0], integers[0]
                self._requests[place] = request
            self._integers[place, 2] = len(request.token_ids) + len(row.ahead)

    def drawn(self, logits: np.ndarray, rows: Sequence[Row]) -> list[int]:
        """The next token of each, after the run that left these logits [rows, vocab]."""
        tokens: list[int] = self._tokens[: len(rows)].tolist()
        for place, row in enumerate(rows):
            if is_penalized(row.request.params):
                tokens[place] = _draw_penalized(logits[place : place + 1], row)
        return tokens


def _draw_penalized(logits: np.ndarray, row: Row) -> int:
    request, answer_ids = row.request, row.answer_ids
    tokens = sample(
        logits,
        [request.params],
        seeds=[request.seed],
        steps=[len(answer_ids)],
        prompt_ids=[request.prompt_ids],
        answer_ids=[answer_ids],
    )
    return int(tokens[0])
