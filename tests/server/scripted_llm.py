"""A stand-in for AsyncLLM that says what a test has it say, piece by piece, behind the real application."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import uvicorn

from headrace.async_llm import Update
from headrace.config import SamplingParams
from headrace.engine.request import Request
from headrace.errors import CapacityError
from headrace.server.app import create_app
from headrace.server.settings import ServerSettings
from headrace.text.literals import LiteralFinder

PIECE_LEN = 3  # characters: marks are cut anywhere


class ScriptedLLM:
    """answers: what is said to a question. Others are repeated in capitals. piece_s: seconds between pieces."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.piece_s = answers, 0.0
        self.asked: list[tuple[str, SamplingParams]] = []  # prompts
        self.num_cancelled = 0
        self.num_requests, self.max_requests = 0, 4
        self.worker = SimpleNamespace(error=None)
        self.llm = SimpleNamespace(
            tokenizer=SimpleNamespace(encode=lambda text, add_special: list(text.encode()), controls=LiteralFinder({})),
            chat_template=SimpleNamespace(takes_tools=False, sources=[], render=_render),
            context_len=4096,
        )

    def choices(self, ids: Sequence[int], params: SamplingParams) -> list[ScriptedStream]:
        prompt = bytes(ids).decode()
        self.asked.append((prompt, params))
        question, _, said = prompt.rpartition("user: ")[2].partition("\nassistant: ")
        if question == "too long":
            raise CapacityError("messages: expected at most 4096 tokens, got 5000")
        answer = self.answers.get(question, question.upper())
        pieces = _pieces(answer[len(said) :])
        request = Request(list(ids), params, reused_len=7)
        return [ScriptedStream(self, request, pieces[: params.max_tokens], len(pieces) > params.max_tokens)]

    async def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE_LEN] for start in range(0, len(text), PIECE_LEN)]


def _render(messages: Sequence[dict[str, str]], add_generation_prompt: bool = True, **variables: Any) -> str:
    said = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
    return said + ("assistant: " if add_generation_prompt else "")


class ScriptedStream:
    """One answer. Its first tokens come after a piece's time, too."""

    def __init__(self, llm: ScriptedLLM, request: Request, pieces: list[str], is_cut: bool) -> None:
        self._llm, self._pieces = llm, pieces
        self._reason = "length" if is_cut else "stop"
        self.finish_reason: str | None = None
        self.num_tokens = 0
        self.request = request

    async def start(self) -> None:
        pass

    def cancel(self) -> None:
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self._llm.num_cancelled += 1

    @property
    def completion(self) -> Any:
        timings = SimpleNamespace(decode_tokens_per_s=123.4, prefill_tokens_per_s=1000.0)
        return SimpleNamespace(timings=timings, gb_per_s=10.0, roof_fraction=0.56)

    def __aiter__(self) -> AsyncIterator[Update]:
        return self._updates()

    async def _updates(self) -> AsyncIterator[Update]:
        for piece in self._pieces:
            await asyncio.sleep(self._llm.piece_s)
            self.num_tokens += 1
            yield Update(piece, [0], [piece])
        self.finish_reason = self._reason
        self.num_tokens += 1
        yield Update("", [0], [], self._reason)


class ScriptedServer:
    """The real application on a port of its own, in a thread, with that model. `loaded` lets the model be loaded."""

    def __init__(self, answers: dict[str, str], *, waits: bool = False, **settings: Any) -> None:
        self.llm = ScriptedLLM(answers)
        self.loaded = threading.Event()
        if not waits:
            self.loaded.set()
        app = create_app(("scripted",), self._load, ServerSettings(**settings))  # type: ignore[arg-type]
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def close(self) -> None:
        self.loaded.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)

    def _load(self, source: str) -> ScriptedLLM:
        self.loaded.wait()
        return self.llm
