"""Every field of OpenAI's and Anthropic's APIs that their clients know is taken or refused by name: none is ignored."""

from __future__ import annotations

from typing import Any

import anthropic.types as anthropic_types
import openai.types as openai_types
import openai.types.chat as openai_chat
import openai.types.responses as openai_responses
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatFields
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionFields
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseFields
from starlette.testclient import TestClient

from headrace.server.chat import ChatRequest
from headrace.server.completions import CompletionRequest
from headrace.server.embeddings import EmbeddingRequest
from headrace.server.messages import CountRequest, MessagesRequest
from headrace.server.protocol import Body
from headrace.server.responses import ResponseRequest

HI = [{"role": "user", "content": "hi"}]
ODD = [[{"no such": "thing"}]]  # what no field takes


def names_of(fields: Any) -> set[str]:
    return {name for kind in fields.__mro__ for name in getattr(kind, "__annotations__", {})} | set(
        getattr(fields, "__required_keys__", ()) | getattr(fields, "__optional_keys__", ())
    )


APIS: dict[str, tuple[type[Body], dict[str, Any], set[str]]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": HI, "max_tokens": 1}, names_of(ChatFields) | {"stream"}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi", "max_tokens": 1}, names_of(CompletionFields) | {"stream"}),
    "/v1/responses": (ResponseRequest, {"input": "hi", "max_output_tokens": 1}, names_of(ResponseFields) | {"stream"}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "hi"}, names_of(openai_types.EmbeddingCreateParams)),
    "/v1/messages": (
        MessagesRequest,
        {"messages": HI, "max_tokens": 1},
        names_of(anthropic_types.message_create_params.MessageCreateParamsBase) | {"stream"},
    ),
    "/v1/messages/count_tokens": (
        CountRequest,
        {"messages": HI},
        names_of(anthropic_types.MessageCountTokensParams),
    ),
}
FIELDS = [(path, name) for path, (_, _, names) in APIS.items() for name in sorted(names)]


def test_the_lists_are_those_of_the_clients() -> None:
    assert {path: len(names) > 4 for path, (_, _, names) in APIS.items()} == dict.fromkeys(APIS, True)
    assert {"messages", "tools", "logit_bias", "verbosity"} <= APIS["/v1/chat/completions"][2]


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_field_is_taken_or_refused_by_name(client: TestClient, path: str, name: str) -> None:
    body, good, _ = APIS[path]
    response = client.post(path, json={"model": "tiny", **good, name: ODD})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert name in (error.get("param") or error["message"]), error
    taken = name in body.model_fields
    assert taken != (name in body.refused or "unknown field" in error["message"])


@pytest.mark.parametrize("path", APIS)
def test_a_refused_field_that_asks_for_nothing_is_taken(client: TestClient, path: str) -> None:
    body, good, _ = APIS[path]
    for name, (why, neutral) in body.refused.items():
        assert why and name not in body.model_fields
        for value in (None, *neutral):
            response = client.post(path, json={"model": "tiny", **good, name: value})
            assert response.status_code == 200, (name, value, response.text)


MESSAGES = {
    "user": openai_chat.ChatCompletionUserMessageParam,
    "assistant": openai_chat.ChatCompletionAssistantMessageParam,
    "system": openai_chat.ChatCompletionSystemMessageParam,
    "developer": openai_chat.ChatCompletionDeveloperMessageParam,
    "tool": openai_chat.ChatCompletionToolMessageParam,
}
ITEMS = {
    "message": openai_responses.EasyInputMessageParam,
    "function_call": openai_responses.ResponseFunctionToolCallParam,
    "function_call_output": openai_responses.response_input_param.FunctionCallOutput,
}
ITEM = {
    "message": HI[0],
    "function_call": {"call_id": "1", "name": "f", "arguments": "{}"},
    "function_call_output": {"call_id": "1", "output": "x"},
}


@pytest.mark.parametrize(("role", "name"), [(r, n) for r, f in MESSAGES.items() for n in sorted(names_of(f))])
def test_so_is_one_of_a_message(client: TestClient, role: str, name: str) -> None:
    message = {"role": role, "content": "x", **({"tool_call_id": "1"} if role == "tool" else {}), name: {"odd": 1}}
    response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": [message], "max_tokens": 1})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert name in (error["param"] or error["message"]), error


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, f in ITEMS.items() for n in sorted(names_of(f))])
def test_and_one_of_an_item(client: TestClient, kind: str, name: str) -> None:
    item = {"type": kind, **ITEM[kind], name: {"odd": 1}}
    response = client.post("/v1/responses", json={"model": "tiny", "input": [item], "max_output_tokens": 1})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert name in (error["param"] or "") + error["message"], error


def test_parts_with_more_than_text_are_refused(client: TestClient) -> None:
    for extra, status in (({"cache_control": {"type": "ephemeral"}}, 200), ({"annotations": []}, 200), ({"x": 1}, 400)):
        part = {"type": "text", "text": "hi", **extra}
        body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).status_code == status
