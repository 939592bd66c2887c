"""POST /v1/responses: OpenAI's newer API, for text and calls of functions. Nothing is kept between requests."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from headrace.async_llm import AsyncLLM, AsyncStream
from headrace.config import SamplingParams
from headrace.server.events import EventStream
from headrace.server.generation import LOG, begin, server_of, unless_gone
from headrace.server.messages_in import flat_text, prompt_of
from headrace.server.problems import Problem, unsupported
from headrace.server.protocol import Body, Refused, StrictRoute
from headrace.server.responses_out import LOGPROBS, ResponseAnswer
from headrace.server.tool_choice import auto_form, call_schema, check_strict

router = APIRouter(route_class=StrictRoute)
_NO_LIMIT = 2**31
_NOTHING_KEPT = "nothing is kept"
_KINDS = ("input_text", "output_text")


class InputMessage(Body):
    """One turn: text, or parts of type input_text and output_text."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Body):
    """A call that the model made in an earlier answer."""

    refused: ClassVar[Refused] = {
        "caller": ("there are no programs", ({"type": "direct"},)),
        "namespace": ("functions have one", ()),
    }

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutputItem(Body):
    """What came of a call."""

    refused: ClassVar[Refused] = {**CallItem.refused, "name": ("call_id says which call it was", ())}

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None


_ITEMS = {"message": "Message", "function_call": "Call", "function_call_output": "CallOutput"}


def _kind_of_item(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return _ITEMS.get(kind) if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[CallItem, Tag("Call")]
    | Annotated[CallOutputItem, Tag("CallOutput")],
    Discriminator(
        _kind_of_item,
        custom_error_type="refused",
        custom_error_message=f"an item of another type than {', '.join(_ITEMS)}",
    ),
]


class FunctionTool(Body):
    """A function that the model may call."""

    refused: ClassVar[Refused] = {
        "allowed_callers": ("there are no programs", (["direct"],)),
        "defer_loading": ("all tools are told at once", (False,)),
        "output_schema": ("what a function gives is not looked at", ()),
    }

    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def as_function(self) -> dict[str, Any]:
        """As templates take it."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"type", "strict"})}


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
        "access_programs": ("there are none", ({},)),
        "background": (_NOTHING_KEPT, (False,)),
        "background_options": (_NOTHING_KEPT, ({},)),
        "context_management": ("nothing is taken out of a conversation", ([],)),
        "conversation": (_NOTHING_KEPT, ()),
        "image": ("text only", ({},)),
        "max_tool_calls": ("it is about tools that a server runs", ()),
        "moderation": ("nothing is moderated", ()),
        "previous_response_id": (_NOTHING_KEPT, ()),
        "prompt": (_NOTHING_KEPT, ()),
        "prompt_cache_options": ("beginnings are kept as long as there is room", ({},)),
        "prompt_cache_retention": ("beginnings are kept as long as there is room", ("in_memory", "in-memory")),
        "reasoning": ("the model's own template decides", ({},)),
        "service_tier": ("there is one", ("auto", "default")),
        "store": (_NOTHING_KEPT, (False,)),
        "stream_options": ("chunks are sent as they are", ({}, {"include_obfuscation": False})),
        "truncation": ("a prompt that is too long is an error", ("disabled",)),
    }

    model: str
    input: str | list[InputItem] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        """Refuses what cannot be done, before anything is loaded."""
        others = [name for name in self.include or () if name != LOGPROBS]
        if others:
            raise unsupported("include", f"{others[0]!r:.60}, only {LOGPROBS} is")
        if self.tool_choice not in (None, "auto", "none") and not self.tools:
            raise Problem(400, "tool_choice: only with tools", param="tool_choice", code="invalid_value")
        check_strict("text.format" if self.form else None, any(self.held))

    @property
    def with_logprobs(self) -> bool:
        """Whether logprobs are told."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools, as templates take them."""
        return [] if self.tool_choice == "none" else [tool.as_function for tool in self.tools or ()]

    @property
    def forced_call(self) -> dict[str, Any] | None:
        """The schema of the call that the answer has to be, if it has to be one."""
        choice = self.tool_choice
        if isinstance(choice, dict):
            if choice.keys() != {"type", "name"} or choice["type"] != "function":
                raise unsupported("tool_choice", 'only auto, none, required and {"type": "function", "name": ...} are')
            choice = {"type": "function", "function": {"name": choice["name"]}}
        return call_schema(self.offered, choice)

    @property
    def held(self) -> list[bool]:
        """Which tools are held to their schemas if the model calls them of itself."""
        return [bool(tool.strict) and self.forced_call is None for tool in self.tools or () if self.offered]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as templates take it."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for i, item in enumerate(self.input):
            _add_item(messages, item, f"input[{i}]")
        return messages

    @property
    def form(self) -> dict[str, Any]:
        """What SamplingParams are told of text.format and tool_choice."""
        given = self.text.format if self.text else None
        if self.forced_call is not None:
            if given is not None and given.type != "text":
                raise unsupported("text.format", "not together with a tool_choice that makes the model call one")
            return {"json_schema": self.forced_call}
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
            logprobs=(self.top_logprobs or 0) if self.with_logprobs else None,
            **self.form,
            **auto_form(self.offered, self.held, llm.llm.tokenizer),
        )
        return llm.choices(prompt_of(llm.llm, self.messages, tools=self.offered).ids, params)


def _add_item(messages: list[dict[str, Any]], item: InputMessage | CallItem | CallOutputItem, where: str) -> None:
    """Puts an item into a conversation. Calls belong to the assistant's turn before them."""
    if isinstance(item, InputMessage):
        messages.append({"role": item.role, "content": flat_text(item.content, f"{where}.content", _KINDS)})
    elif isinstance(item, CallOutputItem):
        text = flat_text(item.output, f"{where}.output", _KINDS)
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
    else:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)


@router.post("/v1/responses")
async def create_response(body: ResponseRequest, request: Request) -> Response:
    """Answers a text or a conversation."""
    body.check()
    server = server_of(request)
    forms = {"json_schema": "text.format.schema" if body.forced_call is None else "tools", "grammar": "tools"}
    generation = await begin(server, body.model, body.streams, "input", forms)
    if server.settings.log_prompts:
        LOG.info("input: %s", body.messages)
    strict = any(body.held)
    answer = ResponseAnswer(_echo(body), body.offered, generation, logprobs=body.with_logprobs, strict=strict)
    if body.stream:
        return EventStream(answer.events(), generation.close, server.settings.keep_alive_s)
    try:
        return await unless_gone(request, answer.whole())
    finally:
        generation.close()


def _echo(body: ResponseRequest) -> dict[str, Any]:
    """The fields of a request that a response shows again."""
    given = body.text.format if body.text else None
    shown = {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_none=True)
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": shown},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }
