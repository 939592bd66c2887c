"""POST /v1/chat/completions: OpenAI's conversations, whole or in pieces, with calls of tools."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from headrace.async_llm import AsyncLLM, AsyncStream, Update
from headrace.server.events import DONE, EventStream, data, dumps, quoted
from headrace.server.generation import LOG, Generation, begin, server_of, unless_gone
from headrace.server.logprobs import for_chat
from headrace.server.messages_in import prompt_of
from headrace.server.problems import Problem, unsupported
from headrace.server.protocol import MOST_CHOICES, Body, Refused, Sampling, StreamOptions, StrictRoute
from headrace.server.tool_choice import auto_form, call_schema, check_strict
from headrace.server.tools import Part, ToolReader

router = APIRouter(route_class=StrictRoute)
_NO_LIMIT = 2**31


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One turn. content: text, or parts of type text."""

    refused: ClassVar[Refused] = {
        "audio": ("text only", ()),
        "function_call": ("tool_calls has taken its place", ()),
        "annotations": ("nothing is annotated", ([],)),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """text, any JSON object, or JSON of a schema. Schemas are kept to whether `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def form(self) -> dict[str, Any]:
        """What SamplingParams are told of it."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            param = "response_format.json_schema"
            raise Problem(400, f"{param}: only and always with type json_schema", param=param, code="invalid_value")
        if self.json_schema is not None:
            return {"json_schema": self.json_schema.schema_ or {}}
        return {"json_object": True} if self.type == "json_object" else {}


class ChatRequest(Sampling):
    """OpenAI's fields, those of SamplingParams, and chat_template_kwargs, continue_final_message."""

    refused: ClassVar[Refused] = {
        "audio": ("text only", ()),
        "modalities": ("text only", (["text"],)),
        "prediction": ("speculate guesses from the text itself", ()),
        "store": ("nothing is kept", (False,)),
        "metadata": ("nothing is kept", ({},)),
        "service_tier": ("there is one", ("auto", "default")),
        "reasoning_effort": ("chat_template_kwargs may have what the model knows", ("none",)),
        "verbosity": ("say it in the prompt", ("medium",)),
        "web_search_options": ("no network", ()),
        "functions": ("tools has taken its place", ()),
        "function_call": ("tool_choice has taken its place", ()),
        "moderation": ("nothing is moderated", ()),
        "prompt_cache_options": ("beginnings are kept as long as there is room", ({},)),
        "prompt_cache_retention": ("beginnings are kept as long as there is room", ("in_memory", "in-memory")),
    }

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False

    def check(self) -> None:
        """Refuses what cannot be done, before anything is loaded."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Problem(400, "top_logprobs: only with logprobs", param="top_logprobs", code="invalid_value")
        if self.stream_options is not None and not self.stream:
            raise Problem(400, "stream_options: only with stream", param="stream_options", code="invalid_value")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise Problem(400, "tool_choice: only with tools", param="tool_choice", code="invalid_value")
        check_strict("grammar" if self.grammar else "response_format" if self.form else None, any(self.held))

    @property
    def offered_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools, as templates take them."""
        return [tool.model_dump(exclude_none=True) for tool in self.offered_tools]

    @property
    def forced_call(self) -> dict[str, Any] | None:
        """The schema of the call that the answer has to be, if it has to be one."""
        return call_schema(self.offered, self.tool_choice)

    @property
    def held(self) -> list[bool]:
        """Which tools are held to their schemas if the model calls them of itself."""
        return [bool(tool.function.strict) and self.forced_call is None for tool in self.offered_tools]

    @property
    def form(self) -> dict[str, Any]:
        """What SamplingParams are told of response_format and tool_choice."""
        schema, given = self.forced_call, self.response_format
        if schema is not None:
            if given is not None and given.type != "text":
                raise unsupported("response_format", "not together with a tool_choice that makes the model call one")
            return {"json_schema": schema}
        return {} if given is None else given.form()

    @property
    def form_fields(self) -> dict[str, str]:
        """The fields that forms were in."""
        given = {"json_schema": "response_format.json_schema.schema" if self.forced_call is None else "tools"}
        return given | ({"grammar": "tools"} if any(self.held) else {})

    @property
    def most_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or _NO_LIMIT

    def streams(self, llm: AsyncLLM) -> list[AsyncStream]:
        """An answer to come for each choice."""
        ids = prompt_of(
            llm.llm,
            [message.model_dump(exclude_none=True) for message in self.messages],
            tools=self.offered,
            continue_final=self.continue_final_message,
            variables=self.chat_template_kwargs,
        ).ids
        told = {"logprobs": self.top_logprobs or 0} if self.logprobs else {}
        form = {**self.form, **auto_form(self.offered, self.held, llm.llm.tokenizer)}
        params = self.drawn(max_tokens=self.most_tokens, n=self.n or 1, **told, **form)
        return llm.choices(ids, params)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    body.check()
    server = server_of(request)
    generation = await begin(server, body.model, body.streams, "messages", body.form_fields)
    if server.settings.log_prompts:
        LOG.info("messages: %s", [message.content for message in body.messages])
    answer = ChatAnswer(body, generation)
    if body.stream:
        return EventStream(answer.events(), generation.close, server.settings.keep_alive_s)
    try:
        return await unless_gone(request, answer.whole())
    finally:
        generation.close()


class ChatAnswer:
    """Puts what comes into OpenAI's JSON."""

    def __init__(self, body: ChatRequest, generation: Generation) -> None:
        self._body, self._generation = body, generation
        most = 1 if body.parallel_tool_calls is False else None
        names = [tool["function"]["name"] for tool in body.offered]
        self._readers = [ToolReader(names, most, strict=any(body.held)) if names else None for _ in generation.streams]
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": body.model}
        self._head = b"data: " + dumps(head)[:-1] + b',"choices":[{"index":'
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._usage = b',"usage":null' if with_usage else b""
        self._with_speed = body.stream_options is not None and body.stream_options.include_speed
        self._told: list[list[dict[str, Any]]] = [[] for _ in generation.streams]

    async def whole(self) -> Response:
        """The completion, once all choices have ended."""
        parts: list[list[Part]] = [[] for _ in self._generation.streams]
        async for index, update in self._generation.updates():
            parts[index] += self._parts(index, update)
        choices = [self._choice(index, each) for index, each in enumerate(parts)]
        head = {"id": self._id, "object": "chat.completion", "created": self._created, "model": self._body.model}
        content = {**head, "choices": choices, "usage": self._generation.usage, "headrace": self._generation.speed}
        return Response(dumps(content), media_type="application/json")

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks of a stream."""
        for index in range(len(self._readers)):
            yield self._chunk(index, b'{"role":"assistant","content":""}')
        async for index, update in self._generation.updates():
            ended = update.finish_reason is not None
            parts = [part for part in self._parts(index, update) if part != Part()]
            extra = self._speed_now() if self._with_speed and index == 0 and parts and not ended else b""
            pieces = [self._chunk(index, _delta(part), extra=extra) for part in parts]
            if ended:
                pieces.append(self._chunk(index, b"{}", self._reason(index)))
            if pieces:
                yield b"".join(pieces)
        options = self._body.stream_options or StreamOptions()
        if options.include_usage or options.include_speed:
            yield self._last(options)
        yield DONE

    def _parts(self, index: int, update: Update) -> list[Part]:
        if self._body.logprobs:
            tokenizer = self._generation.model.loaded.llm.tokenizer
            self._told[index] += for_chat(tokenizer, self._generation.streams[index], update)
        reader = self._readers[index]
        if reader is None:
            return [Part(update.text)]
        parts = reader.push(update.text)
        return parts + reader.finish() if update.finish_reason is not None else parts

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        """Those of the tokens that have come since they were last told."""
        told, self._told[index] = self._told[index], []
        return {"content": told, "refusal": None} if told else None

    def _reason(self, index: int) -> str:
        reader = self._readers[index]
        reason = self._generation.streams[index].finish_reason
        if reason == "cancelled":
            raise Problem(503, "the server is shutting down", code="shutting_down")
        called = reader is not None and reader.num_calls and not isinstance(self._body.tool_choice, dict)
        return "tool_calls" if called and reason == "stop" else reason or "stop"

    def _choice(self, index: int, parts: list[Part]) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        for part in parts:
            if part.name is not None:
                function = {"name": part.name, "arguments": ""}
                calls.append({"id": _call_id(), "type": "function", "function": function})
            elif part.call is not None:
                calls[part.call]["function"]["arguments"] += part.arguments
        text = "".join(part.text for part in parts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(index),
            "finish_reason": self._reason(index),
        }

    def _speed_now(self) -> bytes:
        """What a chunk says besides its text, now and then."""
        speed = self._generation.speed_now()
        return b"" if speed is None else b',"headrace":' + dumps(speed)

    def _chunk(self, index: int, delta: bytes, reason: str | None = None, extra: bytes = b"") -> bytes:
        ended = b"null" if reason is None else b'"' + reason.encode() + b'"'
        return b'%s%d,"delta":%s,"logprobs":%s,"finish_reason":%s}]%s%s}\n\n' % (
            self._head,
            index,
            delta,
            dumps(self._logprobs(index)) if self._told[index] else b"null",
            ended,
            self._usage,
            extra,
        )

    def _last(self, options: StreamOptions) -> bytes:
        chunk = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._body.model}
        extra: dict[str, Any] = {"choices": []}
        if options.include_usage:
            extra["usage"] = self._generation.usage
        if options.include_speed:
            extra["headrace"] = self._generation.speed
        return data({**chunk, **extra})


def _delta(part: Part) -> bytes:
    if part.call is None:
        return b'{"content":' + quoted(part.text) + b"}"
    if part.name is not None:
        function = {"name": part.name, "arguments": ""}
        return dumps({"tool_calls": [{"index": part.call, "id": _call_id(), "type": "function", "function": function}]})
    return dumps({"tool_calls": [{"index": part.call, "function": {"arguments": part.arguments}}]})


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
