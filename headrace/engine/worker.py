"""A thread that drives an engine, and what readers on event loops see of it.

The engine is not for several threads at once, so everything that touches it happens here, between steps. A step tells
all readers of a loop with one call: how many tokens their requests have by now. Who reads slowly finds more of them at
the next look; nobody waits for anybody.

Readers are told when the next step begins to compute, not before: Python has one thread at a time, and until then it is
the engine's.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, TypeVar

from headrace.engine.engine import Engine
from headrace.engine.request import Request
from headrace.errors import HeadraceError

Result = TypeVar("Result")


class Ticket:
    """A request as its one reader sees it. Belongs to the event loop it was made on.

    state: number of tokens and finish reason, as far as the reader is to know. error: what ended it instead.
    interval: tokens that make a difference to the reader, once there is one.
    """

    def __init__(self, request: Request, interval: int) -> None:
        self.request, self.interval = request, interval
        self.loop = asyncio.get_running_loop()
        self.state: tuple[int, str | None] = (0, None)
        self.accepted = False
        self.error: BaseException | None = None
        self._changed = False
        self._woken: asyncio.Future[None] | None = None  # an asyncio.Event for many readers takes longer

    def note(self) -> bool:
        """Takes down how far the request is, if that makes a difference. Whether it does."""
        (told, _), count, reason = self.state, len(self.request.token_ids), self.request.finish_reason
        if reason is None and told and count - told < self.interval:
            return False
        self.state, self.error = (count, reason), self.request.error
        return True

    def wake(self) -> None:
        """Something has changed. To be called on its loop."""
        self._changed = True
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def news(self, seen: tuple[int, str | None]) -> None:
        """Waits for a change from the state that was seen. Raises what went wrong when all before it has been seen."""
        if not self._changed and self.error is None:
            self._woken = self.loop.create_future()
            await self._woken
        self._changed = False
        if self.error is not None and self.state == seen:
            raise self.error


class _Call:
    """A call in pieces, and who waits for what comes of it."""

    def __init__(
        self,
        make: Callable[[], Generator[None, None, Any]],
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[Any],
    ) -> None:
        self.future = future
        self._pieces, self._loop = make(), loop

    def advance(self) -> bool:
        """One piece; whether it was the last."""
        try:
            if self.future.cancelled():
                self._pieces.close()
            else:
                next(self._pieces)
                return False
        except StopIteration as end:
            self._tell(self.future.set_result, end.value)
        except Exception as error:
            self._tell(self.future.set_exception, error)
        return True

    def end(self, error: HeadraceError) -> None:
        """Ends it before its time."""
        self._pieces.close()
        self._tell(self.future.set_exception, error)

    def _tell(self, tell: Callable[[Any], None], value: Any) -> None:
        _call_on(self._loop, partial(_unless_left, self.future, tell, value))


class Worker:
    """Runs steps while there is work, and sleeps otherwise. Its methods may be called from any event loop's thread.

    interval: tokens between two news of a request, except where a stop string may end it at any.
    """

    def __init__(self, engine: Engine, interval: int = 1) -> None:
        self.engine, self.interval = engine, interval
        self.error: BaseException | None = None  # why it stopped for good
        self.num_steps = 0
        self._tickets: dict[Request, Ticket] = {}
        self._untold: list[Ticket] = []  # whose readers do not know yet
        engine.runner.on_launch = self._tell_news
        self._inbox: list[Callable[[], None]] = []
        self.num_calls = 0  # in pieces, that have not ended
        self._calls: deque[_Call] = deque()
        self._news = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="headrace engine", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._tickets)

    def add(self, request: Request) -> list[Ticket]:
        """Queues a request; a ticket for it and one for each of its copies. A refusal comes as their error."""
        interval = 1 if request.params.stop else self.interval
        tickets = [Ticket(each, interval) for each in (request, *request.copies)]
        self._tickets.update({ticket.request: ticket for ticket in tickets})
        self._post(partial(self._add, request, tickets))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Stops a request before the next step. One that has ended is left as it is."""
        if self._tickets.pop(ticket.request, None) is not None:
            self._post(partial(self._cancel, ticket.request), needed=False)

    def cancel_all(self) -> None:
        """Stops every request; readers see the finish reason "cancelled"."""
        self._post(self._cancel_all, needed=False)

    def call(self, function: Callable[[], Result]) -> asyncio.Future[Result]:
        """What `function` returns when it is called on the thread, between steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def called() -> None:
            try:
                result = function()
            except Exception as error:
                _call_on(loop, partial(_unless_left, future, future.set_exception, error))
            else:
                _call_on(loop, partial(_unless_left, future, future.set_result, result))

        self._post(called)
        return future

    def call_in_pieces(self, make: Callable[[], Generator[None, None, Result]]) -> asyncio.Future[Result]:
        """What the generator returns that `make` makes.

        It moves on to its next yield after every step, one such call after the other. Cancelling the future closes it.
        """
        loop = asyncio.get_running_loop()
        call = _Call(make, loop, loop.create_future())
        self._post(partial(self._calls.append, call))
        self.num_calls += 1
        call.future.add_done_callback(self._count_call)
        return call.future

    def _count_call(self, _: object) -> None:
        self.num_calls -= 1

    def stop(self) -> None:
        """Ends the thread after the step that runs now; what still waits or runs is stopped."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    def _post(self, command: Callable[[], None], needed: bool = True) -> None:
        with self._news:
            if needed and (self._stopping or self.error):
                raise HeadraceError("the engine has stopped") from self.error
            self._inbox.append(command)
            self._news.notify()

    def _run(self) -> None:
        try:
            while self._await_work():
                self._handle_inbox()
                if self.engine.has_work:
                    self._step()
                if self._untold and (self._calls or not self.engine.has_work):
                    self._tell_news()
                if self._calls:
                    self._advance(self._calls[0])
        except Exception as error:  # what should never happen must not leave readers waiting
            with self._news:
                self.error = error
            self._fail(error)
        else:
            self._handle_inbox()
            self._cancel_all()
        for call in self._calls:
            call.end(HeadraceError("the engine has stopped"))

    def _await_work(self) -> bool:
        with self._news:
            while not (self._inbox or self._stopping or self._calls or self.engine.has_work):
                self._news.wait()
            return not self._stopping

    def _handle_inbox(self) -> None:
        with self._news:
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()

    def _step(self) -> None:
        try:
            requests = self.engine.step()
        except Exception as error:
            self._fail(error)
            return
        self.num_steps += 1
        for request in requests:
            ticket = self._tickets.get(request)
            if ticket is not None and ticket.note():
                self._untold.append(ticket)
                if request.finish_reason:
                    self._tickets.pop(request, None)
        if not requests:
            self._tell_news()

    def _advance(self, call: _Call) -> None:
        if call.advance():
            self._calls.popleft()

    def _add(self, request: Request, tickets: list[Ticket]) -> None:
        if request not in self._tickets:
            return  # cancelled meanwhile
        try:
            self.engine.add(request)
            for ticket in tickets:
                ticket.accepted = True
        except HeadraceError as error:
            for ticket in tickets:
                ticket.error = error
                self._tickets.pop(ticket.request, None)
        self._tell(tickets)

    def _cancel(self, request: Request) -> None:
        """Stops a request, and with it those of its copies that have not begun."""
        copies = [self._tickets.pop(copy, None) for copy in request.copies]
        self.engine.cancel(request)
        tickets = [ticket for ticket in copies if ticket is not None]
        for ticket in tickets:
            ticket.state = (0, "cancelled")
        self._tell(tickets)

    def _cancel_all(self) -> None:
        self._tell_news()
        tickets = self._take_all()
        for ticket in tickets:
            self.engine.cancel(ticket.request)
            ticket.state = (len(ticket.request.token_ids), ticket.request.finish_reason)
        self._tell(tickets)

    def _fail(self, error: Exception) -> None:
        """Every reader learns of an error of the engine; it goes on without their requests."""
        self._tell_news()
        tickets = self._take_all()
        for ticket in tickets:
            ticket.error = error
        self._tell(tickets)
        for ticket in tickets:
            self.engine.cancel(ticket.request)

    def _take_all(self) -> list[Ticket]:
        taken = [self._tickets.pop(request, None) for request in list(self._tickets)]
        return [ticket for ticket in taken if ticket is not None]  # readers take theirs out meanwhile

    def _tell_news(self) -> None:
        tickets, self._untold = self._untold, []
        self._tell(tickets)

    def _tell(self, tickets: Iterable[Ticket]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        for ticket in tickets:
            by_loop.setdefault(ticket.loop, []).append(ticket)
        for loop, theirs in by_loop.items():
            if not _call_on(loop, partial(_wake, theirs)):
                for ticket in theirs:
                    self.cancel(ticket)


def _wake(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.wake()


def _unless_left(future: asyncio.Future[Any], settle: Callable[[Any], None], outcome: Any) -> None:
    if not future.done():
        settle(outcome)


def _call_on(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> bool:
    """False where the loop is closed: its readers are gone."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        return False
    return True
