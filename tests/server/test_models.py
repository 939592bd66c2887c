"""Several models: loaded when they are asked for, unloaded when nobody asks, and one that fails harms no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from headrace import AsyncLLM
from headrace.errors import ArgumentError, SourceError
from headrace.server.app import create_app
from headrace.server.settings import ServerSettings

CHAT = "/v1/chat/completions"


class Loader:
    """Loads the tiny model under any name: "broken" not at all, "slow" when it is told to."""

    def __init__(self, path: Path) -> None:
        self.path, self.loaded, self.go = path, list[str](), threading.Event()

    def __call__(self, source: str) -> AsyncLLM:
        self.loaded.append(source)
        if source == "broken":
            raise SourceError("model: no such file", "look again")
        if source == "strange":
            raise RuntimeError("secret of the house")
        if source == "slow":
            assert self.go.wait(30)
        return AsyncLLM(self.path, kv_dtype="float32")


@pytest.fixture
def loader(tiny_path: Path) -> Loader:
    return Loader(tiny_path)


@pytest.fixture
def serve(loader: Loader) -> Iterator[Callable[..., TestClient]]:
    opened: list[TestClient] = []

    def make(*models: str, **settings: Any) -> TestClient:
        client = TestClient(create_app(models, loader, ServerSettings(**settings)), raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    loader.go.set()
    for client in opened:
        client.__exit__(None, None, None)


def ask(client: TestClient, model: str) -> Any:
    return client.post(CHAT, json={"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_models_are_loaded_when_they_are_asked_for(serve: Any, loader: Loader) -> None:
    client = serve("a", "b=second")
    until(lambda: client.get("/health").status_code == 200)
    assert loader.loaded == ["a"]
    assert ask(client, "b").status_code == 200
    assert ask(client, "b").status_code == 200
    assert loader.loaded == ["a", "second"]
    listed = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["loaded"]) for model in listed] == [("a", True), ("b", True)]
    assert b'model_name="b"' in client.get("/metrics").content


def test_health_is_503_while_the_first_is_loaded_and_a_request_waits_for_it(serve: Any, loader: Loader) -> None:
    client = serve("slow")
    until(lambda: bool(loader.loaded))
    response = client.get("/health")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    assert int(response.headers["Retry-After"]) >= 1
    assert client.get("/v1/models").status_code == 200
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(ask(client, "slow")))
    thread.start()
    loader.go.set()
    thread.join(120)
    assert answers[0].status_code == 200 and loader.loaded == ["slow"]
    assert client.get("/health").status_code == 200


def test_one_that_fails_to_load_says_why_and_harms_no_other(serve: Any, loader: Loader) -> None:
    client = serve("a", "broken", "strange")
    for _ in range(2):  # it is tried again: the file may have come
        response = ask(client, "broken")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
        assert "no such file" in response.json()["error"]["message"]
        response = ask(client, "strange")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in response.text
        assert ask(client, "a").status_code == 200
    assert loader.loaded.count("broken") == 2 and loader.loaded.count("a") == 1


@pytest.mark.parametrize("first", ["broken", "strange"])
def test_a_first_one_that_fails_harms_no_other(serve: Any, first: str) -> None:
    client = serve(first, "a")
    assert ask(client, "a").status_code == 200
    assert ask(client, first).status_code in (500, 503)
    assert client.get("/health").status_code == 503


def test_idle_models_are_unloaded_and_come_back(serve: Any, loader: Loader) -> None:
    client = serve("a", "b", idle_unload_s=0.2)
    assert ask(client, "a").status_code == ask(client, "b").status_code == 200
    models = client.app.state.server.models
    until(lambda: not models.loaded)
    until(lambda: "headrace engine" not in [thread.name for thread in threading.enumerate()])
    assert ask(client, "b").status_code == 200
    assert loader.loaded.count("b") == 2
    assert client.get("/health").status_code == 200  # unloaded is well


def test_one_that_is_in_use_is_not_unloaded(serve: Any) -> None:
    client = serve("a", idle_unload_s=0.05)
    body = {"model": "a", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        text = "".join(response.iter_text())
    assert '"finish_reason":"length"' in text


def test_two_of_one_name_and_none_are_refused(loader: Loader) -> None:
    for models, told in ((("a", "a"), "two are called 'a'"), ((), "at least one")):
        with pytest.raises(ArgumentError, match=told):
            create_app(models, loader)
