"""Sends many requests to a server at once and notes when what came: the process that `bench serving` loads it with.

As `python -m` it reads a Load as JSON from stdin and prints what became of it. A client shares the machine with the
server it measures, so while a load runs, bytes are only kept with their times; they are read when all is over. Every
request has a connection of its own, which says where its answer ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import ssl
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter, process_time
from typing import Any

from headrace.bench.serving_answer import Answer, Piece, read_answer

_METRICS = "/metrics"


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    path: str = "/v1/completions"
    tls: bool = False
    key: str | None = None
    timeout_s: float = 600.0

    def post(self, body: bytes) -> bytes:
        """A request as it goes over the wire."""
        return (
            self._head("POST", self.path, f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n") + body
        )

    def get(self, path: str) -> bytes:
        return self._head("GET", path)

    def _head(self, method: str, path: str, more: str = "") -> bytes:
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        where = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        return f"{where}{key}{more}\r\n".encode()


@dataclass(frozen=True)
class Asked:
    """A request: its body, when it is due from the start on (None: when a client is free), and after how many pieces
    of an answer its client goes away (0: it stays)."""

    body: bytes
    due_s: float | None = None
    leave_after: int = 0


@dataclass
class Outcome:
    """What became of a request. Times in seconds from the start of the load; error: "" for a whole answer."""

    due_s: float
    started_s: float
    ended_s: float
    answer: Answer

    @property
    def error(self) -> str:
        return self.answer.error


@dataclass
class Run:
    """A load that has run. marks: the server's metrics when all clients' answers had begun, and when the first of those
    ended."""

    outcomes: list[Outcome]
    wall_s: float
    cpu_s: float  # of the client
    marks: list[str] = field(default_factory=list)


class Exchange(asyncio.Protocol):
    """One request and what comes back, each piece with its time."""

    def __init__(self, request: bytes, leave_after: int, begun: Callable[[], None]) -> None:
        self.pieces: list[Piece] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._leave_after, self._begun = request, leave_after, begun
        self._transport: Any = None
        self.num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((perf_counter(), data))
        if b"data: " in data:
            self.num_events += 1
            if self.num_events == 1:
                self._begun()
            if self.num_events == self._leave_after:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Load:
    """Requests on their way. marks: whether the server's metrics are wanted."""

    def __init__(self, target: Target, *, marks: bool = False) -> None:
        self._target, self._wants_marks = target, marks
        self._context = ssl.create_default_context() if target.tls else None
        self._answering, self._most = 0, 0
        self.start_s = 0.0  # the zero of its times, on the clock of `perf_counter`
        self._fetches: list[asyncio.Task[str]] = []

    async def run(self, asked: Sequence[Asked], concurrency: int) -> Run:
        """Sends all of them: those that are due then, the others by so many clients."""
        self._most = min(concurrency, len(asked))
        self.start_s, cpu_s = perf_counter(), process_time()
        if asked and asked[0].due_s is not None:
            exchanges = await asyncio.gather(*(self._when_due(each) for each in asked))
        else:
            exchanges = await self._by_clients(asked, concurrency)
        wall_s, cpu_s = perf_counter() - self.start_s, process_time() - cpu_s
        marks = list(await asyncio.gather(*self._fetches))
        return Run([self._outcome(*each) for each in exchanges], wall_s, cpu_s, marks)

    async def _by_clients(self, asked: Sequence[Asked], concurrency: int) -> list[Any]:
        queue = iter(enumerate(asked))
        exchanges: list[Any] = [None] * len(asked)

        async def client() -> None:
            for place, each in queue:
                exchanges[place] = await self._exchange(each, perf_counter())

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return exchanges

    async def _when_due(self, asked: Asked) -> Any:
        due = self.start_s + (asked.due_s or 0.0)
        await asyncio.sleep(max(0.0, due - perf_counter()))
        return await self._exchange(asked, due)

    async def _exchange(self, asked: Asked, due: float) -> Any:
        """(due, started, ended, what came, why nothing more came)"""
        started, exchange = perf_counter(), Exchange(self._target.post(asked.body), asked.leave_after, self._begin)
        why = await self._send(exchange)
        if exchange.num_events:
            self._end()
        if asked.leave_after and exchange.num_events >= asked.leave_after:
            why = "left"
        return due, started, perf_counter(), exchange, why

    async def _send(self, exchange: Exchange) -> str:
        where, transport = (self._target.host, self._target.port), None
        try:
            connect = asyncio.get_running_loop().create_connection(lambda: exchange, *where, ssl=self._context)
            transport, _ = await asyncio.wait_for(connect, self._target.timeout_s)
            await asyncio.wait_for(exchange.ended, self._target.timeout_s)
        except asyncio.TimeoutError:
            return "no answer in time"
        except OSError as error:
            return f"no connection: {error.strerror or error}"
        finally:
            if transport is not None:
                transport.abort()
        return ""

    def _outcome(self, due: float, started: float, ended: float, exchange: Exchange, why: str) -> Outcome:
        answer = read_answer(exchange.pieces, self.start_s, why)
        return Outcome(due - self.start_s, started - self.start_s, ended - self.start_s, answer)

    def _begin(self) -> None:
        self._answering += 1
        if self._wants_marks and not self._fetches and self._answering == self._most:
            self._fetches.append(asyncio.get_running_loop().create_task(self._mark()))

    def _end(self) -> None:
        self._answering -= 1
        if len(self._fetches) == 1:
            self._fetches.append(asyncio.get_running_loop().create_task(self._mark()))

    async def _mark(self) -> str:
        exchange = Exchange(self._target.get(_METRICS), 0, lambda: None)
        await self._send(exchange)
        return read_answer(exchange.pieces, self.start_s, "").body


def main() -> None:
    """Runs the load that stdin describes, after requests that warm up; prints the Run."""
    given = json.load(sys.stdin)
    warm_up, asked = ([_asked(each) for each in given[name]] for name in ("warm_up", "asked"))
    target = Target(**given["target"])

    async def run() -> Run:
        await Load(target).run(warm_up, 1)
        return await Load(target, marks=given["marks"]).run(asked, given["concurrency"])

    gc.disable()
    ran = _event_loop()(run())
    for outcome in ran.outcomes:
        outcome.answer = _without_texts(outcome.answer)
    print(json.dumps(asdict(ran)))


def run_of(data: dict[str, Any]) -> Run:
    """A Run of what the process printed."""
    outcomes = [Outcome(**{**each, "answer": Answer(**each["answer"])}) for each in data["outcomes"]]
    return Run(outcomes, data["wall_s"], data["cpu_s"], data["marks"])


def _event_loop() -> Callable[[Coroutine[Any, Any, Run]], Run]:
    """What runs a coroutine: uvloop where it is installed, for it takes less of the cores."""
    try:
        from uvloop import run
    except ImportError:
        return asyncio.run
    return run


def _asked(given: dict[str, Any]) -> Asked:
    return Asked(json.dumps(given["body"]).encode(), given["due_s"])


def _without_texts(answer: Answer) -> Answer:
    return Answer(**{**asdict(answer), "text": "", "body": ""})


if __name__ == "__main__":
    main()
