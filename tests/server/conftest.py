"""A server on a tiny model, in this process or on a port."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Browser, Page, find_browser
from scripted_llm import ScriptedServer
from starlette.testclient import TestClient

from headrace import AsyncLLM
from headrace.bench.asked_process import module_command
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.server.app import create_app
from headrace.server.settings import ServerSettings

Open = Callable[..., TestClient]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel(context_len=1024))


@pytest.fixture(scope="module")
def open_client(tiny_path: Path) -> Iterator[Open]:
    """Clients of servers in this process; keywords are settings, `options` the model's."""
    opened: list[TestClient] = []

    def make(options: dict[str, Any] | None = None, models: tuple[str, ...] = ("tiny",), **settings: Any) -> TestClient:
        def load(source: str) -> AsyncLLM:
            return AsyncLLM(tiny_path, **({"kv_dtype": "float32"} | (options or {})))

        app = create_app(models, load, ServerSettings(**settings))
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(open_client: Open) -> TestClient:
    return open_client()


class Process:
    """`headrace serve` in a process of its own."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}.log"
        command, environment = module_command("headrace", "serve", "--port", str(self.port), *arguments)
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(command, stderr=log, stdout=log, env=environment)

    def ready(self) -> Process:
        """Returns when the model is loaded."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.popen.poll() is None, self.log.read_text()
            with suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return self
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text())

    def end(self) -> int:
        """Asks it to end; its exit code."""
        self.popen.terminate()
        return self.popen.wait(120)


@pytest.fixture(scope="session")
def process(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One with the tiny model, for all tests that leave it as it is."""
    running = Process("-m", f"tiny={tiny_path}", "--kv-dtype", "float32", folder=tmp_path_factory.mktemp("log"))
    try:
        yield running.ready()
        assert running.end() == 0, running.log.read_text()
    finally:
        running.popen.kill()


@pytest.fixture(scope="session")
def start_process() -> type[Process]:
    return Process


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("there is no chromium here; make browser installs Debian's")
    running = Browser(path, tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def open_page(browser: Browser) -> Iterator[Callable[[], Page]]:
    """Pages that know nothing of each other."""
    opened: list[Page] = []

    def make() -> Page:
        opened.append(browser.open_page())
        return opened[-1]

    yield make
    for page in opened:
        page.close()


@pytest.fixture(scope="module")
def serve_script() -> Iterator[Callable[..., ScriptedServer]]:
    """Servers that say what they are told; keywords are settings."""
    running: list[ScriptedServer] = []

    def make(answers: dict[str, str] | None = None, **settings: Any) -> ScriptedServer:
        running.append(ScriptedServer(answers or {}, **settings))
        return running[-1]

    yield make
    for server in running:
        server.close()


@pytest.fixture(scope="module")
def scripted(serve_script: Callable[..., ScriptedServer]) -> ScriptedServer:
    return serve_script()
