"""A server in a process of its own: who leaves frees what was taken, a full queue says so, SIGTERM loses no request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.check.fakes import TinyModel, write_tiny_model

ENDLESS = {"model": "long", "prompt": "a mill", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
SHORT = {"model": "long", "prompt": "water", "max_tokens": 5}


@pytest.fixture(scope="module")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TinyModel(num_layers=1, context_len=1 << 16)
    return write_tiny_model(tmp_path_factory.mktemp("long") / "long.gguf", model)


@pytest.fixture
def busy(long_path: Path, tmp_path: Path, start_process: Callable[..., Any]) -> Iterator[Any]:
    limits = ("--max-concurrency", "1", "--max-queue", "1", "--drain-timeout", "300")
    running = start_process("-m", str(long_path), *limits, folder=tmp_path)
    try:
        yield running.ready()
    finally:
        running.popen.kill()


def gauge(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics", timeout=60).text.splitlines()
    [line] = [line for line in lines if line.startswith(f"vllm:{name}{{")]
    return float(line.rpartition(" ")[2])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_draft_model_guesses_for_who_asks(tiny_path: Path, tmp_path: Path, start_process: Callable[..., Any]) -> None:
    running = start_process("-m", f"tiny={tiny_path}", "--draft-model", str(tiny_path), folder=tmp_path)
    try:
        url = running.ready().url
        body = {"model": "tiny", "prompt": "a mill", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        plain, guessed = (
            httpx.post(url + "/v1/completions", json={**body, **more}, timeout=60).json()["choices"][0]["text"]
            for more in ({}, {"speculate": 3})
        )
        assert guessed == plain
        assert gauge(url, "spec_decode_num_accepted_tokens_total") > 0
    finally:
        running.popen.kill()


def test_a_client_that_leaves_makes_room_and_a_full_queue_says_when_to_come_again(busy: Any) -> None:
    url = busy.url + "/v1/completions"
    queued: list[httpx.Response] = []
    with httpx.stream("POST", url, json=ENDLESS, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        thread = threading.Thread(target=lambda: queued.append(httpx.post(url, json=SHORT, timeout=120)))
        thread.start()
        until(lambda: gauge(busy.url, "num_requests_waiting") == 1)
        assert gauge(busy.url, "num_requests_running") == 1
        full = httpx.post(url, json=SHORT, timeout=60)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(full.headers["Retry-After"]) >= 1
    thread.join(120)
    assert queued[0].status_code == 200
    until(lambda: gauge(busy.url, "num_requests_running") == 0)
    assert gauge(busy.url, "kv_cache_usage_perc") == 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={**ENDLESS, "stream": False}, timeout=0.2)
    until(lambda: gauge(busy.url, "num_requests_running") == 0)


def test_sigterm_lets_running_answers_end_and_takes_no_more(busy: Any) -> None:
    url = busy.url + "/v1/completions"
    asked = {**ENDLESS, "max_tokens": 6000}
    with httpx.Client(timeout=120) as other, httpx.stream("POST", url, json=asked, timeout=120) as stream:
        other.get(busy.url + "/health")
        lines = stream.iter_lines()
        next(lines)
        busy.popen.terminate()
        until(lambda: other.post(url, json=SHORT).status_code == 503)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert busy.popen.wait(120) == 0
    assert "water" not in busy.log.read_text() and "a mill" not in busy.log.read_text()
