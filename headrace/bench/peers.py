"""Other engines behind one small interface, so that `bench versus` can take turns with them.

A peer holds the model with some tokens cached (`hold`); `prefill` and `decode` compute tokens after those, give
tokens/s, and leave the cache as it was. Their own overheads count: this is what a user of their Python packages gets.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from headrace.bench.model import decode_speed, prefill_speed

if TYPE_CHECKING:
    from headrace.llm import LLM


class Peer(Protocol):
    """An engine with a model in it."""

    name: str

    def hold(self, ids: list[int]) -> None:
        """Cache exactly these tokens."""

    def prefill(self, ids: list[int]) -> float:
        """Tokens/s of computing these in one go."""

    def decode(self, ids: list[int]) -> float:
        """Tokens/s of computing these one by one."""


class Headrace:
    """Ourselves. Decode draws its own tokens, sampling included."""

    name = "headrace"

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._held: list[int] = []

    def hold(self, ids: list[int]) -> None:
        self._held = ids
        if ids:
            self.prefill(ids[-1:])

    def prefill(self, ids: list[int]) -> float:
        return prefill_speed(self._llm, self._held, ids)

    def decode(self, ids: list[int]) -> float:
        return decode_speed(self._llm, self._held, len(ids))


# The types of its cache: (name, ggml's number); fp8 it has none.
_LLAMA_CPP_CACHES = {
    "float32": ("F32", 0),
    "float16": ("F16", 1),
    "bfloat16": ("BF16", 30),
    "int8": ("Q8_0", 8),
    "int4": ("Q4_0", 2),
}
_QUANTIZED_CACHES = ("Q8_0", "Q4_0")


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level evaluation."""

    def __init__(
        self, path: Path, threads: int, context_len: int, *, flash_attention: bool, cache: tuple[str, int] = ("F16", 1)
    ) -> None:
        import llama_cpp

        self.name = f"llama.cpp, flash attention {'on' if flash_attention else 'off'}, {cache[0]} cache"
        with _silence():  # `verbose=False` does not reach every line the library prints
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=context_len,
                n_batch=512,
                n_ubatch=512,
                n_threads=threads,
                n_threads_batch=threads,
                flash_attn=flash_attention,
                type_k=cache[1],
                type_v=cache[1],
                verbose=False,
            )
        self._wait = llama_cpp.llama_synchronize
        self._held_len = 0

    def hold(self, ids: list[int]) -> None:
        self._llama.reset()
        self._evaluate(ids)
        self._held_len = len(ids)

    def prefill(self, ids: list[int]) -> float:
        return self._timed(ids, lambda: self._evaluate(ids))

    def decode(self, ids: list[int]) -> float:
        def one_by_one() -> None:
            for token in ids:
                self._evaluate([token])

        return self._timed(ids, one_by_one)

    def _evaluate(self, ids: list[int]) -> None:
        self._llama.eval(ids)
        self._wait(self._llama.ctx)

    def _timed(self, ids: list[int], work: Callable[[], None]) -> float:
        speed = _tokens_per_s(ids, work)
        self._llama.n_tokens = self._held_len  # the next evaluation forgets what lies behind
        return speed


class Transformers:
    """transformers on PyTorch's CPU kernels: the same file dequantized to bfloat16."""

    name = "transformers, bfloat16"

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._torch, self._new_cache = torch, transformers.DynamicCache
        with _silence():
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.bfloat16
            ).eval()
        self._cache = self._new_cache()

    def hold(self, ids: list[int]) -> None:
        self._cache = self._new_cache()
        if ids:
            self._evaluate(ids)

    def prefill(self, ids: list[int]) -> float:
        return self._timed(ids, lambda: self._evaluate(ids))

    def decode(self, ids: list[int]) -> float:
        def one_by_one() -> None:
            for token in ids:
                self._evaluate([token])

        return self._timed(ids, one_by_one)

    def _evaluate(self, ids: list[int]) -> None:
        with self._torch.inference_mode():
            tokens = self._torch.tensor([ids])
            self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def _timed(self, ids: list[int], work: Callable[[], None]) -> float:
        held_len = self._cache.get_seq_length()
        speed = _tokens_per_s(ids, work)
        if held_len:
            self._cache.crop(-len(ids))
        else:
            self._cache = self._new_cache()
        return speed


def _tokens_per_s(ids: list[int], work: Callable[[], None]) -> float:
    started = perf_counter()
    work()
    return len(ids) / (perf_counter() - started)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on this process's stdout and stderr, native prints included."""
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:
        try:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _llama_cpps(path: Path, threads: int, context_len: int, kv_dtype: str) -> list[Any]:
    """With and without flash attention, which it needs for a quantized cache."""
    cache = _LLAMA_CPP_CACHES.get(kv_dtype, _LLAMA_CPP_CACHES["float16"])
    ways = (True,) if cache[0] in _QUANTIZED_CACHES else (False, True)
    return [LlamaCpp(path, threads, context_len, flash_attention=flash, cache=cache) for flash in ways]


# name -> the modules it needs, and how to open a model with it: path, threads, context_len, kv_dtype
PEERS: dict[str, tuple[tuple[str, ...], Callable[[Path, int, int, str], list[Any]]]] = {
    "llama.cpp": (
        ("llama_cpp",),
        _llama_cpps,
    ),
    "transformers": (
        ("transformers", "torch", "gguf", "accelerate"),
        lambda path, threads, context_len, kv_dtype: [Transformers(path, threads)],
    ),
}


def missing_modules(name: str) -> list[str]:
    """What a peer needs and this Python does not have."""
    return [module for module in PEERS[name][0] if importlib.util.find_spec(module) is None]
