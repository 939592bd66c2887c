"""Draws next tokens: for each row of logits its request's parameters, its random stream, the tokens it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.engine.request import Request
from headrace.ops.sampling import sample


@dataclass(frozen=True)
class Row:
    """A row of logits: the request it is for, and the guesses it has behind its text there."""

    request: Request
    ahead: tuple[int, ...] = ()

    @property
    def answer_ids(self) -> list[int]:
        """The answer up to here."""
        return [*self.request.token_ids, *self.ahead] if self.ahead else self.request.token_ids


def draw(logits: np.ndarray, rows: Sequence[Row]) -> list[int]:
    """The next token of each row of logits [rows, vocab].

    The n-th draw of a request depends on its seed, n and the row alone, whoever else is drawn for.
    """
    requests = [row.request for row in rows]
    answers = [row.answer_ids for row in rows]
    tokens = sample(
        logits,
        [request.params for request in requests],
        seeds=[request.seed for request in requests],
        steps=[len(answer) for answer in answers],
        prompt_ids=[request.prompt_ids for request in requests],
        answer_ids=answers,
    )
    return tokens.tolist()
