"""Draws next tokens: for each row of logits its request's parameters, its random stream, the tokens it has seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.engine.request import Request
from headrace.ops.sampling import sample


def draw(logits: np.ndarray, requests: Sequence[Request]) -> list[int]:
    """The next token of each request, from its row of logits [requests, vocab].

    The n-th draw of a request depends on its seed, n and the row alone, whoever else is drawn for.
    """
    tokens = sample(
        logits,
        [request.params for request in requests],
        seeds=[request.seed for request in requests],
        steps=[len(request.token_ids) for request in requests],
        prompt_ids=[request.prompt_ids for request in requests],
        answer_ids=[request.token_ids for request in requests],
    )
    return tokens.tolist()
