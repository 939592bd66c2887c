"""The application: routes, what stands before them, and what begins and ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

import headrace
from headrace.errors import HeadraceError
from headrace.server import chat, completions, embeddings, messages, responses, status
from headrace.server.api_page import add_api_page
from headrace.server.events import DIRECT
from headrace.server.generation import LOG, Server
from headrace.server.guard import Guard
from headrace.server.metrics import Metrics
from headrace.server.page_files import page_router
from headrace.server.problems import on_error
from headrace.server.registry import Load, Registry
from headrace.server.settings import ServerSettings


def create_app(models: Sequence[str], load: Load, settings: ServerSettings | None = None) -> FastAPI:
    """The application for these models. load: makes an AsyncLLM of a model's source; the first begins at the start."""
    settings = settings or ServerSettings()
    registry = Registry(models, load)
    app = _App(title="headrace", version=headrace.__version__, lifespan=_lifespan, docs_url=None, redoc_url=None)
    app.state.server = Server(settings, registry, Metrics(registry))  # type: ignore[arg-type]
    app.state.loading = True
    for part in (chat, completions, embeddings, messages, responses, status):
        app.include_router(part.router)
    app.include_router(page_router())
    add_api_page(app)
    for kind in (HeadraceError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, on_error)
    guard: list[Guard] = []
    app.state.guards = guard

    def guarded(inner: object) -> Guard:
        guard.append(Guard(inner, settings))  # type: ignore[arg-type]
        return guard[-1]

    app.add_middleware(guarded)  # type: ignore[arg-type]
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origin), allow_methods=["*"], allow_headers=["*"]
        )
    return app


class _App(FastAPI):
    """FastAPI's application, which lets streams go past what it puts around every message."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECT] = send
        await super().__call__(scope, receive, send)


async def drain(app: FastAPI) -> bool:
    """Takes no more requests, and lets those that run end within the time there is for it. Whether all did."""
    for guard in app.state.guards:
        guard.draining = True
    server: Server = app.state.server
    return await server.models.drain(server.settings.drain_timeout_s)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    server: Server = app.state.server
    tasks = [asyncio.create_task(_load_first(app))]
    if server.settings.idle_unload_s:
        tasks.append(asyncio.create_task(server.models.unload_idle(server.settings.idle_unload_s)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await server.models.close()


async def _load_first(app: FastAPI) -> None:
    server: Server = app.state.server
    first = server.models.first
    try:
        (await server.models.acquire(first.name)).release()
    except HeadraceError as error:  # /health says 503; a request for the model tries again
        LOG.error("%s: %s", first.name, error)
    except Exception:
        LOG.exception("%s could not be loaded", first.name)
    finally:
        app.state.loading = False
