"""What a server says about itself: models, health, metrics, version; and text to tokens and back."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

import headrace
from headrace.llm import LLM
from headrace.server.chat import ChatMessage, Tool
from headrace.server.generation import server_of
from headrace.server.messages_in import prompt_of
from headrace.server.metrics import CONTENT_TYPE
from headrace.server.problems import Problem
from headrace.server.protocol import Body, StrictRoute
from headrace.server.registry import ServedModel
from headrace.text.prompt import Prompt

router = APIRouter(route_class=StrictRoute)


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 once the first model is loaded and while its engine works, 503 otherwise."""
    llm = server_of(request).models.first.llm
    if llm is None and request.app.state.loading:
        raise Problem(503, "the model is being loaded", code="loading", headers={"Retry-After": "1"})
    if llm is None and server_of(request).models.first.failed:
        raise Problem(503, "the model could not be loaded", code="load_failed")
    if llm is not None and llm.worker.error is not None:
        raise Problem(503, "the engine has stopped", code="engine_stopped")
    return {"status": "ok"}


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The models there are, loaded or not."""
    return {"object": "list", "data": [_described(model) for model in server_of(request).models]}  # type: ignore[attr-defined]


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return _described(server_of(request).models.find(name))


def _described(model: ServedModel) -> dict[str, Any]:
    described = {"id": model.name, "object": "model", "created": model.created, "owned_by": "headrace"}
    if model.llm is not None:
        described["max_model_len"] = model.llm.llm.context_len
    return {**described, "loaded": model.llm is not None}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(server_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of headrace."""
    return {"version": headrace.__version__}


class TemplateRequest(Body):
    """A conversation, as for chat completions."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True

    def prompt_for(self, llm: LLM) -> Prompt:
        """What the model's template makes of it."""
        return prompt_of(
            llm,
            [message.model_dump(exclude_none=True) for message in self.messages],
            tools=[tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            continue_final=self.continue_final_message,
            add_generation_prompt=self.add_generation_prompt,
            variables=self.chat_template_kwargs,
        )


class TokenizeRequest(Body):
    """A prompt, or a conversation with the fields of /apply-template.

    add_special_tokens: put what begins a text in front of a prompt. parse_special: control tokens that a prompt spells
    out are those tokens.
    """

    model: str
    prompt: str | None = None
    add_special_tokens: bool = True
    parse_special: bool = True
    return_token_strs: bool = False
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True

    def ids_for(self, llm: LLM) -> list[int]:
        """Its tokens."""
        if self.messages is None:
            special = {"add_special": self.add_special_tokens, "parse_special": self.parse_special}
            return llm.tokenizer.encode(self.prompt or "", **special)
        given = {name: getattr(self, name) for name in TemplateRequest.model_fields if name in self.model_fields_set}
        return TemplateRequest.model_construct(**given).prompt_for(llm).ids


class DetokenizeRequest(Body):
    model: str
    tokens: list[int] = Field(max_length=1 << 20)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a text or a conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise Problem(400, "prompt: expected either a prompt or messages", param="prompt", code="invalid_value")
    model = await server_of(request).models.acquire(body.model)
    try:
        llm = model.loaded.llm
        ids = await asyncio.to_thread(body.ids_for, llm)
        answer = {"count": len(ids), "max_model_len": llm.context_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [llm.tokenizer.token_bytes(i).decode(errors="replace") for i in ids]
        return answer
    finally:
        model.release()


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids, control tokens by their names."""
    model = await server_of(request).models.acquire(body.model)
    try:
        tokenizer = model.loaded.llm.tokenizer
        if not all(0 <= token < tokenizer.vocab_size for token in body.tokens):
            message = f"tokens: expected token ids in 0..{tokenizer.vocab_size - 1}"
            raise Problem(400, message, param="tokens", code="invalid_value")
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special=False)}
    finally:
        model.release()


@router.post("/apply-template")
async def apply_template(body: TemplateRequest, request: Request) -> dict[str, Any]:
    """The prompt that a conversation becomes, as text and in tokens: only they tell control tokens from their names."""
    model = await server_of(request).models.acquire(body.model)
    try:
        prompt = await asyncio.to_thread(body.prompt_for, model.loaded.llm)
        return {"prompt": prompt.text, "tokens": prompt.ids}
    finally:
        model.release()
