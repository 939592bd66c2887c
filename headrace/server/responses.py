"""POST /v1/responses: OpenAI's newer API, for text. Nothing is kept between requests."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from headrace.async_llm import AsyncLLM, AsyncStream
from headrace.config import SamplingParams
from headrace.server.events import EventStream, dumps, named
from headrace.server.generation import Generation, begin, server_of, unless_gone
from headrace.server.messages_in import flat_text, prompt_of
from headrace.server.problems import Problem
from headrace.server.protocol import Body, Refused, StrictRoute

router = APIRouter(route_class=StrictRoute)
_NO_LIMIT = 2**31
_NOTHING_KEPT = "nothing is kept"


class InputMessage(Body):
    """One turn: text, or parts of type input_text and output_text."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    refused: ClassVar[Refused] = {"verbosity": ("say it in the prompt", ("medium",))}

    format: TextFormat | None = None


class ResponseRequest(Body):
    """OpenAI's fields."""

    refused: ClassVar[Refused] = {
        "background": (_NOTHING_KEPT, (False,)),
        "conversation": (_NOTHING_KEPT, ()),
        "include": ("there is nothing to include", ([],)),
        "max_tool_calls": ("no tools here, /v1/chat/completions has them", ()),
        "parallel_tool_calls": ("no tools here, /v1/chat/completions has them", (True, False)),
        "previous_response_id": (_NOTHING_KEPT, ()),
        "prompt": (_NOTHING_KEPT, ()),
        "reasoning": ("the model's own template decides", ({},)),
        "service_tier": ("there is one", ("auto", "default")),
        "store": (_NOTHING_KEPT, (False,)),
        "stream_options": ("chunks are sent as they are", ({}, {"include_obfuscation": False})),
        "tools": ("no tools here, /v1/chat/completions has them", ([],)),
        "tool_choice": ("no tools here, /v1/chat/completions has them", ("auto", "none")),
        "top_logprobs": ("/v1/chat/completions has them", (0,)),
        "truncation": ("a prompt that is too long is an error", ("disabled",)),
    }

    model: str
    input: str | list[InputMessage] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as templates take it."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for i, item in enumerate(self.input):
            text = flat_text(item.content, f"input[{i}].content", ("input_text", "output_text"))
            messages.append({"role": item.role, "content": text})
        return messages

    @property
    def form(self) -> dict[str, Any]:
        """What SamplingParams are told of text.format."""
        given = self.text.format if self.text else None
        if given is None or given.type == "text":
            return {}
        if given.type == "json_object":
            return {"json_object": True}
        if given.schema_ is None:
            param = "text.format.schema"
            raise Problem(400, f"{param}: expected one", param=param, code="missing_required_parameter")
        return {"json_schema": given.schema_}

    def streams(self, llm: AsyncLLM) -> list[AsyncStream]:
        """The answer to come."""
        params = SamplingParams(
            max_tokens=self.max_output_tokens or _NO_LIMIT,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            **self.form,
        )
        ids = llm.llm.tokenizer.encode(prompt_of(llm.llm, self.messages), add_special=False)
        return llm.choices(ids, params)


@router.post("/v1/responses")
async def create_response(body: ResponseRequest, request: Request) -> Response:
    """Answers a text or a conversation."""
    server = server_of(request)
    generation = await begin(server, body.model, body.streams, "input")
    answer = ResponseAnswer(body, generation)
    if body.stream:
        return EventStream(answer.events(), generation.close, server.settings.keep_alive_s)
    try:
        return await unless_gone(request, answer.whole())
    finally:
        generation.close()


class ResponseAnswer:
    """Puts what comes into the objects and events of the API."""

    def __init__(self, body: ResponseRequest, generation: Generation) -> None:
        self._body, self._generation, self._stream = body, generation, generation.streams[0]
        self._id, self._item_id = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self._created, self._num_events = int(time.time()), 0

    async def whole(self) -> Response:
        """The response, once it has ended."""
        await self._generation.finish()
        return Response(dumps(self._ended()), media_type="application/json")

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        yield self._event("response.created", response=self._response("in_progress", []))
        yield self._event("response.in_progress", response=self._response("in_progress", []))
        item = {**self._item("in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **place, part=_part(""))
        async for _, update in self._generation.updates():
            if update.text:
                yield self._event("response.output_text.delta", **place, delta=update.text, logprobs=[])
        ended, text = self._ended(), self._stream.text
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=ended["output"][0])
        yield self._event(f"response.{ended['status']}", response=ended)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._num_events += 1
        return named({"type": kind, "sequence_number": self._num_events - 1, **fields})

    def _ended(self) -> dict[str, Any]:
        if self._stream.finish_reason == "cancelled":
            raise Problem(503, "the server is shutting down", code="shutting_down")
        status = "completed" if self._stream.finish_reason == "stop" else "incomplete"
        return self._response(status, [self._item(status)])

    def _item(self, status: str) -> dict[str, Any]:
        content = [_part(self._stream.text)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, request = self._body, self._stream.request
        counted = {
            "input_tokens": len(request.prompt_ids),
            "input_tokens_details": {"cached_tokens": request.reused_len},
            "output_tokens": self._stream.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(request.prompt_ids) + self._stream.num_tokens,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": _shown(body)},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else counted,
        }


def _shown(body: ResponseRequest) -> dict[str, Any]:
    given = body.text.format if body.text else None
    return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_none=True)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
