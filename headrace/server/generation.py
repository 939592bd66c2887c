"""A request being answered: admitted or turned away, read to its end, counted, and let go of.

`begin` is where every endpoint starts: it finds the model, makes the requests, and queues them or says 429. From then
on `close` must be called, whatever happens: it stops what still runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

from starlette.requests import Request

from headrace.async_llm import AsyncLLM, AsyncStream, Update
from headrace.errors import HeadraceError
from headrace.server.metrics import Metrics
from headrace.server.problems import Problem, problem_of, renamed
from headrace.server.protocol import usage
from headrace.server.registry import Registry, ServedModel
from headrace.server.settings import ServerSettings

Result = TypeVar("Result")
Make = Callable[[AsyncLLM], Sequence[AsyncStream]]

LOG = logging.getLogger("headrace.server")
_FIRST_ESTIMATE_S = 1.0
_SPEED_PERIOD_S = 0.25  # between two looks at how fast an answer comes


@dataclass
class Server:
    """What every route needs."""

    settings: ServerSettings
    models: Registry
    metrics: Metrics
    request_s: float = field(default=_FIRST_ESTIMATE_S)  # what a request took lately


def server_of(request: Request) -> Server:
    """The server a request came to."""
    server: Server = request.app.state.server
    return server


class Generation:
    """The answers to one request, one stream for each choice."""

    def __init__(self, server: Server, model: ServedModel, streams: Sequence[AsyncStream]) -> None:
        self.server, self.model, self.streams = server, model, streams
        self._started = perf_counter()
        self._last = dict.fromkeys(range(len(streams)), self._started)
        self._first_token_s = 0.0  # until the first choice had a token
        self._speed_told = self._started
        self._closed = False
        self._tally = server.metrics.tallies[model.name]

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Each update with the number of its choice, as they come."""
        if len(self.streams) == 1:
            async for update in self.streams[0]:
                self._count(0, update)
                yield 0, update
            return
        async for pair in _merged(self.streams):
            self._count(*pair)
            yield pair

    async def finish(self) -> None:
        """Reads everything to its end."""
        async for _ in self.updates():
            pass

    def close(self) -> None:
        """Stops what runs, and lets the model go."""
        if self._closed:
            return
        self._closed = True
        for stream in self.streams:
            stream.cancel()
        name, metrics = self.model.name, self.server.metrics
        seconds = perf_counter() - self._started
        metrics.request.labels(name).observe(seconds)
        self.server.request_s = 0.8 * self.server.request_s + 0.2 * seconds
        for stream in self.streams:
            request = stream.request
            metrics.prompt_tokens.labels(name).inc(len(request.prompt_ids))
            metrics.queries.labels(name).inc(len(request.prompt_ids))
            metrics.hits.labels(name).inc(request.reused_len)
            metrics.drafts.labels(name).inc(request.num_drafts)
            metrics.guessed.labels(name).inc(request.num_guessed)
            metrics.accepted.labels(name).inc(request.num_accepted)
            for place, count in enumerate(request.accepted_at):
                metrics.accepted_at.labels(name, str(place)).inc(count)
            metrics.finished.labels(name, stream.finish_reason or "abort").inc()
        self.model.release()

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's count of tokens, of all choices."""
        first = self.streams[0].request
        completion = sum(stream.num_tokens for stream in self.streams)
        return usage(len(first.prompt_ids), completion, first.reused_len)

    @property
    def speed(self) -> dict[str, Any]:
        """How fast the first choice came, and what share of the machine's roof that is."""
        completion = self.streams[0].completion
        return {
            "tokens_per_s": completion.timings.decode_tokens_per_s,
            "prefill_tokens_per_s": completion.timings.prefill_tokens_per_s,
            "gb_per_s": completion.gb_per_s,
            "roof_fraction": completion.roof_fraction,
            "time_to_first_token_s": self._first_token_s,
        }

    def speed_now(self) -> dict[str, Any] | None:
        """The speed so far, now and then: None when it was told a moment ago."""
        now = perf_counter()
        if now - self._speed_told < _SPEED_PERIOD_S:
            return None
        self._speed_told = now
        return self.speed

    def _count(self, index: int, update: Update) -> None:
        now = perf_counter()
        seconds, self._last[index] = now - self._last[index], now
        count = len(update.token_ids)
        self._tally.num_tokens += count
        if self.streams[index].num_tokens == count:
            self.server.metrics.first_token.labels(self.model.name).observe(seconds)
            if index == 0:
                self._first_token_s = seconds
        elif count:
            self._tally.observe(seconds, count)


async def begin(
    server: Server, name: str, make: Make, prompt: str = "prompt", forms: Mapping[str, str] | None = None
) -> Generation:
    """Queues what `make` makes with the loaded model. Raises Problem before anything is computed.

    prompt, forms: what the API calls the fields that became the prompt and, by theirs here, forms of the answer.
    """
    try:
        return await _begin(server, name, make)
    except HeadraceError as error:
        names = {**dict.fromkeys(("prompt", "text", "messages"), prompt), **(forms or {})}
        raise renamed(problem_of(error), names) from error


async def _begin(server: Server, name: str, make: Make) -> Generation:
    model = await server.models.acquire(name)
    try:
        streams = await asyncio.to_thread(make, model.loaded)
        _check_room(server, model.loaded, len(streams))
        generation = Generation(server, model, streams)
    except BaseException:
        model.release()
        raise
    try:
        for stream in streams:
            await stream.start()
    except BaseException:
        generation.close()
        raise
    return generation


def _check_room(server: Server, llm: AsyncLLM, count: int) -> None:
    most = llm.max_requests + server.settings.max_queue
    if count > most:
        raise Problem(400, f"n: expected at most {most} answers at once, got {count}", param="n", code="invalid_value")
    if llm.num_requests + count > most:
        wait_s = max(1, math.ceil(server.request_s))
        raise Problem(
            429,
            f"the queue is full: {llm.num_requests} requests wait or run",
            code="queue_full",
            headers={"Retry-After": str(wait_s)},
        )


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` comes to; it is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "the client went away", code="client_gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _merged(streams: Sequence[AsyncStream]) -> AsyncIterator[tuple[int, Update]]:
    queue: asyncio.Queue[tuple[int, Update | BaseException | None]] = asyncio.Queue()

    async def read(index: int) -> None:
        try:
            async for update in streams[index]:
                queue.put_nowait((index, update))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(read(index)) for index in range(len(streams))]
    try:
        left = len(tasks)
        while left:
            index, update = await queue.get()
            if isinstance(update, BaseException):
                raise update
            if update is None:
                left -= 1
            else:
                yield index, update
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
