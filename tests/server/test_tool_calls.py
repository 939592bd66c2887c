"""Calls of tools over HTTP, in every form that models write them: found, streamed, and given back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI

HI: Any = [{"role": "user", "content": "hi"}]
ARGUMENTS = {"city": 'R"o\\me}', "days": [1, {"x": None}]}
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS})
LLAMA = json.dumps({"name": "weather", "parameters": ARGUMENTS})
OTHER = '{"name": "clock", "arguments": {}}'
WRITTEN = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>",
    "llama": f"{LLAMA}; {OTHER}",
    "mistral": f"[TOOL_CALLS] [{CALL}, {OTHER}]",
    "json": f"[{CALL}, {OTHER}]",
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS: Any = [
    {"name": "weather", "description": "", "parameters": SCHEMA},
    {"name": "clock", "parameters": NOTHING},
]
TOOLS: Any = [{"type": "function", "function": function} for function in FUNCTIONS]


@pytest.fixture(scope="module")
def openai(process: Any) -> OpenAI:
    return OpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0)


def writing(text: str) -> dict[str, Any]:
    """Makes the model write this."""
    return {"model": "tiny", "extra_body": {"choice": [text]}}


@pytest.mark.parametrize("form", WRITTEN)
def test_calls_of_a_chat(openai: OpenAI, form: str) -> None:
    asked: Any = {**writing(WRITTEN[form]), "messages": HI, "tools": TOOLS, "tool_choice": "auto", "max_tokens": 300}
    answer = openai.chat.completions.create(**asked).choices[0]
    calls = answer.message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", ARGUMENTS),
        ("clock", {}),
    ]
    assert answer.finish_reason == "tool_calls" and not (answer.message.content or "").strip()
    deltas = [
        delta
        for chunk in openai.chat.completions.create(stream=True, **asked)
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    for index, call in enumerate(calls):
        mine = [delta for delta in deltas if delta.index == index]
        assert mine[0].function.name == call.function.name and mine[0].id
        assert not any(delta.function.name or delta.id for delta in mine[1:])
        assert "".join(delta.function.arguments or "" for delta in mine) == call.function.arguments
    back: Any = [*HI, answer.message, {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}]
    assert openai.chat.completions.create(model="tiny", messages=back, tools=TOOLS, max_tokens=2).choices


def test_none_and_one_at_a_time(openai: OpenAI) -> None:
    asked: Any = {**writing(WRITTEN["hermes"]), "messages": HI, "tools": TOOLS, "max_tokens": 300}
    none = openai.chat.completions.create(tool_choice="none", **asked).choices[0]
    assert (none.message.content, none.message.tool_calls) == (WRITTEN["hermes"], None)
    assert none.finish_reason == "stop"
    single = openai.chat.completions.create(parallel_tool_calls=False, **asked).choices[0]
    assert [call.function.name for call in single.message.tool_calls or []] == ["weather"]


def test_calls_of_a_message(process: Any) -> None:
    client = Anthropic(base_url=process.url, api_key="none", max_retries=0)
    tools: Any = [{"name": f["name"], "input_schema": f["parameters"]} for f in FUNCTIONS]
    forced: Any = {"type": "tool", "name": "clock"}
    asked: Any = {"model": "tiny", "max_tokens": 300, "messages": HI, "tools": tools, "tool_choice": forced}
    [block] = client.messages.create(**asked).content
    assert (block.type, block.name) == ("tool_use", "clock")
    result: Any = {"type": "tool_result", "tool_use_id": block.id, "is_error": True, "content": "no time"}
    turns: Any = [*HI, {"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
    assert client.messages.create(model="tiny", max_tokens=2, messages=turns, tools=tools).content


FLAT: Any = [{"type": "function", **function} for function in FUNCTIONS]


def test_calls_of_a_response(openai: OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "hi", "tools": FLAT, "max_output_tokens": 300}
    asked["tool_choice"] = {"type": "function", "name": "weather"}
    answer = openai.responses.create(**asked, temperature=0)
    [call] = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", answer.status)
    events = list(openai.responses.create(**asked, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-3:-1] == ["response.function_call_arguments.done", "response.output_item.done"]
    assert events[-1].response.output[0].arguments == call.arguments
    if answer.status == "completed":
        assert isinstance(json.loads(call.arguments), dict)
    given: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    made: Any = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": "{}"}
    turns: Any = [{"role": "user", "content": "hi"}, made, given]
    assert openai.responses.create(**{**asked, "input": turns, "tool_choice": "auto", "max_output_tokens": 2}).output


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", {"type": "web_search"}),
        ("tool_choice", {"type": "function", "name": "rm"}),
        ("tools", [{"type": "web_search"}]),
        ("include", ["file_search_call.results"]),
    ],
)
def test_what_a_response_cannot_do_is_refused_by_name(openai: OpenAI, field: str, value: Any) -> None:
    with pytest.raises(BadRequestError) as refused:
        openai.responses.create(**{"model": "tiny", "input": "hi", "tools": FLAT, field: value})
    assert str(refused.value.param).startswith(field)
