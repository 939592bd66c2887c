"""Strict tools that a model may call of itself: it writes free text, or calls whose arguments are of their schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from headrace.config import SamplingParams
from headrace.llm import LLM
from headrace.server.tool_choice import auto_grammar
from headrace.server.tools import ToolReader
from headrace.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "time"}},
]
RAIN = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TIME = '{"name":"time","parameters":{"zone":[1]}}'
MARKED = f"<tool_call>\n{RAIN}\n</tool_call>"
# Answers, and the functions they call.
FREE: list[tuple[str, list[str]]] = [
    ("Hello! 1 < 2, {so} [1] \u00e9 \U0001f600", []),
    ('{"city": "Oslo"}', []),
    ('```json\n{"name": 1}\n```', []),
    ("a <tool_cal", []),
    (MARKED, ["weather"]),
    (f"Let me see. {MARKED}", ["weather"]),
    (f"<tool_call>{RAIN}</tool_call>\n<tool_call>{TIME}</tool_call> Done.", ["weather", "time"]),
    (RAIN, ["weather"]),
    (f" {TIME}", ["time"]),
    (f"[{RAIN}, {TIME}]", ["weather", "time"]),
    (f"{RAIN}\n{TIME}", ["weather", "time"]),
    ('{"city": 1, "name": "weather", "arguments": {"city": 1}}', []),
    ('{"n\\u0061me": "weather", "arguments": {"city": 1}}', []),
]
BARRED = [
    '{"name": "weather", "arguments": {"town": "Oslo"}}',
    '  {"name" : "weather", "parameters": {"city": 1}}',
    '[{"name": "weather", "arguments": {}}]',
    '{"name": "rm", "arguments": {}}',
    'So: <tool_call>{"name": "weather", "arguments": {"city": 1}}</tool_call>',
    MARKED + '{"name": "weather", "arguments": {"city": 1}}',
    f'{RAIN}\n{{"name": "weather", "arguments": {{}}}}',
    '[TOOL_CALLS][{"name": "weather", "arguments": {}}]',
    '<tool_call>\n{"arguments": {"city": 1}, "name": "weather"}',
]


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> Tokenizer:
    return LLM(tiny_path).tokenizer


def may_be_said(tokenizer: Tokenizer, text: str) -> bool:
    """Whether an answer may be this text, and end there."""
    form = tokenizer.forms.form(SamplingParams(grammar=auto_grammar(TOOLS, [True, False], [])))
    assert form is not None
    matcher = form._matcher.deep_copy()
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    return bool(matcher.validate_tokens(ids) == len(ids) and matcher.try_consume_tokens(ids) and matcher.is_accepting())


@pytest.mark.parametrize(("text", "called"), FREE)
def test_free_text_and_calls_of_the_schemas_may_be_said(tokenizer: Tokenizer, text: str, called: list[str]) -> None:
    assert may_be_said(tokenizer, text)
    reader = ToolReader(["weather", "time"], strict=True)
    parts = [part for piece in text for part in reader.push(piece)] + reader.finish()
    assert [part.name for part in parts if part.name] == called
    if not called:
        assert "".join(part.text for part in parts) == text


@pytest.mark.parametrize("text", BARRED)
def test_no_other_calls_may_be_said(tokenizer: Tokenizer, text: str) -> None:
    assert not may_be_said(tokenizer, text)


def asked(tool: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A request to each API with a strict tool."""
    flat = {"type": "function", **tool["function"]}
    theirs = {"name": flat["name"], "input_schema": flat["parameters"], "strict": True}
    turns = [{"role": "user", "content": "hi"}]
    return {
        "/v1/chat/completions": {"messages": turns, "tools": [tool], "max_tokens": 4},
        "/v1/responses": {"input": "hi", "tools": [flat], "max_output_tokens": 4},
        "/v1/messages": {"messages": turns, "tools": [theirs], "max_tokens": 4},
    }


@pytest.mark.parametrize("path", list(asked(TOOLS[0])))
def test_every_api_takes_them(client: TestClient, path: str) -> None:
    response = client.post(path, json={"model": "tiny", **asked(TOOLS[0])[path]})
    assert response.status_code == 200, response.text
    wrong = {"type": "function", "function": {**TOOLS[0]["function"], "parameters": {"not": {}}}}  # type: ignore[dict-item]
    response = client.post(path, json={"model": "tiny", **asked(wrong)[path]})
    assert response.status_code == 400 and response.json()["error"]["message"].startswith("tools: "), response.text


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "response_format", {"type": "json_object"}),
        ("/v1/chat/completions", "grammar", 'start: "a"'),
        ("/v1/chat/completions", "regex", "a"),
        ("/v1/responses", "text", {"format": {"type": "json_object"}}),
        ("/v1/messages", "output_format", {"type": "json_schema", "schema": {}}),
    ],
)
def test_another_form_beside_them_is_refused(client: TestClient, path: str, field: str, value: Any) -> None:
    response = client.post(path, json={"model": "tiny", **asked(TOOLS[0])[path], field: value})
    assert response.status_code == 400 and field in response.json()["error"]["message"], response.text


@pytest.mark.parametrize("nested", [True, False])
def test_anthropics_forms_are_kept_to(client: TestClient, nested: bool) -> None:
    form = {"type": "json_schema", "schema": {"const": {"city": "Oslo"}}}
    given = {"output_config": {"format": form}} if nested else {"output_format": form}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, **given}
    answer = client.post("/v1/messages", json=body).json()
    assert json.loads(answer["content"][0]["text"]) == {"city": "Oslo"}
    form["schema"] = {"type": "nonsense"}
    message = client.post("/v1/messages", json=body).json()["error"]["message"]
    assert message.startswith("output_config.format: " if nested else "output_format: ")
