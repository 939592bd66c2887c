"""Embeds a text in pieces, between which the steps of answers come: they take turns of equal length.

A piece reads the weights again, so beside answers even one token costs what a step costs. Pieces are as long as fits
into the time of a step, and none comes before the steps since the last one took as long as it did: so answers take at
most twice as long as alone, in the mean, however long the text is. Where nobody answers pieces are chunks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from time import perf_counter
from typing import Protocol

import numpy as np

from headrace.engine.embedder import Embedder
from headrace.engine.sequence import CachedSequence, NewTokens, run_step
from headrace.kv_cache.pages import PagePool, pages_needed

_FIRST_TOKENS = 8  # of a piece beside answers, before anything is known


class Answers(Protocol):
    """What runs meanwhile."""

    busy_s: float  # that its steps have taken so far

    def step_s(self) -> float | None:
        """What a step of answers alone takes now, 0 where nobody knows; None where nobody answers."""
        ...


class Turns:
    """How long pieces are, and when the next one may come."""

    def __init__(self, answers: Answers, chunk_len: int) -> None:
        self._answers, self._chunk_len = answers, chunk_len
        self._tokens, self._seconds, self._busy_s = _FIRST_TOKENS, 0.0, answers.busy_s

    @property
    def next_len(self) -> int:
        """Tokens of the next piece."""
        return self._chunk_len if self._answers.step_s() is None else self._tokens

    @property
    def due(self) -> bool:
        """Whether it may come now."""
        return self._answers.step_s() is None or self._answers.busy_s - self._busy_s >= self._seconds

    def took(self, tokens: int, seconds: float) -> None:
        """A piece was computed."""
        self._seconds, self._busy_s = seconds, self._answers.busy_s
        step_s = self._answers.step_s()
        if step_s:
            self._tokens = max(1, min(self._chunk_len, int(tokens * step_s / max(seconds, 1e-9))))


def embedding(
    embedder: Embedder, pool: PagePool, ids: Sequence[int], pooling: str, turns: Turns | None
) -> Generator[None, None, np.ndarray]:
    """The mean of the last hidden states of a text, or the last one: float32 [dim]. Yields where steps may come in.

    turns: None where none come. Pages are taken at once. CapacityError where there are not enough.
    """
    chunk_len, page_size = len(embedder.batch.token_ids), embedder.batch.page_size
    sequence = CachedSequence(pages=pool.allocate(pages_needed(len(ids), page_size)))
    total, first = np.zeros(1), 0
    try:
        while first < len(ids):
            chunk, started = ids[first : first + (turns.next_len if turns else chunk_len)], perf_counter()
            rows = run_step(embedder, pool, [NewTokens(sequence, chunk, len(chunk))])
            total = total + rows.sum(axis=0, dtype=np.float64) if pooling == "mean" else rows[-1].copy()
            first += len(chunk)
            if turns:
                turns.took(len(chunk), perf_counter() - started)
                yield
                while not turns.due:
                    yield
    finally:
        sequence.forget(0, pool, page_size)
    return (total / len(ids) if pooling == "mean" else total).astype(np.float32)
