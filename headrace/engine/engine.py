"""From requests to their tokens, many at once: a step is planned, computed, drawn from, and committed.

Beginnings that were computed once are kept, so the next turn of a conversation computes only its new tokens, and a
prompt that many share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from headrace.config import EngineConfig, ModelConfig, SamplingParams
from headrace.engine.embedder import Embedder
from headrace.engine.embedding import Turns, embedding
from headrace.engine.logprobs import note_logprobs, score_prompt
from headrace.engine.pace import Pace
from headrace.engine.request import Request
from headrace.engine.runner import MAX_OUTPUTS, Runner
from headrace.engine.sampler import Row
from headrace.engine.scheduler import Part, Scheduler
from headrace.engine.sequence import CachedSequence, NewTokens, run_step
from headrace.engine.speculative import Drafts, Guesser, num_accepted
from headrace.errors import ArgumentError, PromptTooLongError
from headrace.kernels.cpu import _native as native
from headrace.kv_cache.pages import PagePool, pages_needed
from headrace.kv_cache.prefix import PrefixCache
from headrace.kv_cache.storage import pages_that_fit
from headrace.models.layers import ModelWeights
from headrace.ops.sampling import logits_hash
from headrace.token_rules import TokenRules


class Engine:
    """Runs requests on one model. Not for several threads at once. drafts: a smaller model that guesses for it."""

    def __init__(
        self,
        weights: ModelWeights,
        config: ModelConfig,
        engine: EngineConfig,
        pool: native.Pool,
        drafts: Drafts | None = None,
    ) -> None:
        self.context_len = engine.context_len or config.context_len
        self.config = config
        self.chunk_len, self.max_requests = engine.chunk_len, engine.max_requests
        self.page_size = engine.page_size
        num_pages = pages_that_fit(config, engine, self.context_len)
        self.pool = PagePool(num_pages)
        self.prefixes = PrefixCache(self.pool, engine.page_size)
        self.runner = Runner(weights, config, engine, pool, num_pages)
        self.scheduler = Scheduler(
            self.pool,
            self.prefixes,
            self.runner.storage.copy_page,
            page_size=engine.page_size,
            step_tokens=max(engine.chunk_len, engine.max_requests),
            step_requests=engine.max_requests,
            step_outputs=len(self.runner.batch.output_rows),
        )
        self.guesser = Guesser(drafts, len(self.runner.batch.output_rows))
        self._pace = Pace()
        self._made_of = (weights, config, engine, pool)
        self._embedder: Embedder | None = None  # recorded when it is first asked for
        self.num_steps = 0
        self.busy_s = 0.0  # that steps have taken so far; `runner.native_s` of it was computing
        self._logits = np.zeros((0, 0), np.float32)  # of the last step
        self._drawn_from: dict[Request, tuple[int, int]] = {}  # its first row of them, and its tokens before

    def again(self, **changes: Any) -> Engine:
        """Another engine on the same weights, with some options changed: no memory but that of its own cache."""
        weights, config, engine, pool = self._made_of
        return Engine(weights, config, replace(engine, **changes), pool)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def request(self, prompt_ids: Sequence[int], params: SamplingParams, rules: TokenRules | None = None) -> Request:
        """A checked request, not added yet. Raises ArgumentError for an empty prompt or ids outside the vocabulary, and
        PromptTooLongError when no token would fit behind it."""
        ids = _checked_ids(prompt_ids, self.config.vocab_size)
        _check_one_answer(params)
        _check_named_ids(params, self.config.vocab_size)
        if len(ids) >= self.context_len:
            raise PromptTooLongError(
                f"prompt: expected fewer than {self.context_len} tokens, got {len(ids)}",
                f"shorten it, or raise context_len (the model allows {self.config.context_len})",
            )
        most_tokens = min(self.context_len, self.pool.num_pages * self.page_size)
        return Request(ids, params, rules or TokenRules(), most_tokens)

    def add(self, request: Request) -> None:
        """Queues it. Raises CapacityError when it could never fit."""
        self.scheduler.add(request)

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Stops it, wherever it is; what was computed stays cached until the room is needed."""
        if request.finish_reason is None or reason == "stop":
            request.finish_reason = reason
            self._note_hash(request)
        self.scheduler.remove(request)
        for copy in request.copies:  # those it never got to start
            self.cancel(copy)

    def step(self) -> list[Request]:
        """Computes the next step; the requests that got a token from it, or an error; some of them finished now."""
        started = perf_counter()
        self.guesser.prepare(self.scheduler.running, self._pace)
        parts = self.scheduler.plan(self._pace.prompt_tokens)
        if not parts:
            return []
        rows = [row for part in parts for row in _rows(part)]
        self.runner.sampler.prepare(rows)
        logits = run_step(self.runner, self.pool, [_new_tokens(part) for part in parts])
        tokens = self._accept(logits, self.runner.sampler.drawn(logits, rows), parts)
        seconds = perf_counter() - started
        for part in parts:
            part.request.add_seconds(seconds)
        self.guesser.learn(parts, tokens, seconds, self._pace)
        answers = sum(part.count <= part.num_draws for part in parts)
        self._pace.observe(answers, self.runner.batch.num_tokens - answers, seconds)
        self.scheduler.commit(parts, tokens)
        drawing = [part.request for part in parts if part.num_draws]
        for request in drawing:
            if request.finish_reason:
                self._note_hash(request)
                del request.logprobs[len(request.token_ids) :]  # of guesses behind its end
        self.num_steps += 1
        self.busy_s += perf_counter() - started
        return drawing + [copy for request in drawing if request.error for copy in request.copies]

    def _accept(self, logits: np.ndarray, drawn: list[int], parts: Sequence[Part]) -> list[list[int]]:
        """The next tokens of each part: those it guessed right and one more; none in the middle of a prompt."""
        tokens, first = list[list[int]](), 0
        self._logits, self._drawn_from = logits, {}
        for part in parts:
            request, count = part.request, part.num_draws
            first += part.num_outputs - count
            if part.num_outputs > count:
                score_prompt(logits[first + count - part.num_outputs : first + count], request)
            mine = [] if request.error else drawn[first : first + count]
            if len(mine) > 1:
                mine = mine[: num_accepted(request.guesses[: count - 1], mine) + 1]
            tokens.append(mine)
            if request.params.logprobs is not None:
                note_logprobs(logits[first:], request, mine)
            if mine:
                self._drawn_from[request] = first, len(request.token_ids)
            first += count
        return tokens

    def run(self, request: Request) -> Generator[int, None, None]:
        """Adds the request; its tokens as they are drawn. Closing the iterator stops it.

        Others that were added, or are run by iterators of their own, move on as well.
        """
        self.add(request)
        try:
            shown = 0
            while True:
                while shown == len(request.token_ids) and not request.finish_reason:
                    self.step()
                if shown == len(request.token_ids):
                    if request.error:
                        raise request.error
                    return
                shown += 1
                yield request.token_ids[shown - 1]
        finally:
            self.cancel(request)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [tokens, vocab] at every position. Nothing cached is used; requests that run wait meanwhile."""
        checked = self.request(ids, SamplingParams()).prompt_ids
        self.clear()
        width, sequence = min(MAX_OUTPUTS, self.chunk_len), CachedSequence()
        chunks = [checked[i : i + width] for i in range(0, len(checked), width)]
        self.runner.sampler.prepare([])
        try:
            parts = [NewTokens(sequence, chunk, len(chunk)) for chunk in chunks]
            return np.concatenate([run_step(self.runner, self.pool, [part]).copy() for part in parts])
        finally:
            sequence.forget(0, self.pool, self.page_size)

    def embed(self, ids: Sequence[int], pooling: str = "mean") -> np.ndarray:
        """What the model makes of a text: float32 [dim], the mean of its tokens' last hidden states, or that of its
        last token. Requests that run wait meanwhile."""
        try:
            next(self.embedding(ids, pooling, in_turns=False))
        except StopIteration as end:
            vector: np.ndarray = end.value
            return vector
        raise AssertionError("it took turns")

    def embedding(
        self, ids: Sequence[int], pooling: str = "mean", *, in_turns: bool = True
    ) -> Generator[None, None, np.ndarray]:
        """The same in pieces: it yields where steps of requests that run may come in between."""
        if pooling not in ("mean", "last"):
            raise ArgumentError(f"pooling: expected mean or last, got {pooling!r}")
        checked = self.request(ids, SamplingParams()).prompt_ids
        if self._embedder is None:
            self._embedder = Embedder(*self._made_of, self.runner.storage)
        if not self.scheduler.make_room(pages_needed(len(checked), self.page_size)):
            self.clear()
        turns = Turns(self, self.chunk_len) if in_turns else None
        return (yield from embedding(self._embedder, self.pool, checked, pooling, turns))

    def step_s(self) -> float | None:
        """Seconds of a step of those that answer now, 0 before one was measured; None where nobody answers."""
        running = len(self.scheduler.running)
        return self._pace.step_s(running) or 0.0 if running else None

    @contextmanager
    def cached(self, ids: Sequence[int]) -> Iterator[CachedSequence]:
        """A text whose keys and values are all there, computed as far as they were not cached. Requests that run wait.

        Raises CapacityError where the cache is too small for it, and what `request` raises.
        """
        request = self.request(ids, SamplingParams())
        self.scheduler.hold(request)
        self.runner.sampler.prepare([])
        try:
            while missing := request.ids[len(request.sequence.ids) :][: self.chunk_len]:
                run_step(self.runner, self.pool, [NewTokens(request.sequence, missing, 0)])
            yield request.sequence
        finally:
            self.scheduler.release(request)

    def take_in(self, read: Callable[[Callable[[int], list[int]]], CachedSequence]) -> int:
        """Makes a text findable that `read` brings on pages it asks for by their number of tokens; its length."""
        taken = list[int]()

        def allocate(num_tokens: int) -> list[int]:
            count = pages_needed(num_tokens, self.page_size)
            if not self.scheduler.make_room(count):
                self.scheduler.preempt_all()
                self.scheduler.make_room(count)
            taken.extend(self.pool.allocate(count))
            return list(taken)

        try:
            sequence, node = read(allocate), None
            for i, page in enumerate(sequence.pages):
                node = self.prefixes.insert(sequence.ids[i * self.page_size :][: self.page_size], page, node)
        finally:
            self.pool.free(taken)
        return len(sequence.ids)

    def clear(self) -> None:
        """Drops all that is cached. Requests that run compute their text again."""
        self.scheduler.preempt_all()
        self.prefixes.clear()

    def _note_hash(self, request: Request) -> None:
        """That of the row its last token was drawn from; rows behind it were of guesses behind its end."""
        if request in self._drawn_from:
            first, before = self._drawn_from[request]
            last = first + max(len(request.token_ids) - before - 1, 0)
            request.logits_hash = logits_hash(self._logits[last])


def _new_tokens(part: Part) -> NewTokens:
    request, first = part.request, len(part.request.sequence.ids)
    ids = request.ids[first : first + part.count]
    if len(ids) < part.count:
        ids += request.guesses[: part.count - len(ids)]
    return NewTokens(request.sequence, ids, part.num_outputs)


def _rows(part: Part) -> list[Row | None]:
    """What the part's outputs are for: its text with more and more of its guesses, None where nothing is drawn."""
    request, scored = part.request, part.num_outputs - part.num_draws
    if part.num_outputs == 1 and not scored:
        return [Row(request)]
    return [*[None] * scored, *(Row(request, tuple(request.guesses[:i])) for i in range(part.num_draws))]


def _check_one_answer(params: SamplingParams) -> None:
    for name, count in (("n", params.n), ("best_of", params.best_of or 1)):
        if count > 1:
            raise ArgumentError(f"{name}: expected 1 where one answer is streamed, got {count}", "generate() takes it")


def _check_named_ids(params: SamplingParams, vocab_size: int) -> None:
    """Ids in the parameters are of the vocabulary."""
    for name, ids in (("logit_bias", dict(params.logit_bias)), ("stop_token_ids", params.stop_token_ids)):
        if ids and max(ids) >= vocab_size:
            raise ArgumentError(f"{name}: expected token ids in 0..{vocab_size - 1}, got {max(ids)}")


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
