"""Many prompts answered at once without a server: by the engine alone, and through AsyncLLM. For `bench serving`.

An answer is greedy and goes on to its last token. Steps are read from the engine's counters between two moments: when
every answer has begun, and when the first of them has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

from headrace.async_llm import AsyncLLM
from headrace.bench.model import greedy
from headrace.bench.serving_parts import Reading, StepParts
from headrace.engine.request import Request
from headrace.llm import LLM


class Watch:
    """Reads counters when all of these requests have begun, and when the first has ended."""

    def __init__(self, requests: Sequence[Request], read: Callable[[], Reading]) -> None:
        self._requests, self._read = requests, read
        self._started = perf_counter()
        self._readings: list[Reading] = []

    def look(self) -> None:
        """To be called behind every step."""
        if not self._readings:
            due = all(request.token_ids for request in self._requests)
        else:
            due = len(self._readings) == 1 and any(request.finish_reason for request in self._requests)
        if due:
            self._readings.append(self._read())

    def result(self) -> dict[str, Any]:
        """Seconds of everything, and the mean step in between."""
        parts = StepParts.between(*self._readings) if len(self._readings) == 2 else None
        return {"seconds": perf_counter() - self._started, "parts": asdict(parts) if parts else None}


def answer(llm: LLM, prompts: Sequence[list[int]], answer_len: int) -> dict[str, Any]:
    """All prompts by `Engine.step`, without text."""
    engine = llm.engine
    requests = [engine.request(prompt, greedy(answer_len)) for prompt in prompts]
    watch = Watch(requests, lambda: Reading.of(engine, on_loop=False))
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        watch.look()
    return watch.result()


def answer_async(llm: LLM, prompts: Sequence[list[int]], answer_len: int) -> dict[str, Any]:
    """The same through AsyncLLM: an engine thread, an event loop, text."""
    model = AsyncLLM(llm)
    try:
        return asyncio.run(_answer_async(model, prompts, answer_len))
    finally:
        model.worker.stop()  # the model goes on to be used without it


async def _answer_async(model: AsyncLLM, prompts: Sequence[list[int]], answer_len: int) -> dict[str, Any]:
    streams = [model.stream(prompt, greedy(answer_len)) for prompt in prompts]
    watch = Watch([stream.request for stream in streams], lambda: Reading.of(model.llm.engine, on_loop=True))

    async def read(stream: Any) -> None:
        async for _ in stream:
            watch.look()

    await asyncio.gather(*(read(stream) for stream in streams))
    return watch.result()
