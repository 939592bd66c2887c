"""A stand-in for headrace.llm: answers with the prompt in capitals, one word a piece, without a model.

Prompts steer it: "slow" answers for ten seconds, "long" does not fit the context.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from headrace.config import EngineConfig, SamplingParams
from headrace.errors import PromptTooLongError, SourceError


@dataclass(frozen=True)
class Timings:
    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Completion:
    model: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    timings: Timings
    bytes_per_token: int
    gb_per_s: float
    roof_fraction: float | None
    logits_hash: str


@dataclass(frozen=True)
class Piece:
    text: str
    token_id: int


class Stream:
    def __init__(self, llm: LLM, prompt: str, computed_len: int, params: SamplingParams) -> None:
        self._llm, self._prompt, self._computed_len, self._params = llm, prompt, computed_len, params
        self.shown: list[str] = []

    def __iter__(self) -> Iterator[Piece]:
        words = self._prompt.upper().split(" ")
        if "slow" in self._prompt:
            words = [f"word{i}" for i in range(200)]
        for number, word in enumerate(words[: self._params.max_tokens]):
            if "slow" in self._prompt:
                time.sleep(0.05)
            self.shown.append(word if number == 0 else " " + word)
            yield Piece(self.shown[-1], number)

    @property
    def completion(self) -> Completion:
        return Completion(
            model="fake",
            text="".join(self.shown),
            token_ids=list(range(len(self.shown))),
            prompt_token_ids=list(self._prompt.encode()),
            finish_reason="length" if len(self.shown) == self._params.max_tokens else "stop",
            timings=Timings(0.1, 0.5, 0.25, self._computed_len / 0.5, (len(self.shown) - 1) / 0.25),
            bytes_per_token=self._llm.bytes_per_token,
            gb_per_s=1.5,
            roof_fraction=None,
            logits_hash="0123abcd",
        )


class LLM:
    bytes_per_token = 1 << 20
    made: ClassVar[list[LLM]] = []  # every one there has been

    def __init__(
        self,
        model: str,
        *,
        threads: int | None = None,
        context_len: int | None = None,
        kv_dtype: str = "float16",
        packed: str = "auto",
        batch_invariant: bool = False,
        draft_model: str | None = None,
        progress: Any = None,
    ) -> None:
        options = {"kv_dtype": kv_dtype, "packed": packed, "batch_invariant": batch_invariant}
        EngineConfig(threads=threads, context_len=context_len, **options)
        if model == "missing":
            raise SourceError("'missing' is no known model", "smollm2 is one")
        self.path, self.config, self.threads = Path("fake.gguf"), SimpleNamespace(name="fake"), threads or 1
        self.kv_dtype, self.batch_invariant, self._cached = kv_dtype, batch_invariant, ""
        self.context_len = context_len or 64
        self.made.append(self)

    def stream(self, prompt: str, params: SamplingParams) -> Stream:
        if "long" in prompt:
            raise PromptTooLongError(f"prompt: expected at most 3 tokens, got {len(prompt)}", "--context-len")
        return Stream(self, prompt, len(prompt), params)

    def chat_stream(self, messages: Sequence[Mapping[str, str]], params: SamplingParams) -> Stream:
        whole = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        if "long" in messages[-1]["content"]:
            return self.stream("long", params)
        computed_len = len(whole) - (len(self._cached) if whole.startswith(self._cached) else 0)
        self._cached = whole
        return Stream(self, f"[{whole}]", computed_len, params)

    def close(self) -> None:
        pass

    def save_cache(self, path: Path, prompt: Sequence[int]) -> int:
        return path.write_bytes(bytes(prompt))

    def load_cache(self, path: Path) -> int:
        return len(path.read_bytes())
