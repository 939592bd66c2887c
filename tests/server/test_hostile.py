"""What strangers send: every mistake is a 4xx in OpenAI's JSON, and none leaves anything behind."""

from __future__ import annotations

import hmac
import json
import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 3}
JSON = {"Content-Type": "application/json"}


def refused(client: TestClient, body: Any, path: str = CHAT) -> dict[str, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    response = client.post(path, content=raw, headers=JSON)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe\x00",
        b'{"model": NaN}',
        b'{"temperature": 1e999, "model": "tiny", "messages": [{"role": "user", "content": "hi"}]}',
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b'{"model": "\xed\xa0\x80"}',
    ],
)
def test_bodies_that_are_no_json_or_no_request(client: TestClient, body: bytes) -> None:
    refused(client, body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hi"),
        ("messages", [{"role": "king", "content": "hi"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "x" * 3000}]),
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", True),
        ("n", 0),
        ("n", 10**9),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", 2**70),
        ("stop", [""]),
        ("stop", ["x"] * 1000),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5000": 1}),
        ("audio", {"voice": "x"}),
        ("store", True),
        ("functions", []),
        ("modalities", ["audio"]),
        ("chat_template_kwargs", {"messages": []}),
        ("continue_final_message", True),
        ("stream_options", {"include_usage": True}),
        ("top_k", -1),
        ("unheard_of", 1),
    ],
)
def test_fields_with_wrong_values_are_named(client: TestClient, field: str, value: Any) -> None:
    error = refused(client, {**GOOD, field: value})
    named = error["param"] or error["message"]
    assert field.partition("_")[0] in named or field == "continue_final_message", error


def test_what_asks_for_nothing_is_taken(client: TestClient) -> None:
    neutral = {"store": False, "service_tier": "auto", "user": "me", "audio": None, "metadata": None, "n": None}
    assert client.post(CHAT, json={**GOOD, **neutral}).status_code == 200


def test_paths_and_methods_that_are_not_there(client: TestClient) -> None:
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    response = client.get(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert client.get("/page/..%2fapp.py").status_code == 404
    assert client.get("/page/__init__.py").status_code == 404


def test_a_body_that_is_too_large_is_refused_before_it_is_read(open_client: Any) -> None:
    client = open_client(max_body_bytes=1000)
    assert client.post(CHAT, json={**GOOD, "user": "x" * 1000}).status_code == 413
    pieces = (b"x" * 100 for _ in range(20))
    response = client.post(CHAT, content=pieces, headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert client.post(CHAT, json=GOOD).status_code == 200


def test_keys(open_client: Any) -> None:
    client = open_client(api_keys=("first", "second"))
    for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}, {"X-Api-Key": "firs"}):
        response = client.get("/v1/models", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "first" not in response.text
    for headers in ({"Authorization": "Bearer first"}, {"x-api-key": "second"}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/health").status_code in (200, 503)


def test_every_key_is_compared_in_constant_time(open_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, compared, compare = open_client(api_keys=("first", "second")), [], hmac.compare_digest

    def noted(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return compare(given, key)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    for given, status in (("first", 200), ("second", 200), ("fir", 401), ("\xe9", 401)):
        compared.clear()
        raw = f"Bearer {given}".encode("latin-1")
        assert client.get("/v1/models", headers=[(b"Authorization", raw)]).status_code == status
        assert compared == [b"first", b"second"]


@pytest.mark.parametrize("told", [False, True])
def test_prompts_are_in_the_log_only_where_that_was_asked_for(
    open_client: Any, caplog: pytest.LogCaptureFixture, told: bool
) -> None:
    client, said = open_client(log_prompts=told), "the secret of the mill"
    turns = [{"role": "user", "content": said}]
    with caplog.at_level(logging.DEBUG, "headrace"):
        for path, field in (
            (CHAT, {"messages": turns}),
            ("/v1/completions", {"prompt": said}),
            ("/v1/responses", {"input": said}),
            ("/v1/messages", {"messages": turns, "max_tokens": 2}),
        ):
            caplog.clear()
            limit = {"max_output_tokens": 2} if path.endswith("responses") else {"max_tokens": 2}
            assert client.post(path, json={"model": "tiny", **field, **limit}).status_code == 200
            assert (said in caplog.text) is told, path


def test_other_sites_are_allowed_by_name_only(open_client: Any) -> None:
    client = open_client(cors_origin=("https://good.example",))
    for origin, allowed in (("https://good.example", True), ("https://bad.example", False)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = client.options(CHAT, headers=headers).headers.get("access-control-allow-origin")
        assert (answer == origin) is allowed


def test_more_choices_than_fit_are_refused(open_client: Any) -> None:
    client = open_client(options={"max_requests": 1}, max_queue=1)
    assert refused(client, {**GOOD, "n": 3})["param"] == "n"
    assert client.post(CHAT, json={**GOOD, "n": 2}).status_code == 200


def test_nothing_is_left_behind(client: TestClient) -> None:
    server = client.app.state.server  # type: ignore[attr-defined]
    engine = server.models.first.loaded.worker.engine
    assert server.models.first.num_users == 0 and not engine.has_work
    engine.prefixes.clear()
    assert engine.pool.num_free == engine.pool.num_pages
