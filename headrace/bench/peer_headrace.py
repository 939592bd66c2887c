"""headrace itself behind the interface of a peer. Decode draws its own tokens, sampling included."""

from __future__ import annotations

from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np

from headrace.bench.accuracy import divergence
from headrace.bench.batches import Together
from headrace.bench.model import check_model, greedy, prefill_speed, work_of
from headrace.bench.peer_answers import answer, answer_async
from headrace.bench.peers import FEWEST_STEPS, Opening, steps_per_s
from headrace.engine.sequence import CachedSequence
from headrace.kernels import cpu
from headrace.llm import LLM


def open_peers(opening: Opening) -> dict[str, Headrace]:
    if opening.isa:
        cpu.limit_isa(opening.isa)  # for the whole process
    return {"": Headrace(opening)}


def start_code(opening: Opening) -> str:
    """The command line itself, held to an instruction set where one is asked for."""
    limit = f"from headrace.kernels.cpu import limit_isa; limit_isa({opening.isa!r})\n" if opening.isa else ""
    return f"""
import sys
{limit}sys.argv = ["headrace", "run", "-m", sys.argv[1], "--threads", sys.argv[2], "--max-tokens", "1", "hi"]
from headrace.cli import main
main()
"""


class Headrace:
    """Ourselves."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._held: list[int] = []
        self._sequences: list[CachedSequence] = []
        self._together: Together | None = None
        self._llm = self._loaded(opening.context_len, opening.sequences)

    def _loaded(self, context_len: int, sequences: int) -> LLM:
        given = self._opening
        room: dict[str, Any] = {"context_len": context_len, "max_requests": sequences}
        return LLM(given.path, threads=given.threads, kv_dtype=given.kv_dtype, offline=True, **room)

    def work(self) -> dict[str, Any]:
        """What the model costs, as the fields of ModelWork. HeadraceError where its answers are no answers."""
        check_model(self._llm)
        return asdict(work_of(self._llm))

    def save_logits(self, ids: list[int], target: str) -> None:
        """Writes the logits at every position as a .npy file."""
        np.save(target, self._llm.logits(ids))

    def arrange(self, context_len: int, sequences: int) -> None:
        self._held, self._sequences, self._together = [], [], None
        self._llm.close()
        self._llm = self._loaded(context_len, sequences)

    def hold(self, ids: list[int]) -> None:
        self._held = ids
        if ids:
            self._llm.generate(ids, greedy(1))

    def prefill(self, ids: list[int]) -> float:
        return prefill_speed(self._llm, self._held, ids)

    def decode(self, ids: list[int], limit_s: float) -> float:
        stream = self._llm.stream(self._held, greedy(len(ids) + 1))
        started = 0.0
        for done, _ in enumerate(stream):  # the first token is the prompt's
            started = started or perf_counter()
            if done >= FEWEST_STEPS and perf_counter() - started > limit_s:
                break
        return stream.completion.timings.decode_tokens_per_s

    def fill(self, ids: list[int], sequences: int) -> None:
        self._together = self._together or Together(self._llm.engine)
        self._together.forget(self._sequences, 0)
        self._sequences = [self._together.filled(ids)]
        self._sequences += [self._together.copied(self._sequences[0]) for _ in range(sequences - 1)]

    def decode_batch(self, sequences: int, steps: int, limit_s: float) -> float:
        assert self._together, "filled before"
        together, chosen = self._together, self._sequences[:sequences]
        depth, tokens = len(chosen[0].ids), [0] * sequences

        def step() -> None:
            tokens[:] = [answer[0] for answer in together.decode(chosen, tokens, 1)]

        speed = sequences * steps_per_s(step, steps, limit_s)
        together.forget(chosen, depth)
        return speed

    def divergence(self, exact: str, ids: list[int]) -> list[float]:
        return [float(x) for x in divergence(np.load(exact, mmap_mode="r"), self._llm.logits(ids))]

    def answer(self, prompts: list[list[int]], answer_len: int) -> dict[str, Any]:
        """Answers all prompts at once by the engine alone. seconds: of all of it. parts: of a step."""
        return answer(self._fresh(), prompts, answer_len)

    def answer_async(self, prompts: list[list[int]], answer_len: int) -> dict[str, Any]:
        """The same through AsyncLLM."""
        return answer_async(self._fresh(), prompts, answer_len)

    def _fresh(self) -> LLM:
        self._llm.engine.clear()
        return self._llm
