"""What /v1/responses says: an answer as items, a message or calls of functions, and the events by which they come."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.responses import Response

from headrace.async_llm import Update
from headrace.server.events import dumps, named
from headrace.server.generation import Generation
from headrace.server.logprobs import TextLogprobs, for_chat
from headrace.server.problems import Problem
from headrace.server.tools import Part, ToolReader

LOGPROBS = "message.output_text.logprobs"
Event = dict[str, Any]


class ResponseAnswer:
    """Puts what comes into the objects and events of the API. echo: fields of the request that it shows again."""

    def __init__(
        self,
        echo: dict[str, Any],
        offered: Sequence[dict[str, Any]],
        generation: Generation,
        *,
        logprobs: bool,
        strict: bool,
    ) -> None:
        self._echo, self._generation, self._stream = echo, generation, generation.streams[0]
        names, most = [tool["function"]["name"] for tool in offered], None if echo["parallel_tool_calls"] else 1
        self._reader = ToolReader(names, most, strict=strict) if names else None
        self._logprobs, self._scores, self._items = logprobs, TextLogprobs(), Items()
        self._id, self._created, self._num_events = f"resp_{secrets.token_hex(12)}", int(time.time()), 0

    async def whole(self) -> Response:
        """The response, once it has ended."""
        async for _ in self._item_events():
            pass
        return Response(dumps(self._response(self._status)), media_type="application/json")

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._named({"type": kind, "response": self._response("in_progress")})
        async for event in self._item_events():
            yield self._named(event)
        yield self._named({"type": f"response.{self._status}", "response": self._response(self._status)})

    async def _item_events(self) -> AsyncIterator[Event]:
        async for _, update in self._generation.updates():
            for part, told in self._told(update):
                if part != Part() or told:
                    for event in self._items.take(part, told):
                        yield event
        if not self._items.shown:
            for event in self._items.take(Part(), []):
                yield event
        for event in self._items.end(self._status):
            yield event

    def _told(self, update: Update) -> Iterator[tuple[Part, list[dict[str, Any]]]]:
        """The parts of an update, and the logprobs that are told with them."""
        entries: list[dict[str, Any]] = []
        if self._logprobs:
            entries = for_chat(self._generation.model.loaded.llm.tokenizer, self._stream, update)
        if self._reader is None:
            yield Part(update.text), entries
            return
        self._scores.add(entries)
        for part in self._reader.push(update.text) + (self._reader.finish() if update.finish_reason else []):
            if part.name is not None:
                yield Part(), self._scores.rest()
            yield part, [] if part.call is not None else self._scores.take(part.text, part.end)
        if update.finish_reason:
            yield Part(), self._scores.rest()

    @property
    def _status(self) -> str:
        if self._stream.finish_reason == "cancelled":
            raise Problem(503, "the server is shutting down", code="shutting_down")
        return "completed" if self._stream.finish_reason == "stop" else "incomplete"

    def _named(self, event: Event) -> bytes:
        self._num_events += 1
        return named({**event, "sequence_number": self._num_events - 1})

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self._echo,
            "output": [] if status == "in_progress" else self._items.shown,
            "usage": None if status == "in_progress" else self._usage,
        }

    @property
    def _usage(self) -> dict[str, Any]:
        request = self._stream.request
        return {
            "input_tokens": len(request.prompt_ids),
            "input_tokens_details": {"cached_tokens": request.reused_len, "cache_write_tokens": 0},
            "output_tokens": self._stream.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(request.prompt_ids) + self._stream.num_tokens,
        }


class Items:
    """The items of an answer, one after the other. Each method gives the events that tell of what it did."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []

    def take(self, part: Part, logprobs: Sequence[dict[str, Any]]) -> Iterator[Event]:
        """Adds a part of the answer. logprobs: of its tokens."""
        if part.name is not None:
            yield from self.end("completed")
            yield from self._begin_call(part.name)
        elif part.call is not None:
            yield self._told("response.function_call_arguments.delta", delta=part.arguments)
            self.shown[-1]["arguments"] += part.arguments
        else:
            if not self.shown or self.shown[-1]["type"] != "message":
                yield from self.end("completed")
                yield from self._begin_text()
            content = self.shown[-1]["content"][0]
            content["text"] += part.text
            content["logprobs"] += logprobs
            if part.text or logprobs:
                yield self._told_text("response.output_text.delta", delta=part.text, logprobs=list(logprobs))

    def end(self, status: str) -> Iterator[Event]:
        """Ends the last item, if there is one."""
        if not self.shown:
            return
        item = self.shown[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._told_text("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._told_text("response.content_part.done", part=part)
        else:
            said = {"arguments": item["arguments"], "name": item["name"]}
            yield self._told("response.function_call_arguments.done", **said)
        yield {"type": "response.output_item.done", "output_index": len(self.shown) - 1, "item": item}

    def _begin_call(self, name: str) -> Iterator[Event]:
        call = {"call_id": f"call_{secrets.token_hex(12)}", "name": name, "arguments": ""}
        self.shown.append({"id": _id("fc"), "type": "function_call", "status": "in_progress", **call})
        yield self._added()

    def _begin_text(self) -> Iterator[Event]:
        message: dict[str, Any] = {
            "id": _id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self.shown.append(message)
        yield self._added()
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._told_text("response.content_part.added", part=dict(part))
        message["content"] = [part]

    def _added(self) -> Event:
        return {
            "type": "response.output_item.added",
            "output_index": len(self.shown) - 1,
            "item": dict(self.shown[-1]),
        }

    def _told(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.shown[-1]["id"], "output_index": len(self.shown) - 1, **fields}

    def _told_text(self, kind: str, **fields: Any) -> Event:
        return self._told(kind, content_index=0, **fields)


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
