"""Draws a request's next token: its parameters, its own random stream, the tokens it has seen."""

from __future__ import annotations

import secrets

import numpy as np

from headrace.engine.request import Request
from headrace.ops.sampling import sample


class Sampler:
    """One request's draws. The n-th draw depends on the seed, n and the logits alone."""

    def __init__(self, request: Request) -> None:
        self.request = request
        seed = request.params.seed
        self.seed = secrets.randbits(63) if seed is None else seed

    def sample(self, logits: np.ndarray) -> int:
        """The next token for the last row of logits [rows, vocab]."""
        request = self.request
        ids = sample(
            logits[-1:],
            [request.params],
            seeds=[self.seed],
            steps=[len(request.token_ids)],
            prompt_ids=[request.prompt_ids],
            answer_ids=[request.token_ids],
        )
        return int(ids[0])
