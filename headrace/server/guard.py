"""What stands before the routes: keys, sizes, times, and the closed door of a server that is going down."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.problems import Problem, response_of
from headrace.server.settings import ServerSettings

_OPEN_PATHS = ("/health", "/", "/docs", "/openapi.json")  # and what lies below /page/


class Guard:
    """ASGI middleware. `draining` refuses all but questions about the server itself."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Problem as problem:
            await response_of(problem, scope["path"])(scope, receive, send)
            return
        await self._app(scope, _Limited(receive, self._settings), send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._keys and scope["method"] != "OPTIONS" and path not in _OPEN_PATHS and not path.startswith("/page/"):
            self._check_key(headers)
        if self.draining and scope["method"] == "POST":
            raise Problem(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All of them, each in constant time: how long it takes says nothing about any.
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            message = "a valid API key is needed: Authorization: Bearer KEY" if given else "no API key was given"
            raise Problem(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class _Limited:
    """A `receive` that gives up on bodies that are too large or too slow."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive, self._settings = receive, settings
        self._num_bytes, self._complete = 0, False
        self._deadline: float | None = None  # of the whole body: pieces now and then buy no time

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._seconds_left)
        except asyncio.TimeoutError as error:
            raise Problem(408, "the body did not arrive in time", code="timeout") from error
        self._num_bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._num_bytes > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)
        return message

    @property
    def _seconds_left(self) -> float | None:
        now, most_s = asyncio.get_running_loop().time(), self._settings.body_timeout_s
        if self._deadline is None:
            self._deadline = now + most_s
        return self._deadline - now if most_s else None


def _too_large(most_bytes: int) -> Problem:
    return Problem(413, f"body: expected at most {most_bytes} bytes", code="request_too_large")


def timed_protocol(settings: ServerSettings) -> type[Any]:
    """uvicorn's HTTP protocol, which closes connections whose headers are too slow or too long."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None
        _header_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            cycle = self.cycle
            super().data_received(data)
            if self.cycle is not None and (self.cycle is not cycle or not self.cycle.response_complete):
                self._stop_timer()
                return
            self._header_bytes += len(data)
            if self._header_bytes > settings.max_header_bytes:
                self._close()
            elif self._timer is None:
                self._await_headers()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(error)

        def _await_headers(self) -> None:
            if settings.header_timeout_s:
                self._timer = asyncio.get_running_loop().call_later(settings.header_timeout_s, self._close)

        def _stop_timer(self) -> None:
            self._header_bytes = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol


def is_local(hosts: Iterable[str]) -> bool:
    """Whether only this machine can reach these addresses."""
    return all(host in ("localhost", "::1") or host.startswith("127.") for host in hosts)
