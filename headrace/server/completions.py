"""POST /v1/completions: text that goes on from a prompt, whole or in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from headrace.async_llm import AsyncLLM, AsyncStream, Update
from headrace.engine.answers import likeliest
from headrace.server.events import DONE, EventStream, data, dumps, quoted
from headrace.server.generation import LOG, Generation, begin, server_of, unless_gone
from headrace.server.logprobs import CompletionLogprobs
from headrace.server.problems import Problem, unsupported
from headrace.server.protocol import MOST_CHOICES, Refused, Sampling, StreamOptions, StrictRoute

router = APIRouter(route_class=StrictRoute)
_DEFAULT_TOKENS = 16
_MOST_PROMPTS = 64

Prompt = str | list[int]


class CompletionRequest(Sampling):
    """OpenAI's fields, and those of SamplingParams. prompt: text or token ids, or a list of either.

    add_special_tokens: put what begins a text in front, as the model's file says. parse_special: control tokens that
    a prompt spells out are those tokens; without it they are text. max_tokens 0 tells of the prompt alone, with echo.
    """

    refused: ClassVar[Refused] = {"suffix": ("text is made from left to right", ("",))}

    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    user: str | None = None
    add_special_tokens: bool = True
    parse_special: bool = True

    def check(self) -> None:
        """Refuses what cannot be done, before anything is loaded."""
        if self.num_drawn < (self.n or 1):
            raise Problem(400, f"best_of: expected at least n = {self.n}", param="best_of", code="invalid_value")
        if self.stream and self.num_drawn > (self.n or 1):
            raise unsupported("best_of", "the likeliest answers are known at the end, they cannot be streamed")
        if self.stream_options is not None and not self.stream:
            raise Problem(400, "stream_options: only with stream", param="stream_options", code="invalid_value")
        if not 0 < len(self.prompts) <= _MOST_PROMPTS:
            raise Problem(400, f"prompt: expected 1 to {_MOST_PROMPTS} prompts", param="prompt", code="invalid_value")

    @property
    def num_drawn(self) -> int:
        """Answers that are drawn to each prompt."""
        return self.best_of or self.n or 1

    @property
    def prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def streams(self, llm: AsyncLLM) -> list[AsyncStream]:
        """An answer to come for each choice of each prompt."""
        told: dict[str, Any] = {} if self.logprobs is None else {"logprobs": self.logprobs}
        if told and self.echo:
            told["prompt_logprobs"] = self.logprobs
        most = _DEFAULT_TOKENS if self.max_tokens is None else max(1, self.max_tokens)  # of none, one is drawn unseen
        params = self.drawn(max_tokens=most, n=self.n or 1, best_of=self.best_of, **told)
        special = {"add_special": self.add_special_tokens, "parse_special": self.parse_special}
        encode = llm.llm.tokenizer.encode
        ids = [encode(prompt, **special) if isinstance(prompt, str) else prompt for prompt in self.prompts]
        return [stream for each in ids for stream in llm.choices(each, params, continues=True)]


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Goes on from a prompt."""
    body.check()
    server = server_of(request)
    generation = await begin(server, body.model, body.streams)
    if server.settings.log_prompts:
        LOG.info("prompt: %s", body.prompt)
    answer = TextAnswer(body, generation)
    if body.stream:
        return EventStream(answer.events(), generation.close, server.settings.keep_alive_s)
    try:
        return await unless_gone(request, answer.whole())
    finally:
        generation.close()


class TextAnswer:
    """Puts what comes into OpenAI's JSON."""

    def __init__(self, body: CompletionRequest, generation: Generation) -> None:
        self._body, self._generation = body, generation
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._begin = b"data: " + dumps(self._head)[:-1] + b',"choices":[{"index":'
        tokenizer = generation.model.loaded.llm.tokenizer
        self._told = [CompletionLogprobs(tokenizer) for _ in generation.streams]
        self._echoed: list[str | None] = [None] * len(generation.streams)  # until it is shown

    async def whole(self) -> Response:
        """The completion, once all choices have ended."""
        texts = [""] * len(self._echoed)
        async for index, update in self._generation.updates():
            texts[index] += self._text(index, update)
        choices = [
            {
                "index": place,
                "text": texts[index],
                "logprobs": self._logprobs(index),
                "finish_reason": self._reason(index),
            }
            for place, index in enumerate(self._chosen())
        ]
        content = {**self._head, "choices": choices, "usage": self._usage, "headrace": self._generation.speed}
        return Response(dumps(content), media_type="application/json")

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks of a stream."""
        async for index, update in self._generation.updates():
            reason = self._reason(index) if update.finish_reason else None
            text = self._text(index, update)
            if text or reason:
                yield self._chunk(index, text, reason)
        options = self._body.stream_options or StreamOptions()
        if options.include_usage or options.include_speed:
            extra: dict[str, Any] = {"choices": []}
            if options.include_usage:
                extra["usage"] = self._usage
            if options.include_speed:
                extra["headrace"] = self._generation.speed
            yield data({**self._head, **extra})
        yield DONE

    def _chosen(self) -> list[int]:
        """The numbers of the streams that are shown: of each prompt's the likeliest n, or all in order."""
        requests = [stream.request for stream in self._generation.streams]
        places = {id(request): place for place, request in enumerate(requests)}
        each, count = self._body.num_drawn, self._body.n or 1
        groups = [requests[first : first + each] for first in range(0, len(requests), each)]
        return [places[id(request)] for group in groups for request in likeliest(group, count)]

    def _chunk(self, index: int, text: str, reason: str | None = None) -> bytes:
        ended = b"null" if reason is None else b'"' + reason.encode() + b'"'
        told = b"null" if self._body.logprobs is None else dumps(self._logprobs(index))
        said = quoted(text)
        return b'%s%d,"text":%s,"logprobs":%s,"finish_reason":%s}]}\n\n' % (self._begin, index, said, told, ended)

    def _text(self, index: int, update: Update) -> str:
        """The text of an update, behind the prompt where it is to be shown."""
        before = ""
        if self._echoed[index] is None:
            self._echoed[index] = before = self._echo(index)
        if self._body.max_tokens == 0:
            return before
        if self._body.logprobs is not None:
            self._told[index].add(self._generation.streams[index], update)
        return before + update.text

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        return None if self._body.logprobs is None else self._told[index].take()

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        if self._body.logprobs is not None:
            first = self._generation.streams[index - index % self._body.num_drawn]  # the prompt is scored once
            return self._told[index].add_prompt(first)
        prompt = self._body.prompts[index // self._body.num_drawn]
        tokenizer = self._generation.model.loaded.llm.tokenizer
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)

    @property
    def _usage(self) -> dict[str, Any]:
        each = self._body.num_drawn
        requests = [stream.request for stream in self._generation.streams[::each]]
        usage = self._generation.usage
        if self._body.max_tokens == 0:
            usage["completion_tokens"] = 0
        usage["prompt_tokens"] = sum(len(request.prompt_ids) for request in requests)
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        usage["prompt_tokens_details"] = {"cached_tokens": sum(request.reused_len for request in requests)}
        return usage

    def _reason(self, index: int) -> str:
        reason = self._generation.streams[index].finish_reason
        if reason == "cancelled":
            raise Problem(503, "the server is shutting down", code="shutting_down")
        return "length" if self._body.max_tokens == 0 else reason or "stop"
