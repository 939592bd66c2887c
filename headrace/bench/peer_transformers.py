"""transformers on PyTorch's CPU kernels: the same file dequantized to bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench.accuracy import divergence
from headrace.bench.peers import Opening, steps_per_s


def open_peers(opening: Opening) -> dict[str, Transformers]:
    return {"bfloat16": Transformers(opening)}


def start_code(opening: Opening) -> str:
    """What its users write for an answer, without the template that some tokenizers from such files lack."""
    return """
import sys
import pathlib, torch, transformers
torch.set_num_threads(int(sys.argv[2]))
path = pathlib.Path(sys.argv[1])
given = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
tokenizer = transformers.AutoTokenizer.from_pretrained(**given)
model = transformers.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.bfloat16)
print(tokenizer.decode(model.generate(**tokenizer("hi", return_tensors="pt"), max_new_tokens=1)[0]), flush=True)
"""


def about() -> str:
    """The kernels that PyTorch chose."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


class Transformers:
    """A model and one cache: of a sequence, or of many of equal length."""

    def __init__(self, opening: Opening) -> None:
        import torch
        import transformers

        torch.set_num_threads(opening.threads)
        path = Path(opening.path)
        self._torch, self._new_cache = torch, transformers.DynamicCache
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.bfloat16
        ).eval()
        self.arrange(opening.context_len, opening.sequences)

    def arrange(self, context_len: int, sequences: int) -> None:
        self._cache = self._new_cache()
        self._held: list[int] = []
        self._ids: list[int] = []

    def hold(self, ids: list[int]) -> None:
        same = next((i for i, (a, b) in enumerate(zip(ids, self._held, strict=False)) if a != b), None)
        keep = min(len(ids), len(self._held)) if same is None else same
        self._forget(keep)
        if ids[keep:]:
            self._evaluate([ids[keep:]])
        self._held = ids

    def prefill(self, ids: list[int]) -> float:
        return len(ids) * self._speed(lambda: self._evaluate([ids]), 1, 0.0)

    def decode(self, ids: list[int], limit_s: float) -> float:
        tokens = iter(ids)
        return self._speed(lambda: self._evaluate([[next(tokens)]]), len(ids), limit_s)

    def fill(self, ids: list[int], sequences: int) -> None:
        self._ids = ids

    def decode_batch(self, sequences: int, steps: int, limit_s: float) -> float:
        if self._shape() != (sequences, len(self._ids)):
            self._cache, self._held = self._new_cache(), []
            self._evaluate([self._ids] * sequences)
        return sequences * self._speed(lambda: self._evaluate([[1]] * sequences), steps, limit_s)

    def divergence(self, exact: str, ids: list[int]) -> list[float]:
        self._cache, self._held = self._new_cache(), []
        logits = self._evaluate([ids], outputs=0).logits[0].float().numpy()
        self._cache = self._new_cache()
        return [float(x) for x in divergence(np.load(exact, mmap_mode="r"), logits)]

    def _shape(self) -> tuple[int, int]:
        """Sequences and tokens in the cache."""
        length = self._cache.get_seq_length()
        layers: Any = self._cache.layers
        return (layers[0].keys.shape[0] if length else 0), length

    def _evaluate(self, ids: list[list[int]], outputs: int = 1) -> Any:
        """Logits of the last `outputs` positions, 0 for all."""
        with self._torch.inference_mode():
            tokens = self._torch.tensor(ids)
            return self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=outputs)

    def _speed(self, step: Any, most: int, limit_s: float) -> float:
        held_len = self._cache.get_seq_length()
        speed = steps_per_s(step, most, limit_s)
        self._forget(held_len)
        return speed

    def _forget(self, keep_len: int) -> None:
        if not keep_len:
            self._cache = self._new_cache()
        elif surplus := self._cache.get_seq_length() - keep_len:
            self._cache.crop(-surplus)
