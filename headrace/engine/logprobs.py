"""Log-probabilities of tokens: of the model's own distribution, the softmax of its logits at temperature 1.

Biases, penalties, bans and filters come later and are not in it, so an answer's logprobs say what the model thought of
it, however it was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headrace.kernels.numpy.logprobs import of_row

if TYPE_CHECKING:
    from headrace.engine.request import Request


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability, and (id, log-probability) of the likeliest, falling, equal ones by rising id."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: np.ndarray, token: int, num_top: int) -> TokenLogprobs:
    """Those of one row of logits [vocab]; a vocabulary of fewer than `num_top` tokens is told whole."""
    own, ids, top = of_row(logits, token, num_top)
    return TokenLogprobs(token, own, tuple(zip(ids.tolist(), top.tolist(), strict=True)))


def note_logprobs(rows: np.ndarray, request: Request, tokens: Sequence[int]) -> None:
    """Keeps the logprobs of drawn tokens, from their rows of logits, for a request that asked for them."""
    if request.params.logprobs is not None:
        for row, token in zip(rows, tokens, strict=False):
            request.logprobs.append(token_logprobs(row, token, request.params.logprobs))


def score_prompt(rows: np.ndarray, request: Request) -> None:
    """Keeps the logprobs of prompt tokens. rows: of the last tokens that have been computed."""
    end = len(request.sequence.ids)
    for row, token in zip(rows, request.prompt_ids[end - len(rows) + 1 :], strict=False):
        request.prompt_logprobs.append(token_logprobs(row, token, request.params.prompt_logprobs or 0))


def mean_logprob(logprobs: list[TokenLogprobs]) -> float:
    """How likely the model finds an answer, per token; -inf for one without tokens."""
    return sum(each.logprob for each in logprobs) / len(logprobs) if logprobs else -math.inf
