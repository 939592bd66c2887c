"""Streams: what comes first and last, characters in halves, silence, readers that dawdle, a model that computes NaN."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from headrace import AsyncLLM
from headrace.check.fakes import TinyModel, metadata_of, tensors_of
from headrace.server.app import create_app
from headrace.server.events import EventStream
from headrace.server.settings import ServerSettings
from headrace.weights.gguf_writer import write_gguf

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}


def events(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_the_role_comes_first_and_usage_before_the_end(client: TestClient) -> None:
    body = {**HI, "n": 2, "seed": 1, "temperature": 1.0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    *chunks, usage, done = events(client.post(CHAT, json=body))
    assert done == "[DONE]" and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 16
    assert usage["usage"]["prompt_tokens_details"].keys() == {"cached_tokens"}
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in each["delta"] for each in mine[1:])
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + ["length"]
    assert all(chunk["usage"] is None and chunk["id"] == usage["id"] for chunk in chunks)
    assert not any("usage" in each for each in events(client.post(CHAT, json={**HI, "stream": True}))[:-1])


def test_the_second_turn_is_cached(client: TestClient) -> None:
    body = {**HI, "messages": [{"role": "user", "content": "a long story " * 20}]}
    first, second = (client.post(CHAT, json=body).json()["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] - 64
    assert first["prompt_tokens"] == second["prompt_tokens"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_texts_of_logprobs_make_the_answer_where_characters_come_in_halves(client: TestClient, path: str) -> None:
    """Every byte is a token of the tiny model, so this is answered in tokens that are no characters."""
    ask = {"messages": HI["messages"], "logprobs": True} if path == CHAT else {"prompt": "x", "logprobs": 0}
    said = "\u6c34\u8f66 \u00e9\U0001f600!"
    body = {"model": "tiny", **ask, "max_tokens": 60, "choice": [said], "seed": 1}
    answer = client.post(path, json=body).json()["choices"][0]
    chunks = [each["choices"][0] for each in events(client.post(path, json={**body, "stream": True}))[:-1]]
    if path == CHAT:
        told = answer["logprobs"]["content"]
        assert answer["message"]["content"] == said and len(told) > len(said)
        assert b"".join(bytes(each["bytes"]) for each in told).decode() == said
        streamed = [each for chunk in chunks if chunk["logprobs"] for each in chunk["logprobs"]["content"]]
        assert "".join(each["token"] for each in told) == said and streamed == told
    else:
        assert answer["text"] == "".join(answer["logprobs"]["tokens"]) == said
        streamed = [text for chunk in chunks for text in chunk["logprobs"]["tokens"]]
        assert streamed == answer["logprobs"]["tokens"]


def test_comments_keep_a_silent_stream_alive() -> None:
    async def silent(sent: list[bytes], comment: bytes) -> Any:
        for count in (2, 4):
            while b"".join(sent).count(comment) < count:  # silent as long as it takes
                await asyncio.sleep(0.01)
            yield b"data: x\n\n"

    async def short(sent: list[bytes], comment: bytes) -> Any:
        await asyncio.sleep(0.1)
        yield b"data: x\n\n"

    assert asyncio.run(_sent(silent, b": keep-alive\n\n", 0.05)).count(b"data: x\n\n") == 2
    assert asyncio.run(_sent(silent, b"event: ping\n", 0.05, anthropic=True)).count(b"data: x\n\n") == 2
    assert asyncio.run(_sent(short, b"", 0.0)) == b"data: x\n\n"


def test_a_reader_that_dawdles_stops_its_own_stream_alone() -> None:
    """Events are made when they can be sent: what waits for a slow reader is one, however long the answer is."""
    made = 0

    async def endless() -> Any:
        nonlocal made
        while True:
            made += 1
            yield b"data: x\n\n"

    async def main() -> None:
        closed = asyncio.Event()

        async def never() -> Any:
            await closed.wait()
            return {"type": "http.disconnect"}

        async def stuck(message: Any) -> None:
            if message.get("body"):
                await asyncio.sleep(600)

        ended: list[int] = []
        stream = EventStream(endless(), lambda: ended.append(made), 0.0)
        task = asyncio.create_task(stream({"type": "http"}, never, stuck))
        while not made:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert made == 1 and not ended
        closed.set()
        await asyncio.wait_for(task, 60)
        assert ended == [1]

    asyncio.run(asyncio.wait_for(main(), 120))


async def _sent(pieces: Any, comment: bytes, keep_alive_s: float, **options: Any) -> bytes:
    sent = list[bytes]()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.sleep(600)

    stream = EventStream(pieces(sent, comment), lambda: None, keep_alive_s, **options)
    await asyncio.wait_for(stream({"type": "http"}, receive, send), 60)
    return b"".join(sent)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Asks a model for which one letter, Z, is not a number."""
    path = tmp_path_factory.mktemp("spoilt") / "spoilt.gguf"
    tensors = tensors_of(TinyModel())
    kind, shape, raw = tensors["token_embd.weight"]
    values = raw.view(np.float32).reshape(shape).copy()
    values[metadata_of(TinyModel())["tokenizer.ggml.tokens"].index("Z")] = np.nan
    tensors["token_embd.weight"] = (kind, shape, values.view(np.uint8))
    write_gguf(path, metadata_of(TinyModel()), [(name, *rest) for name, rest in tensors.items()])
    load = lambda source: AsyncLLM(path, kv_dtype="float32")  # noqa: E731
    client = TestClient(create_app(["tiny"], load, ServerSettings()), raise_server_exceptions=False)
    with client:
        yield lambda path, **body: client.post(path, json={"model": "tiny", **body})


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"prompt": text, "max_tokens": 20, "ignore_eos": True, "temperature": 0, **more}


DRAWS: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"presence_penalty": 1.0}, {"logprobs": 1, "echo": True}]


@pytest.mark.parametrize("draw", DRAWS)
def test_logits_that_are_no_numbers_fail_their_own_request_alone(spoilt: Any, draw: dict[str, Any]) -> None:
    expected = spoilt(TEXT, **ask("a mill", **draw, seed=1)).json()["choices"][0]["text"]
    with ThreadPoolExecutor(9) as pool:
        good = [pool.submit(spoilt, TEXT, **ask("a mill", **draw, seed=1)) for _ in range(4)]
        bad = [pool.submit(spoilt, TEXT, **ask("aZb", **draw, stream=i % 2 == 1)) for i in range(4)]
        for i, answer in enumerate(bad):
            response = answer.result(300)
            if response.status_code == 200:  # the stream had begun
                assert i % 2
                error = events(response)[-1]["error"]
            else:
                assert response.status_code == 500
                error = response.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "not_finite"), error
        for answer in good:
            assert answer.result(300).json()["choices"][0]["text"] == expected


def test_an_embedding_that_is_no_number_is_an_error(spoilt: Any) -> None:
    response = spoilt("/v1/embeddings", input=["fine", "aZb"])
    assert (response.status_code, response.json()["error"]["code"]) == (500, "not_finite")
    assert spoilt("/v1/embeddings", input="fine").status_code == 200


def test_slow_readers_of_a_server_do_not_slow_others(process: Any) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(8)]
    try:
        for connection in slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.sendall(head.encode() + body)
        time.sleep(0.1)
        answers = [httpx.post(process.url + CHAT, json=HI, timeout=300) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
    finally:
        for connection in slow:
            connection.close()
