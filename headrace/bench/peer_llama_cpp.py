"""llama.cpp through the C functions that llama-cpp-python binds, with and without flash attention.

Its high-level class copies logits and bookkeeping at each token; here nothing is timed but the library's own work.
Both ways share one model; their contexts are made when first used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from headrace.bench.accuracy import divergence
from headrace.bench.peers import Opening, steps_per_s

_BATCH_LEN, _CHUNK_LEN = 2048, 512  # its own defaults

# The types of its cache: (name, ggml's number); fp8 it has none.
_CACHES = {
    "float32": ("F32", 0),
    "float16": ("F16", 1),
    "bfloat16": ("BF16", 30),
    "int8": ("Q8_0", 8),
    "int4": ("Q4_0", 2),
}
_QUANTIZED = ("Q8_0", "Q4_0")


def cache_ways(kv_dtype: str) -> dict[str, tuple[bool, int]]:
    """Name of each way to run it -> flash attention, type of the cache. A quantized cache needs flash attention."""
    cache, number = _CACHES.get(kv_dtype, _CACHES["float16"])
    ways = (True,) if cache in _QUANTIZED else (False, True)
    return {f"flash attention {'on' if flash else 'off'}, {cache} cache": (flash, number) for flash in ways}


def open_peers(opening: Opening) -> dict[str, LlamaCpp]:
    model = _open_model(opening.path)
    ways = cache_ways(opening.kv_dtype).items()
    return {name: LlamaCpp(model, opening, flash, cache) for name, (flash, cache) in ways}


def start_code(opening: Opening) -> str:
    """What its users write for an answer."""
    return """
import sys
from llama_cpp import Llama
threads = int(sys.argv[2])
llama = Llama(sys.argv[1], n_threads=threads, n_threads_batch=threads, verbose=False)
messages = [{"role": "user", "content": "hi"}]
for piece in llama.create_chat_completion(messages, max_tokens=1, temperature=0.0, stream=True):
    if piece["choices"][0]["delta"].get("content") is not None:
        print(piece["choices"][0]["delta"]["content"], flush=True)
"""


def about() -> str:
    """What the library was built for."""
    import llama_cpp

    parts = llama_cpp.llama_print_system_info().decode().replace(":", "|").split("|")
    return " ".join(part.split("=")[0].strip() for part in parts if part.strip().endswith("= 1"))


def _open_model(path: str) -> Any:
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not open {path}")
    return model


class LlamaCpp:
    """One context at a time over a shared model."""

    def __init__(self, model: Any, opening: Opening, flash: bool, cache: int) -> None:
        import llama_cpp

        self._lib, self._model = llama_cpp, model
        self._threads, self._flash, self._cache = opening.threads, flash, cache
        self._room = (opening.context_len, opening.sequences)
        self._context: Any = None
        self._batch = llama_cpp.llama_batch_init(_BATCH_LEN, 0, 1)
        self._held: list[int] = []
        self._filled: list[int] = []  # by the first sequences of a batch
        self._num_filled = 0

    def arrange(self, context_len: int, sequences: int) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._context, self._held, self._filled, self._num_filled = None, [], [], 0
        self._room = (context_len, sequences)

    def _opened(self) -> Any:
        if self._context is None:
            self._context = self._lib.llama_init_from_model(self._model, self._parameters())
            if not self._context:
                raise RuntimeError("llama.cpp makes no context of this size")
        return self._context

    def _parameters(self) -> Any:
        context_len, sequences = self._room
        asked = {
            "n_ctx": sequences * _padded(context_len),
            "n_seq_max": sequences,
            "n_batch": _BATCH_LEN,
            "n_ubatch": _CHUNK_LEN,
            "n_threads": self._threads,
            "n_threads_batch": self._threads,
            "flash_attn_type": int(self._flash),
            "type_k": self._cache,
            "type_v": self._cache,
        }
        parameters = self._lib.llama_context_default_params()
        for name, value in asked.items():
            setattr(parameters, name, value)
        return parameters

    def hold(self, ids: list[int]) -> None:
        same = next((i for i, (a, b) in enumerate(zip(ids, self._held, strict=False)) if a != b), None)
        keep = min(len(ids), len(self._held)) if same is None else same
        self._forget(0, keep)
        self._compute(ids[keep:], keep)
        self._held, self._filled, self._num_filled = ids, [], 0

    def prefill(self, ids: list[int]) -> float:
        return len(ids) * self._speed(lambda: self._compute(ids, len(self._held)), 1, 0.0)

    def decode(self, ids: list[int], limit_s: float) -> float:
        steps = iter(enumerate(ids, len(self._held)))

        def step() -> None:
            position, token = next(steps)
            self._compute([token], position)

        return self._speed(step, len(ids), limit_s)

    def _speed(self, step: Any, most: int, limit_s: float) -> float:
        self._opened()
        speed = steps_per_s(step, most, limit_s)
        self._forget(0, len(self._held))
        return speed

    def fill(self, ids: list[int], sequences: int) -> None:
        first = self._num_filled if ids == self._filled else 0
        for sequence in range(first, sequences):
            self._forget(sequence, 0)
            self._compute(ids, 0, sequence)
        self._held, self._filled, self._num_filled = [], ids, max(first, sequences)

    def decode_batch(self, sequences: int, steps: int, limit_s: float) -> float:
        depth = len(self._filled)
        positions = iter(range(depth, depth + steps))

        def step() -> None:
            position = next(positions)
            self._run([(position, position, sequence, True) for sequence in range(sequences)])

        speed = sequences * steps_per_s(step, steps, limit_s)
        for sequence in range(sequences):
            self._forget(sequence, depth)
        return speed

    def answer(self, prompts: list[list[int]], answer_len: int) -> dict[str, Any]:
        """Computes all prompts, then so many tokens behind each, all at once. seconds: of all of it. steady: tokens/s
        behind the prompts."""
        for sequence in range(len(prompts)):
            self._forget(sequence, 0)
        self._held, self._filled, self._num_filled = [], [], 0
        started = perf_counter()
        self._compute_all(prompts)
        begun = perf_counter()
        depths = [len(prompt) for prompt in prompts]
        for step in range(answer_len - 1):
            self._run([(step, depth + step, sequence, True) for sequence, depth in enumerate(depths)])
        ended = perf_counter()
        steady = len(prompts) * (answer_len - 1) / (ended - begun) if answer_len > 1 else None
        return {"seconds": ended - started, "steady": steady}

    def _compute_all(self, prompts: Sequence[list[int]]) -> None:
        """All prompts in as few calls as its batches have room for."""
        tokens = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for first in range(0, len(tokens), _BATCH_LEN):
            self._run(tokens[first : first + _BATCH_LEN])

    def divergence(self, exact: str, ids: list[int]) -> list[float]:
        expected = np.load(exact, mmap_mode="r")
        self.hold([])
        found: list[float] = []
        for first in range(0, len(ids), _CHUNK_LEN):
            part = ids[first : first + _CHUNK_LEN]
            self._run([(token, first + i, 0, True) for i, token in enumerate(part)])
            shape = (len(part), expected.shape[1])
            logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape)
            found += [float(x) for x in divergence(expected[first : first + len(part)], logits)]
        self._forget(0, 0)
        return found

    def _compute(self, ids: Sequence[int], first: int, sequence: int = 0) -> None:
        """Runs tokens of one sequence from a position on; only the last one's logits are asked for."""
        for start in range(0, len(ids), _BATCH_LEN):
            part = ids[start : start + _BATCH_LEN]
            last = len(ids) - 1
            self._run([(token, first + i, sequence, i == last) for i, token in enumerate(part, start)])

    def _run(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Runs (token, position, sequence, whether its logits are wanted) and waits until it is done."""
        context, batch = self._opened(), self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := self._lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        self._lib.llama_synchronize(context)

    def _forget(self, sequence: int, keep_len: int) -> None:
        memory = self._lib.llama_get_memory(self._opened())
        self._lib.llama_memory_seq_rm(memory, ctypes.c_int32(sequence), keep_len, -1)


def _padded(context_len: int) -> int:
    return -(-context_len // 256) * 256
