"""A tiny model with random weights, written as a real GGUF file, and the same decoder as a naive Python loop.

The loop is written from the op references alone, in float64, with no cache: it recomputes everything for every token.
What the engine says must be what the loop says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headrace.check.blocks import random_matrix
from headrace.ops import kv_formats, norm
from headrace.ops.formats import dequantize
from headrace.ops.page_append import spread_reference
from headrace.weights.gguf_writer import write_gguf

Tensors = dict[str, tuple[str, tuple[int, ...], np.ndarray]]


@dataclass(frozen=True)
class TinyModel:
    """The shape of a small decoder. `extra` is added to the metadata, under the architecture's prefix."""

    architecture: str = "llama"
    num_layers: int = 2
    dim: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    ffn_dim: int = 96
    vocab_size: int = 300
    context_len: int = 256
    tied_head: bool = False
    matrix_format: str = "F32"
    sliding_window: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def interleaved(self) -> bool:
        return self.architecture == "llama"


def metadata_of(model: TinyModel) -> dict[str, Any]:
    """Metadata of the file: the shape, and a byte-level vocabulary of single bytes and pairs."""
    arch = model.architecture
    numbers = {
        "block_count": model.num_layers,
        "context_length": model.context_len,
        "embedding_length": model.dim,
        "feed_forward_length": model.ffn_dim,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": 10000.0,
    } | model.extra
    if model.sliding_window:
        numbers["attention.sliding_window"] = model.sliding_window
    tokens = _byte_tokens(model.vocab_size)
    return {
        "general.architecture": arch,
        "general.name": f"tiny {arch}",
        **{f"{arch}.{key}": value for key, value in numbers.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if t.startswith("<|") else 1 for t in tokens], np.int32),
        "tokenizer.ggml.merges": _merges(model.vocab_size),
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ",
    }


def _byte_letters() -> list[str]:
    """The 256 characters that byte-level vocabularies write bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


def _byte_tokens(vocab_size: int) -> list[str]:
    merged = [merge.replace(" ", "") for merge in _merges(vocab_size)]
    return [*_byte_letters(), "<|end|>", "<|start|>", *merged]


def _merges(vocab_size: int) -> list[str]:
    letters = "etaoinshrdlu"
    pairs = [f"{a} {b}" for a in letters for b in letters]
    assert 258 <= vocab_size <= 258 + len(pairs), f"vocab_size {vocab_size}"
    return pairs[: vocab_size - 258]


def tensors_of(model: TinyModel) -> Tensors:
    """Random tensors by GGUF name: (format, shape, bytes)."""
    random = np.random.default_rng(model.seed)
    tensors: Tensors = {}

    def matrix(name: str, rows: int, cols: int, scale: float) -> None:
        if model.matrix_format in ("F32", "F16", "BF16"):
            values = (random.standard_normal((rows, cols)) * scale).astype(np.float32)
            raw = _float_bytes(values, model.matrix_format)
        else:
            raw = random_matrix(model.matrix_format, rows, cols, random)
        tensors[name] = (model.matrix_format, (rows, cols), raw)

    def vector(name: str, length: int, mean: float) -> None:
        values = (mean + 0.1 * random.standard_normal(length)).astype(np.float32)
        tensors[name] = ("F32", (length,), values.view(np.uint8))

    matrix("token_embd.weight", model.vocab_size, model.dim, 1.0)
    vector("output_norm.weight", model.dim, 1.0)
    if not model.tied_head:
        matrix("output.weight", model.vocab_size, model.dim, 0.3)
    for i in range(model.num_layers):
        _layer_tensors(model, f"blk.{i}", matrix, vector)
    return tensors


def _float_bytes(values: np.ndarray, name: str) -> np.ndarray:
    from headrace.weights.quantize import quantize

    return quantize(values, name)


def _layer_tensors(model: TinyModel, prefix: str, matrix: Any, vector: Any) -> None:
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    scale = model.dim**-0.5
    vector(f"{prefix}.attn_norm.weight", model.dim, 1.0)
    for name, rows in (("q", query), ("k", key), ("v", key)):
        matrix(f"{prefix}.attn_{name}.weight", rows, model.dim, 2 * scale)
        if model.architecture == "qwen2":
            vector(f"{prefix}.attn_{name}.bias", rows, 0.0)
    if model.architecture == "qwen3":
        vector(f"{prefix}.attn_q_norm.weight", model.head_dim, 1.0)
        vector(f"{prefix}.attn_k_norm.weight", model.head_dim, 1.0)
    matrix(f"{prefix}.attn_output.weight", model.dim, query, scale)
    vector(f"{prefix}.ffn_norm.weight", model.dim, 1.0)
    matrix(f"{prefix}.ffn_gate.weight", model.ffn_dim, model.dim, scale)
    matrix(f"{prefix}.ffn_up.weight", model.ffn_dim, model.dim, scale)
    matrix(f"{prefix}.ffn_down.weight", model.dim, model.ffn_dim, model.ffn_dim**-0.5)


def write_tiny_model(path: Path, model: TinyModel | None = None) -> Path:
    """Writes the model as a GGUF file and returns the path."""
    model = model or TinyModel()
    write_gguf(path, metadata_of(model), [(name, *rest) for name, rest in tensors_of(model).items()])
    return path


class NaiveDecoder:
    """The decoder from the op references, in float64, whole sequence at a time.

    kv_dtype: keys and values are what a cache of that type gives back of them in float32; None: they are as computed.
    """

    def __init__(self, model: TinyModel, kv_dtype: str | None = None) -> None:
        self.model, self.kv_dtype = model, kv_dtype
        self.weights = {
            name: dequantize(raw.reshape(shape[0], -1) if len(shape) == 2 else raw, fmt).astype(np.float64)
            for name, (fmt, shape, raw) in tensors_of(model).items()
        }

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits at every position, float64 [tokens, vocab]."""
        x = self.weights["token_embd.weight"][list(ids)]
        for i in range(self.model.num_layers):
            x = x + self._attention(x, f"blk.{i}")
            x = x + self._feed_forward(x, f"blk.{i}")
        head = self.weights["token_embd.weight" if self.model.tied_head else "output.weight"]
        return norm.reference(x, self.weights["output_norm.weight"], 1e-5) @ head.T

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, each the most likely, each from the whole sequence anew."""
        text = list(ids)
        for _ in range(count):
            text.append(int(np.argmax(self.logits(text)[-1])))
        return text[len(ids) :]

    def _heads(self, x: np.ndarray, prefix: str, name: str, heads: int) -> np.ndarray:
        y = x @ self.weights[f"{prefix}.attn_{name}.weight"].T
        if self.model.architecture == "qwen2":
            y = y + self.weights[f"{prefix}.attn_{name}.bias"]
        y = y.reshape(len(x), heads, self.model.head_dim)
        if self.model.architecture == "qwen3" and name != "v":
            y = norm.reference(y, self.weights[f"{prefix}.attn_{name}_norm.weight"], 1e-5)
        return y

    def _attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        model, tokens = self.model, len(x)
        h = norm.reference(x, self.weights[f"{prefix}.attn_norm.weight"], 1e-5)
        query = self._rotated(self._heads(h, prefix, "q", model.num_heads))
        key = self._cached(self._rotated(self._heads(h, prefix, "k", model.num_kv_heads)), spread=True)
        value = self._cached(self._heads(h, prefix, "v", model.num_kv_heads))
        seen = np.tril(np.ones((tokens, tokens), bool))
        if model.sliding_window:
            seen &= ~np.tril(np.ones((tokens, tokens), bool), -model.sliding_window)
        out = np.empty_like(query)
        for head in range(model.num_heads):
            shared = head * model.num_kv_heads // model.num_heads
            scores = query[:, head] @ key[:, shared].T * model.head_dim**-0.5
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ value[:, shared]
        return out.reshape(tokens, -1) @ self.weights[f"{prefix}.attn_output.weight"].T

    def _cached(self, x: np.ndarray, spread: bool = False) -> np.ndarray:
        if self.kv_dtype is None:
            return x
        turned = spread_reference if spread and kv_formats.FORMATS[self.kv_dtype].bits <= 8 else np.asarray
        codes, scales = kv_formats.quantize(turned(x).astype(np.float32), self.kv_dtype, scaled=False)
        return turned(kv_formats.dequantize(codes, scales, self.kv_dtype))

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        half = self.model.head_dim // 2
        frequencies = 10000.0 ** -(np.arange(half) / half)
        angle = np.arange(len(x))[:, None, None] * frequencies
        if self.model.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x[..., :half], x[..., half:]
        turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return np.stack(turned, -1).reshape(x.shape) if self.model.interleaved else np.concatenate(turned, -1)

    def _feed_forward(self, x: np.ndarray, prefix: str) -> np.ndarray:
        h = norm.reference(x, self.weights[f"{prefix}.ffn_norm.weight"], 1e-5)
        gate = h @ self.weights[f"{prefix}.ffn_gate.weight"].T
        up = h @ self.weights[f"{prefix}.ffn_up.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{prefix}.ffn_down.weight"].T
