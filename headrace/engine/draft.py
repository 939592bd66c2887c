"""A draft model: a smaller one with the same tokens that guesses what the model will draw.

It draws with the parameters and random numbers that are due in the answer, so a guess is right as often as the two
models' draws agree. It has pages of its own; what it computed of a request's text is kept between steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.config import EngineConfig, ModelConfig
from headrace.engine.request import Request
from headrace.engine.runner import Runner
from headrace.engine.sampler import Row
from headrace.engine.sequence import CachedSequence, NewTokens, run_step
from headrace.errors import CapacityError
from headrace.kernels.cpu import _native as native
from headrace.kv_cache.pages import PagePool
from headrace.kv_cache.prefix import common_len
from headrace.kv_cache.storage import pages_that_fit
from headrace.models.layers import ModelWeights


class DraftModel:
    """Guesses for many requests at once."""

    def __init__(self, weights: ModelWeights, config: ModelConfig, engine: EngineConfig, pool: native.Pool) -> None:
        self._context_len = engine.context_len or config.context_len
        self._chunk_len, self._page_size = engine.chunk_len, engine.page_size
        num_pages = pages_that_fit(config, engine, self._context_len)
        self._pool = PagePool(num_pages)
        self._runner = Runner(weights, config, engine, pool, num_pages)
        self._sequences: dict[Request, CachedSequence] = {}

    def guess(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Up to `most` tokens for each request, fewer at the end of its context and where pages run out."""
        self._forget([request for request in self._sequences if request.finish_reason])
        guesses: list[list[int]] = [[] for _ in requests]
        try:
            self._add(requests, guesses, most)
        except CapacityError:
            self._forget(list(self._sequences))
        return guesses

    def _add(self, requests: Sequence[Request], guesses: list[list[int]], most: int) -> None:
        for count in range(most):
            going = [i for i, r in enumerate(requests) if len(r.ids) + count < self._context_len]
            if not going:
                break
            rows = [Row(requests[i], tuple(guesses[i])) for i in going]
            self._runner.sampler.prepare(rows)
            logits = self._logits([requests[i] for i in going], rows)
            for i, token in zip(going, self._runner.sampler.drawn(logits, rows), strict=True):
                guesses[i].append(token)

    def _logits(self, requests: Sequence[Request], rows: Sequence[Row]) -> np.ndarray:
        """Of each row's text, its guesses included."""
        parts = []
        for request, row in zip(requests, rows, strict=True):
            text = [*request.ids, *row.ahead]
            sequence = self._sequences.setdefault(request, CachedSequence())
            known_len = min(common_len(sequence.ids, text), len(text) - 1)
            sequence.forget(known_len, self._pool, self._page_size)
            self._fill(sequence, text[:-1])
            parts.append(NewTokens(sequence, text[-1:]))
        return run_step(self._runner, self._pool, parts)

    def _fill(self, sequence: CachedSequence, ids: list[int]) -> None:
        while missing := ids[len(sequence.ids) :][: self._chunk_len]:
            run_step(self._runner, self._pool, [NewTokens(sequence, missing, 0)])

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._sequences.pop(request).forget(0, self._pool, self._page_size)
