"""Server-sent events: an answer in pieces, a comment now and then while there is nothing to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from json.encoder import encode_basestring_ascii
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.server.generation import LOG
from headrace.server.problems import Problem, body_of, problem_of

DIRECT = "headrace.send"  # in a request's scope: the `send` that no middleware has wrapped
DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"


def data(value: Any) -> bytes:
    """An event without a name."""
    return b"data: " + dumps(value) + b"\n\n"


def named(value: dict[str, Any]) -> bytes:
    """An event called as its `type`."""
    return b"event: " + value["type"].encode() + b"\ndata: " + dumps(value) + b"\n\n"


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def quoted(text: str) -> bytes:
    """A text as JSON, for the event that comes with every token."""
    return encode_basestring_ascii(text).encode()


class EventStream(Response):
    """Sends events as they come. close: called once at the end, also when the client goes away in the middle.

    Middleware sees the beginning and the end of the response; the events in between go past it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], close: Callable[[], None], keep_alive_s: float, *, anthropic: bool = False
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._keep_alive_s = events, close, keep_alive_s
        self._anthropic = anthropic
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct = scope.get(DIRECT, send)
        tasks = [asyncio.create_task(self._pump(send, direct)), asyncio.create_task(_disconnected(receive))]
        if self._keep_alive_s:
            tasks.append(asyncio.create_task(self._keep_alive(direct)))
        try:
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._close()

    async def _pump(self, send: Send, direct: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                self._num_sent += 1
                await direct({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:  # the status is sent: what is left is to say it in the stream
            problem = problem_of(error)
            if problem.status_code == 500:
                LOG.exception("a stream failed")
            await send({"type": "http.response.body", "body": self._error(problem), "more_body": True})
        self._num_sent = -1
        await send({"type": "http.response.body", "body": b""})

    async def _keep_alive(self, direct: Send) -> None:
        seen = self._num_sent
        while True:
            await asyncio.sleep(self._keep_alive_s)
            if self._num_sent == seen:
                await direct({"type": "http.response.body", "body": self._comment, "more_body": True})
            seen = self._num_sent

    @property
    def _comment(self) -> bytes:
        return named({"type": "ping"}) if self._anthropic else _COMMENT

    def _error(self, problem: Problem) -> bytes:
        body = body_of(problem, self._anthropic)
        return named(body) if self._anthropic else data(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
