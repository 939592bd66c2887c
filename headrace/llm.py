"""LLM: a model from a name or a file, ready to answer. The offline front door.

llm = LLM("smollm2")
print(llm.generate("The capital of France is", SamplingParams(max_tokens=16)).text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from headrace.config import EngineConfig, SamplingParams
from headrace.engine.draft import DraftModel
from headrace.engine.engine import Engine
from headrace.engine.request import Request
from headrace.errors import ArgumentError, ModelFileError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kv_cache.storage import bytes_per_token
from headrace.machine import this_machine
from headrace.text.chat import ChatTemplate
from headrace.text.stream import TextStream
from headrace.text.token_rules import token_rules
from headrace.text.tokenizer import Tokenizer
from headrace.weights.gguf import open_gguf
from headrace.weights.load import load_config, load_weights
from headrace.weights.packed import find_packed
from headrace.weights.sources import resolve

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Timings:
    """Seconds, and tokens per second. Prefill counts the tokens it computed; decode leaves the first token out."""

    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Completion:
    """An answer and how it was made. `roof_fraction` is None where the machine's roof was never measured."""

    model: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "stop", "length" or "cancelled"
    timings: Timings
    bytes_per_token: int
    gb_per_s: float
    roof_fraction: float | None
    logits_hash: str


@dataclass(frozen=True)
class Piece:
    """A token and the text it completes, which may be empty: characters are never split."""

    text: str
    token_id: int


class Stream:
    """Pieces of an answer as they come. `completion` is there when the loop has ended."""

    def __init__(self, llm: LLM, request: Request, text: TextStream) -> None:
        self._llm = llm
        self._request = request
        self._text = text
        self._shown: list[str] = []
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def _run(self) -> Iterator[Piece]:
        with closing(self._llm.engine.run(self._request)) as tokens:
            for token in tokens:
                piece = self._piece(token)
                self._shown.append(piece)
                yield Piece(piece, token)
                if self._text.stopped:
                    return

    def _piece(self, token: int) -> str:
        """The text a token completes; at the end also what was held back."""
        request = self._request
        piece = "" if request.finish_reason == "stop" else self._text.push(token)
        if self._text.stopped:
            request.finish_reason = "stop"
        elif request.finish_reason:
            piece += self._text.finish()
        return piece

    @property
    def completion(self) -> Completion:
        """The whole answer so far, with its timings."""
        return self._llm.completion(self._request, "".join(self._shown))


class LLM:
    """A model in memory on this machine's CPU.

    model: a known name ("smollm2"), a file, "hf:owner/repo/file" or "pypi:package==version/file.gguf".
    threads: None for all cores this process may use. context_len: None for the model's own. kv_dtype: what the cache
    of keys and values holds, float32, float16, bfloat16, float8_e4m3fn, int8 or int4. max_requests: that are computed
    at once, each with a context of its own. kv_cache_bytes: what they share; None for all contexts, but at most half of
    the machine's memory, which is taken only as far as it is used. packed: weights that `headrace pack` has kept on
    disk are mapped when there ("auto"), not at all ("never"), or must be there ("require"). draft_model: a smaller
    model with the same tokens, which guesses for requests that ask for it (`SamplingParams.speculate`).
    Raises SourceError, ModelFileError, UnsupportedError, ArgumentError.
    """

    def __init__(
        self,
        model: str | Path = "smollm2",
        *,
        threads: int | None = None,
        context_len: int | None = None,
        kv_dtype: str = "float16",
        chunk_len: int = 512,
        max_requests: int = EngineConfig.max_requests,
        kv_cache_bytes: int | None = None,
        draft_model: str | Path | None = None,
        packed: str = "auto",
        offline: bool = False,
        progress: Progress | None = None,
    ) -> None:
        started = perf_counter()
        options = EngineConfig(
            threads=threads,
            context_len=context_len,
            kv_dtype=kv_dtype,
            chunk_len=chunk_len,
            max_requests=max_requests,
            kv_cache_bytes=kv_cache_bytes,
            packed=packed,
        )
        self.path = resolve(str(model), offline=offline, progress=progress)
        with open_gguf(self.path) as file:
            self.config = load_config(file)
            _check_context(options, self.config.context_len)
            self.kv_bytes_per_token = bytes_per_token(self.config, kv_dtype)
            self.tokenizer = Tokenizer.from_metadata(file.metadata)
            _check_vocabulary(self.tokenizer.vocab_size, self.config.vocab_size)
            self._metadata = file.metadata
            self.pool = native.Pool(threads) if threads else cpu.default_pool()
            weights = load_weights(file, self.config, self.pool, progress, kept=find_packed(file, packed))
        self.threads = self.pool.num_threads
        self.bytes_per_token = weights.bytes_per_token
        drafts = None if draft_model is None else self._load_drafts(str(draft_model), options, offline)
        self._engine: Engine | None = Engine(weights, self.config, options, self.pool, drafts)
        self.context_len = self.engine.context_len
        self.load_s = perf_counter() - started
        self._template: ChatTemplate | None = None

    def _load_drafts(self, model: str, options: EngineConfig, offline: bool) -> DraftModel:
        with open_gguf(resolve(model, offline=offline)) as file:
            config, tokenizer = load_config(file), Tokenizer.from_metadata(file.metadata)
            num_tokens, vocab_size = self.config.vocab_size, config.vocab_size
            if vocab_size != num_tokens or tokenizer.end_ids != self.tokenizer.end_ids:
                raise ArgumentError(
                    f"draft_model: expected a model with the same {num_tokens} tokens, got {vocab_size}"
                )
            context_len = min(self.config.context_len, config.context_len, options.context_len or config.context_len)
            weights = load_weights(file, config, self.pool)
        return DraftModel(weights, config, replace(options, context_len=context_len), self.pool)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise ArgumentError("model: expected an open one, this LLM is closed", "make a new LLM")
        return self._engine

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, add_special: bool = True
    ) -> Completion:
        """The answer to a raw prompt: text, or a list of token ids."""
        return _finished(self.stream(prompt, params, add_special=add_special))

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, add_special: bool = True
    ) -> Stream:
        """The same, piece by piece. Checks happen here, work happens while the stream is read."""
        if isinstance(prompt, str):
            return self._stream(self.tokenizer.encode(prompt, add_special=add_special), params, continues=True)
        return self._stream(prompt, params, continues=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Completion:
        """The assistant's answer to a conversation: [{"role": "user", "content": "hi"}]."""
        return _finished(self.chat_stream(messages, params))

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Stream:
        """The same, piece by piece. Only what the last prompt or answer did not begin with is computed."""
        return self._stream(self.render(messages), params, continues=False)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The conversation as token ids, through the model's chat template."""
        return self.tokenizer.encode(self.chat_template.render(messages), add_special=False)

    @property
    def chat_template(self) -> ChatTemplate:
        """What makes a prompt of a conversation; UnsupportedError where the file has none."""
        if self._template is None:
            self._template = ChatTemplate.from_metadata(self._metadata)
        return self._template

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits at every position: float32 [tokens, vocab]."""
        return self.engine.logits(ids)

    def close(self) -> None:
        """Lets go of the model's memory. What needs the model then raises ArgumentError; closing again does nothing."""
        self._engine = None

    def _stream(self, ids: Sequence[int], params: SamplingParams | None, *, continues: bool) -> Stream:
        params = params or SamplingParams()
        request = self.engine.request(ids, params, token_rules(self.tokenizer, params))
        return Stream(self, request, TextStream(self.tokenizer, params.stop, continues=continues))

    def completion(self, request: Request, text: str) -> Completion:
        """What a request has come to, with its timings; `text` is that of its tokens."""
        timings = _timings(self.load_s, request)
        read_bytes = self.bytes_per_token + self.kv_bytes_per_token * _mean_depth(request)
        gb_per_s = read_bytes * timings.decode_tokens_per_s / 1e9
        roof = this_machine().roof_for(self.bytes_per_token, self.threads)
        return Completion(
            model=self.config.name,
            text=text,
            token_ids=list(request.token_ids),
            prompt_token_ids=list(request.prompt_ids),
            finish_reason=request.finish_reason or "length",
            timings=timings,
            bytes_per_token=self.bytes_per_token,
            gb_per_s=gb_per_s,
            roof_fraction=gb_per_s * 1e9 / roof if roof else None,
            logits_hash=request.logits_hash,
        )


def _finished(stream: Stream) -> Completion:
    for _ in stream:
        pass
    return stream.completion


def _timings(load_s: float, request: Request) -> Timings:
    prefilled = len(request.prompt_ids) - request.reused_len
    decoded = len(request.token_ids) - 1
    return Timings(
        load_s=load_s,
        prefill_s=request.prefill_s,
        decode_s=request.decode_s,
        prefill_tokens_per_s=prefilled / request.prefill_s if request.prefill_s else 0.0,
        decode_tokens_per_s=decoded / request.decode_s if request.decode_s else 0.0,
    )


def _mean_depth(request: Request) -> float:
    """Keys that a decoded token read, on average."""
    return len(request.prompt_ids) + len(request.token_ids) / 2


def _check_vocabulary(num_tokens: int, num_rows: int) -> None:
    # NOTE: an id without a token would end an answer with an error, a token without a row a prompt.
    if num_tokens != num_rows:
        raise ModelFileError(
            f"tokenizer.ggml.tokens: expected {num_rows}, one per row of the embedding, got {num_tokens}"
        )


def _check_context(options: EngineConfig, model_context_len: int) -> None:
    if options.context_len is not None and options.context_len > model_context_len:
        raise ArgumentError(
            f"context_len: expected at most {model_context_len} (the model's own), got {options.context_len}"
        )
