"""Runs a server until it is told to stop: then it takes nothing new, lets what runs end, and leaves."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn

from headrace.async_llm import AsyncLLM
from headrace.llm import LLM
from headrace.machine import this_machine
from headrace.server.app import create_app, drain
from headrace.server.generation import LOG
from headrace.server.guard import is_local, timed_protocol
from headrace.server.settings import ServeOptions, read_bytes

_SWITCH_S = 0.0005  # the engine's thread must not wait for the others as long as Python would have it
_MOST_GARBAGE = 2000  # objects: requests that are refused leave cycles behind, with the bodies they were sent


def serve(models: Sequence[str], options: ServeOptions, open_model: Callable[..., LLM]) -> None:
    """Serves until SIGTERM or SIGINT. open_model: an LLM of a source, given max_requests and kv_cache_bytes as well."""
    settings = options.settings()
    given: dict[str, Any] = {"max_requests": options.max_concurrency}
    if options.kv_cache_memory is not None:
        given["kv_cache_bytes"] = read_bytes("kv_cache_memory", options.kv_cache_memory)

    def load(source: str) -> AsyncLLM:
        llm = open_model(source, **given)
        _measure_roof(llm)
        LOG.info("%s: loaded in %.1f s, %d pages", source, llm.load_s, llm.engine.pool.num_pages)
        return AsyncLLM(llm, stream_interval=settings.stream_interval)

    app = create_app(models, load, settings)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if not settings.api_keys and options.unix_socket is None and not is_local([options.host]):
        LOG.warning(
            "no API key: anyone who can reach %s:%d can use this server (--api-key)", options.host, options.port
        )
    sys.setswitchinterval(_SWITCH_S)
    gc.set_threshold(_MOST_GARBAGE)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        uds=None if options.unix_socket is None else str(options.unix_socket),
        ssl_certfile=None if options.tls_cert is None else str(options.tls_cert),
        ssl_keyfile=None if options.tls_key is None else str(options.tls_key),
        http=timed_protocol(settings),
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=5,
        log_config=None,
        access_log=True,
    )
    server = _Server(config)
    server.run()
    if not server.started:
        raise OSError(f"could not listen on {options.unix_socket or f'{options.host}:{options.port}'}")


class _Server(uvicorn.Server):
    """uvicorn's server, which drains at the first signal and leaves at the second."""

    _draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        LOG.info("shutting down: what runs may end, nothing new is taken")
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            if not await drain(self.config.app):  # type: ignore[arg-type]
                LOG.warning("some requests took too long and were stopped")
        finally:
            self.should_exit = True


def _measure_roof(llm: LLM) -> None:
    """Once for a model's size: without it nobody could say what share of it an answer reached."""
    if this_machine().roof_for(llm.bytes_per_token, llm.threads) is None:
        from headrace.kernels.cpu.roof import measure_read

        measure_read(llm.bytes_per_token, llm.threads)
