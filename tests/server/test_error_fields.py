"""Errors name the field as the client wrote it, wherever in the body it stands, and say what would have been right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT, ITEMS, TURNS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "max_tokens": 1},
    TEXT: {"prompt": "hi", "max_tokens": 1},
    ITEMS: {"input": "hi", "max_output_tokens": 1},
    TURNS: {"messages": HI, "max_tokens": 1},
    "/v1/embeddings": {"input": "hi"},
    "/detokenize": {},
}
NONSENSE = {"type": "nonsense"}
OFFERED = {"type": "function", "function": {"name": "f"}}
FORCED = {"type": "function", "function": {"name": "f", "parameters": NONSENSE}}
IN_TEXT = {"type": "json_schema", "name": "x", "schema": NONSENSE}
IN_CHAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": NONSENSE}}
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"n": 0}, "n", "invalid_value"),
    (CHAT, {"temperature": -1}, "temperature", "invalid_value"),
    (CHAT, {"messages": []}, "messages", "invalid_value"),
    (CHAT, {"tool_choice": 5}, "tool_choice", "invalid_type"),
    (CHAT, {"messages": [{**HI[0], "audio": {}}]}, "messages[0].audio", "unsupported_parameter"),
    (CHAT, {"messages": [{"role": "developer"}, *HI], "tools": [OFFERED]}, "messages[0]", "invalid_value"),
    (CHAT, {"response_format": IN_CHAT}, "response_format.json_schema.schema", "invalid_value"),
    (CHAT, {"tools": [FORCED], "tool_choice": "required"}, "tools", "invalid_value"),
    (TEXT, {"prompt": "\ud800"}, "prompt", "invalid_value"),
    (TEXT, {"prompt": None}, "prompt", "invalid_type"),
    (ITEMS, {"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
    (ITEMS, {"text": {"format": IN_TEXT}}, "text.format.schema", "invalid_value"),
    (ITEMS, {"input": [HI[0], {"type": "reasoning"}]}, "input[1]", "unsupported_parameter"),
    (ITEMS, {"tools": [{"type": "function", "name": "f", "output_schema": {}}]}, "tools[0].output_schema", ""),
    (TURNS, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", ""),
    (TURNS, {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name", ""),
    (TURNS, {"tools": [{"name": "f", "input_schema": {}, "type": "web"}]}, "tools[0].type", ""),
    ("/v1/embeddings", {"input": ""}, "input", "invalid_value"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "invalid_value"),
]


@pytest.mark.parametrize(("path", "given", "param", "code"), CASES)
def test_the_field_is_named_as_it_was_written(
    client: TestClient, path: str, given: dict[str, Any], param: str, code: str
) -> None:
    content = json.dumps({"model": "tiny", **GOOD[path], **given})
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["message"].startswith(f"{param}: "), error
    if path != TURNS:
        assert error["param"] == param and error["code"] == (code or "unsupported_parameter")


def test_all_alternatives_of_a_field_are_told(client: TestClient) -> None:
    response = client.post(TEXT, json={"model": "tiny", "prompt": None})
    assert response.json()["error"]["message"] == "prompt: Input should be a valid string or a valid list"


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain"])
def test_a_body_that_does_not_say_it_is_json_is_told_so(client: TestClient, content_type: str) -> None:
    response = client.post(TEXT, content=b'{"model": "tiny", "prompt": "hi"}', headers={"Content-Type": content_type})
    assert response.status_code == 400 and "Content-Type: application/json" in response.json()["error"]["message"]
