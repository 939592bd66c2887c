"""From a request to its tokens: which beginning is cached, which chunk runs next, what is drawn.

One sequence at a time keeps its pages. A new prompt keeps the pages of the beginning it shares with the last one, so
the next turn of a conversation computes only its new tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from time import perf_counter

import numpy as np

from headrace.config import EngineConfig, ModelConfig, SamplingParams
from headrace.engine.request import Request
from headrace.engine.runner import MAX_OUTPUTS, Runner
from headrace.engine.sampler import Sampler
from headrace.engine.sequence import CachedSequence, NewTokens, run_step
from headrace.errors import ArgumentError, PromptTooLongError
from headrace.kernels.cpu import _native as native
from headrace.kv_cache.pages import PagePool, pages_needed
from headrace.models.layers import ModelWeights
from headrace.ops.sampling import logits_hash


class Engine:
    """Runs requests one after the other on one model."""

    def __init__(self, weights: ModelWeights, config: ModelConfig, engine: EngineConfig, pool: native.Pool) -> None:
        self.context_len = engine.context_len or config.context_len
        self.config = config
        self.chunk_len = engine.chunk_len
        self.page_size = engine.page_size
        num_pages = engine.max_requests * pages_needed(self.context_len, engine.page_size)
        self.pool = PagePool(num_pages)
        self.runner = Runner(weights, config, engine, pool, num_pages)
        self._cached = CachedSequence()
        self._owner: Request | None = None  # the request whose tokens they are

    @property
    def pages(self) -> list[int]:
        """The pages of what is cached; the list changes in place."""
        return self._cached.pages

    def add(self, prompt_ids: Sequence[int], params: SamplingParams, end_ids: frozenset[int] = frozenset()) -> Request:
        """A checked request. Raises ArgumentError for an empty prompt or ids outside the vocabulary, and
        PromptTooLongError when no token would fit behind it."""
        ids = _checked_ids(prompt_ids, self.config.vocab_size)
        if len(ids) >= self.context_len:
            raise PromptTooLongError(
                f"prompt: expected fewer than {self.context_len} tokens, got {len(ids)}",
                f"shorten it, or raise context_len (the model allows {self.config.context_len})",
            )
        return Request(ids, params, end_ids)

    def run(self, request: Request) -> Generator[int, None, None]:
        """The request's tokens as they are drawn. Closing the iterator stops it; what was computed stays cached.

        Another request may run in between: this one then computes again what the other took from the cache.
        """
        sampler = Sampler(request)
        started = perf_counter()
        logits = self._prefill(request)
        try:
            while True:
                token = sampler.sample(logits)
                request.commit(token, self.context_len)
                request.add_seconds(perf_counter() - started)
                if request.finish_reason:
                    request.logits_hash = logits_hash(logits[-1])
                yield token
                if request.finish_reason:
                    return
                started = perf_counter()
                logits = self._step([token], 1) if self._owner is request else self._prefill(request)
        finally:
            # NOTE: the logits are the last step's, whoever ran it.
            if not request.logits_hash and self._owner is request:
                request.logits_hash = logits_hash(logits[-1])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [tokens, vocab] at every position."""
        checked = self.add(ids, SamplingParams()).prompt_ids
        self.clear()
        width = min(MAX_OUTPUTS, self.chunk_len)
        chunks = [checked[i : i + width] for i in range(0, len(checked), width)]
        return np.concatenate([self._step(chunk, len(chunk)).copy() for chunk in chunks])

    def clear(self) -> None:
        """Drops all that is cached. A request that is running computes its text again."""
        self._owner = None
        self._forget(0)

    def _prefill(self, request: Request) -> np.ndarray:
        """Computes what is not cached of the text so far, always its last token; returns the last token's logits."""
        ids = request.ids
        last = min(_common_len(self._cached.ids, ids), len(ids) - 1)
        if not request.token_ids:
            request.reused_len = last
        self._owner = request
        self._forget(last)
        while len(ids) - last > self.chunk_len:
            self._step(ids[last : last + self.chunk_len], 0)
            last += self.chunk_len
        return self._step(ids[last:], 1)

    def _step(self, ids: list[int], num_outputs: int) -> np.ndarray:
        """Runs new tokens behind the cached ones."""
        return run_step(self.runner, self.pool, [NewTokens(self._cached, ids, num_outputs)])

    def _forget(self, keep_len: int) -> None:
        """Drops what is cached beyond the first `keep_len` tokens."""
        self._cached.forget(keep_len, self.pool, self.page_size)


def _checked_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    try:
        array = np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        raise ArgumentError(f"prompt: expected a list of token ids: {error}") from error
    if array.ndim != 1 or not array.size:
        raise ArgumentError("prompt: expected at least one token, got none", "an empty prompt has no next token")
    if not np.issubdtype(array.dtype, np.integer):
        raise ArgumentError(f"prompt: expected whole numbers, got {array.dtype}")
    if array.min() < 0 or array.max() >= vocab_size:
        worst = array.min() if array.min() < 0 else array.max()
        raise ArgumentError(f"prompt: expected token ids in 0..{vocab_size - 1}, got {worst}")
    return [int(i) for i in array]


def _common_len(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
