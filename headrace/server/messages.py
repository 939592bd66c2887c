"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's conversations, whole or as its named events."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from headrace.async_llm import AsyncLLM, AsyncStream
from headrace.config import SamplingParams
from headrace.server.events import EventStream, dumps, named
from headrace.server.generation import LOG, Generation, begin, server_of, unless_gone
from headrace.server.messages_in import flat_text, prompt_of, text_of
from headrace.server.problems import Problem, unsupported
from headrace.server.protocol import MOST_STOPS, Body, Refused, StrictRoute
from headrace.server.tool_choice import auto_form, call_schema, check_strict
from headrace.server.tools import Part, ToolReader

router = APIRouter(route_class=StrictRoute)
_NOTHING_KEPT = "nothing is kept"
_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


class Turn(Body):
    """One turn. content: text, or blocks of type text, tool_use, tool_result."""

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class OfferedTool(Body):
    refused: ClassVar[Refused] = {
        "type": ("only tools with a schema of their own", ("custom",)),
    }

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None

    @property
    def as_function(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description or "", "parameters": self.input_schema}
        return {"type": "function", "function": function}


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @property
    def as_openai(self) -> str | dict[str, Any]:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"any": "required"}.get(self.type, self.type)


class OutputFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    refused: ClassVar[Refused] = {"effort": ("the model's own template decides", ())}

    format: OutputFormat | None = None


class CountRequest(Body):
    """What makes a prompt. cache_control changes nothing: beginnings are always kept."""

    refused: ClassVar[Refused] = {
        "thinking": ("the model's own template decides", ({"type": "disabled"},)),
        "mcp_servers": ("no network", ([],)),
        "container": ("there are none", ()),
        "context_management": ("nothing is taken out of a conversation", ()),
        "speed": ("there is one", ("standard",)),
        "user_profile_id": (_NOTHING_KEPT, ()),
        "workspace_id": (_NOTHING_KEPT, ()),
    }

    model: str
    messages: list[Turn] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[OfferedTool] | None = None
    tool_choice: ToolChoice | None = None
    cache_control: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools, as templates take them."""
        choice = self.tool_choice
        return [] if choice is not None and choice.type == "none" else [tool.as_function for tool in self.tools or ()]

    def prompt_ids(self, llm: AsyncLLM) -> list[int]:
        """The conversation in tokens."""
        plain = [{"role": "system", "content": flat_text(self.system, "system")}] if self.system else []
        for i, turn in enumerate(self.messages):
            plain += _turns(turn, f"messages[{i}]")
        continued = plain[-1]["role"] == "assistant" and not plain[-1].get("tool_calls")
        return prompt_of(llm.llm, plain, tools=self.offered, continue_final=continued).ids


class MessagesRequest(CountRequest):
    """Anthropic's fields."""

    refused: ClassVar[Refused] = {
        **CountRequest.refused,
        "inference_geo": ("there is one place", ()),
        "diagnostics": (_NOTHING_KEPT, ({},)),
    }

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = Field(None, max_length=MOST_STOPS)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @property
    def forced_call(self) -> dict[str, Any] | None:
        """The schema of the call that the answer has to be, if it has to be one."""
        return call_schema(self.offered, self.tool_choice.as_openai) if self.tool_choice else None

    @property
    def held(self) -> list[bool]:
        """Which tools are held to their schemas if the model calls them of itself."""
        return [bool(tool.strict) and self.forced_call is None for tool in self.tools or () if self.offered]

    @property
    def form(self) -> tuple[str, dict[str, Any] | None]:
        """The field that gives the answer a form, and its schema."""
        told = self.output_config.format if self.output_config else None
        name, given = ("output_config.format", told) if told else ("output_format", self.output_format)
        if given is None:
            return "tools", self.forced_call
        if self.forced_call is not None:
            raise unsupported(name, "not together with a tool_choice that makes the model call one")
        check_strict(name, any(self.held))
        return name, given.schema_

    def streams(self, llm: AsyncLLM) -> list[AsyncStream]:
        """The answer to come."""
        given: dict[str, Any] = {"top_k": self.top_k, "top_p": self.top_p}
        params = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            stop=tuple(self.stop_sequences or ()),
            json_schema=self.form[1],
            **auto_form(self.offered, self.held, llm.llm.tokenizer),
            **{name: value for name, value in given.items() if value is not None},
        )
        return llm.choices(self.prompt_ids(llm), params)


def _turns(turn: Turn, where: str) -> list[dict[str, Any]]:
    """A turn as OpenAI has it: results of tools are turns of their own."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    texts, calls, results = list[str](), list[dict[str, Any]](), list[dict[str, Any]]()
    for i, block in enumerate(turn.content):
        at, kind = f"{where}.content[{i}]", block.get("type")
        _check_fields(block, at)
        if kind == "text":
            texts.append(text_of(block, at))
        elif kind == "tool_use":
            if not isinstance(block.get("name"), str):
                raise Problem(400, f"{at}.name: expected text", param=f"{at}.name", code="invalid_type")
            function = {"name": block["name"], "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            content = block.get("content")
            if content is not None and not isinstance(content, str) and not _are_blocks(content):
                raise Problem(400, f"{at}.content: expected text or blocks", param=f"{at}.content")
            text = flat_text(content, f"{at}.content") or ""
            result = {"role": "tool", "content": f"Error: {text}" if block.get("is_error") else text}
            results.append({**result, "tool_call_id": block.get("tool_use_id")})
        else:
            raise unsupported(f"{at}.type", f"a block of type {kind!r:.40}")
    turns = list(results)
    if texts or calls:
        turns.append({"role": turn.role, "content": "".join(texts), **({"tool_calls": calls} if calls else {})})
    return turns or [{"role": turn.role, "content": ""}]


_FIELDS = {
    "tool_use": {"id", "name", "input", "cache_control", "caller"},
    "tool_result": {"tool_use_id", "content", "is_error", "cache_control"},
}


def _check_fields(block: dict[str, Any], where: str) -> None:
    for kind, known in _FIELDS.items():
        unknown = sorted(block.keys() - known - {"type"})
        if unknown and block.get("type") == kind:
            raise unsupported(f"{where}.{unknown[0]}", f"not a field of {kind}")


def _are_blocks(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(block, dict) for block in content)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
    """How many tokens a conversation has."""
    model = await server_of(request).models.acquire(body.model)
    try:
        return {"input_tokens": len(await asyncio.to_thread(body.prompt_ids, model.loaded))}
    finally:
        model.release()


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answers a conversation."""
    server = server_of(request)
    forms = {"json_schema": body.form[0], "grammar": "tools"}
    generation = await begin(server, body.model, body.streams, "messages", forms)
    if server.settings.log_prompts:
        LOG.info("messages: %s", [turn.content for turn in body.messages])
    answer = MessageAnswer(body, generation)
    if body.stream:
        return EventStream(answer.events(), generation.close, server.settings.keep_alive_s, anthropic=True)
    try:
        return await unless_gone(request, answer.whole())
    finally:
        generation.close()


class MessageAnswer:
    """Puts what comes into Anthropic's JSON."""

    def __init__(self, body: MessagesRequest, generation: Generation) -> None:
        names = [tool["function"]["name"] for tool in body.offered]
        single = body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use
        self._reader = ToolReader(names, 1 if single else None, strict=any(body.held)) if names else None
        self._generation, self._stream = generation, generation.streams[0]
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": body.model}

    async def whole(self) -> Response:
        """The message, once it has ended."""
        blocks: list[dict[str, Any]] = []
        async for part in self._parts():
            if part.name is not None:
                blocks.append({"type": "tool_use", "id": _tool_id(), "name": part.name, "input": ""})
            elif part.call is not None:
                blocks[-1]["input"] += part.arguments
            elif blocks and blocks[-1]["type"] == "text":
                blocks[-1]["text"] += part.text
            else:
                blocks.append({"type": "text", "text": part.text})
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = _loads(block["input"])
        content = {**self._head, "content": blocks, **self._ended, "usage": self._usage}
        return Response(dumps(content), media_type="application/json")

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage,
        }
        yield named({"type": "message_start", "message": message})
        index, kind = -1, ""
        async for part in self._parts():
            if part.name is not None or (part.call is None and kind != "text"):
                if index >= 0:
                    yield named({"type": "content_block_stop", "index": index})
                index, kind = index + 1, "text" if part.name is None else "tool_use"
                block: dict[str, Any] = {"type": "text", "text": ""}
                if part.name is not None:
                    block = {"type": "tool_use", "id": _tool_id(), "name": part.name, "input": {}}
                yield named({"type": "content_block_start", "index": index, "content_block": block})
            if part.text or part.arguments:
                delta = {"type": "text_delta", "text": part.text}
                if part.call is not None:
                    delta = {"type": "input_json_delta", "partial_json": part.arguments}
                yield named({"type": "content_block_delta", "index": index, "delta": delta})
        if index >= 0:
            yield named({"type": "content_block_stop", "index": index})
        yield named({"type": "message_delta", "delta": self._ended, "usage": self._usage})
        yield named({"type": "message_stop"})

    async def _parts(self) -> AsyncIterator[Part]:
        async for _, update in self._generation.updates():
            parts = [Part(update.text)] if self._reader is None else self._reader.push(update.text)
            if self._reader is not None and update.finish_reason:
                parts += self._reader.finish()
            for part in parts:
                if part != Part():
                    yield part

    @property
    def _ended(self) -> dict[str, Any]:
        reason, stop = self._stream.finish_reason or "stop", self._stream.matched_stop
        if reason == "cancelled":
            raise Problem(503, "the server is shutting down", code="shutting_down")
        said = "stop_sequence" if stop is not None else _STOP_REASONS[reason]
        if self._reader is not None and self._reader.num_calls and said == "end_turn":
            said = "tool_use"
        return {"stop_reason": said, "stop_sequence": stop}

    @property
    def _usage(self) -> dict[str, int]:
        request = self._stream.request
        return {
            "input_tokens": len(request.prompt_ids) - request.reused_len,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": request.reused_len,
            "output_tokens": self._stream.num_tokens,
        }


def _tool_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"


def _loads(raw: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError:  # cut short by max_tokens
        return {}
