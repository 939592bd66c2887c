"""AsyncLLM: a model for asyncio, answering many at once.

async with AsyncLLM("smollm2") as llm:
    async for update in llm.chat_stream([{"role": "user", "content": "hi"}]):
        print(update.text, end="")

The engine has a thread of its own, which runs steps while there is work; readers make text of the tokens. One that
leaves, or whose task is cancelled, gives its request's memory back; one that is slow gets more text at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headrace.completion import Completion
from headrace.config import SamplingParams
from headrace.engine.answers import answer_requests, likeliest
from headrace.engine.request import Request
from headrace.engine.worker import Ticket, Worker
from headrace.errors import ArgumentError, HeadraceError
from headrace.llm import LLM
from headrace.text.stream import TextStream
from headrace.text.token_rules import token_rules

_DRAIN_PERIOD_S = 0.02


@dataclass(slots=True)
class Update:
    """What has come since the last one: text, which may be empty, and tokens. `finish_reason` comes with the last.

    pieces: the text by tokens; the one that ended the answer, if any, has none.
    """

    text: str
    token_ids: list[int]
    pieces: list[str]
    finish_reason: str | None = None


class AsyncStream:
    """Updates of an answer as they come. `completion` is what there is of it so far."""

    def __init__(self, llm: AsyncLLM, request: Request, text: TextStream) -> None:
        self.request = request
        self.group = [self]  # the answers to one prompt, the one first that the others are copies of
        self.finish_reason: str | None = None
        self.num_tokens = 0  # of the answer, up to the last update
        self._llm, self._text = llm, text
        self._shown: list[str] = []
        self._ticket: Ticket | None = None
        self._updates = self._run()

    async def start(self) -> None:
        """Queues the request. Raises CapacityError where it can never fit. Reading the updates does it too."""
        if self._ticket is None:
            tickets = self._llm._add(self.group[0].request)
            for stream, ticket in zip(self.group, tickets, strict=True):
                stream._ticket = ticket
        assert self._ticket is not None
        while not self._ticket.accepted and self._ticket.state[1] is None:
            await self._ticket.news(self._ticket.state)

    def __aiter__(self) -> AsyncIterator[Update]:
        return self._updates

    @property
    def text(self) -> str:
        """All text up to the last update."""
        return "".join(self._shown)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._text.matched

    @property
    def completion(self) -> Completion:
        """The answer up to the last update, with its timings."""
        completion = self._llm.llm.completion(self.request, self.text)
        # Up to a stop string: the engine may have gone on for a step.
        count = self.num_tokens
        choice = replace(
            completion.choices[0],
            token_ids=completion.token_ids[:count],
            finish_reason=self.finish_reason or "length",
            logprobs=None if completion.logprobs is None else completion.logprobs[:count],
        )
        return replace(
            completion,
            token_ids=choice.token_ids,
            finish_reason=choice.finish_reason,
            logprobs=choice.logprobs,
            choices=[choice],
        )

    def cancel(self) -> None:
        """Stops the request and gives its memory back."""
        if self._ticket is not None:
            self._llm.worker.cancel(self._ticket)

    async def aclose(self) -> None:
        """Stops the request and ends the iterator."""
        self.cancel()
        await self._updates.aclose()

    async def _run(self) -> AsyncGenerator[Update, None]:
        try:
            await self.start()
            assert self._ticket is not None
            while self.finish_reason is None:
                count, reason = state = self._ticket.state
                if count == self.num_tokens and reason is None:
                    await self._ticket.news(state)
                else:
                    yield self._update(count, reason)
        finally:
            self.cancel()

    def _update(self, count: int, reason: str | None) -> Update:
        new_ids = self.request.token_ids[self.num_tokens : count]
        pieces: list[str] = []
        for token_id in new_ids[:-1] if reason == "stop" else new_ids:  # the token that ended it is no text
            pieces.append(self._text.push(token_id))
            if self._text.stopped:
                del new_ids[len(pieces) :]
                break
        self.num_tokens += len(new_ids)
        if self._text.stopped:
            reason = "stop"
        elif reason == "error" and self.request.error is not None:
            if not new_ids:
                raise self.request.error
            reason = None  # what was answered before comes first
        elif reason and pieces:
            pieces[-1] += self._text.finish()
        self.finish_reason = reason
        text = "".join(pieces)
        self._shown.append(text)
        return Update(text, new_ids, pieces, reason)


class AsyncLLM:
    """An LLM behind an engine thread. `options` are those of LLM; an open LLM is taken over and must not be used.

    stream_interval: tokens that an update waits for, after the first one; answers with stop strings do not wait.
    """

    def __init__(self, model: LLM | str | Path = "smollm2", *, stream_interval: int = 1, **options: Any) -> None:
        if stream_interval < 1:
            raise ArgumentError(f"stream_interval: expected 1 or more, got {stream_interval}")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self.worker = Worker(self.llm.engine, stream_interval)
        self._closing = False

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, add_special: bool = True
    ) -> AsyncStream:
        """The answer to a raw prompt, text or token ids, in updates. Checks happen here, work while it is read."""
        ids = self.llm.tokenizer.encode(prompt, add_special=add_special) if isinstance(prompt, str) else prompt
        return self._stream(ids, params, continues=True)

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> AsyncStream:
        """The assistant's answer to a conversation, in updates."""
        return self._stream(self.llm.render(messages), params, continues=False)

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, add_special: bool = True
    ) -> Completion:
        """The whole answer to a raw prompt. Cancelling the task stops it."""
        params = params or SamplingParams()
        ids = self.llm.tokenizer.encode(prompt, add_special=add_special) if isinstance(prompt, str) else prompt
        return await _finished(self.choices(ids, params, continues=True), params.n)

    async def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Completion:
        """The whole answer to a conversation."""
        params = params or SamplingParams()
        return await _finished(self.choices(self.llm.render(messages), params), params.n)

    def choices(self, ids: Sequence[int], params: SamplingParams, *, continues: bool = False) -> list[AsyncStream]:
        """The best_of (or n) answers to one prompt, which is computed once. Stopping the first stops those that wait.

        continues: they go on from the prompt's text, as after raw prompts.
        """
        requests = answer_requests(self.llm.engine, ids, params, token_rules(self.llm.tokenizer, params))
        streams = [
            AsyncStream(self, request, TextStream(self.llm.tokenizer, params.stop, continues=continues))
            for request in requests
        ]
        for stream in streams:
            stream.group = streams
        return streams

    async def save_cache(self, path: str | Path, prompt: str | Sequence[int], *, add_special: bool = True) -> int:
        """As `LLM.save_cache`, between steps; requests that run wait meanwhile."""
        return await self.worker.call(partial(self.llm.save_cache, path, prompt, add_special=add_special))

    async def load_cache(self, path: str | Path) -> int:
        """As `LLM.load_cache`, between steps."""
        return await self.worker.call(partial(self.llm.load_cache, path))

    async def embed(self, ids: Sequence[int], pooling: str = "mean") -> np.ndarray:
        """What the model makes of a text: float32 [dim], "mean" or "last" hidden state.

        Computed in pieces between the steps of answers, which take at most twice as long meanwhile.
        """
        return await self.worker.call_in_pieces(lambda: self.llm.engine.embedding(ids, pooling))

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return self.worker.num_requests

    @property
    def max_requests(self) -> int:
        """Requests that are computed at once; others wait."""
        return self.worker.engine.max_requests

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new, and waits for what runs; what has not ended by then is stopped. Whether all ended."""
        self._closing = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_DRAIN_PERIOD_S)
        ended = not self._busy
        self.worker.cancel_all()
        return ended

    @property
    def _busy(self) -> bool:
        return bool(self.worker.num_requests or self.worker.num_calls)

    def close(self) -> None:
        """Stops what runs, ends the thread, and lets go of the model's memory. Closing again does nothing."""
        self._closing = True
        self.worker.stop()
        self.llm.close()

    def _stream(self, ids: Sequence[int], params: SamplingParams | None, *, continues: bool) -> AsyncStream:
        params = params or SamplingParams()
        if params.n > 1 or params.best_of not in (None, 1):
            raise ArgumentError(f"n: expected 1 for a stream, got {params.n}", "choices() gives a stream for each")
        return self.choices(ids, params, continues=continues)[0]

    def _add(self, request: Request) -> list[Ticket]:
        if self._closing:
            raise HeadraceError("the model is being closed", "make a new AsyncLLM")
        return self.worker.add(request)


async def _finished(streams: Sequence[AsyncStream], count: int) -> Completion:
    """The likeliest of the answers, or all in order where none is to be left out."""
    try:
        await asyncio.gather(*(_read(stream) for stream in streams))
    finally:
        for stream in streams:
            await stream.aclose()
    by_request = {stream.request: stream for stream in streams}
    chosen = [by_request[request].completion for request in likeliest(list(by_request), count)]
    return replace(chosen[0], choices=[completion.choices[0] for completion in chosen])


async def _read(stream: AsyncStream) -> None:
    async for _ in stream:
        pass
