"""`headrace bench synth`: a model of a real one's shape with random weights, as a file that every engine can run.

Speed depends on shapes and formats, not on what the weights say, so a file made here stands in for one that nobody has
to download. Every tensor is stored on its own: an engine reads as many bytes per token as for the real model.

Weights are normal, of standard deviation `WEIGHT_STD`. Quantizing billions of them one by one would take an hour: a
million are quantized once per format, and tensors are made of pieces drawn from these, each piece whole blocks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import ArgumentError, CapacityError
from headrace.ops.formats import Bytes, get_format
from headrace.weights.gguf_writer import Tensor, write_gguf
from headrace.weights.quantize import quantize
from headrace.weights.recipes import Recipe, choose_formats, get_recipe
from headrace.weights.whole_file import disk_error

WEIGHT_STD = 0.02
_NUM_DRAWN = 2**20  # values quantized once per format
_PIECE_LEN = 256  # values, the longest block there is; fewer where rows are no multiple of it
_WRITE_BYTES = 2**23

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the llama family; lengths in elements."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    tied_head: bool  # the embedding is the head
    rope_base: float
    context_len: int = 32768


SHAPES: Mapping[str, Shape] = {
    "135m": Shape(30, 576, 9, 3, 64, 1536, 49152, True, 1e5),  # SmolLM2-135M
    "1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, True, 5e5),  # Llama-3.2-1B
    "3b": Shape(28, 3072, 24, 8, 128, 8192, 128256, True, 5e5),  # Llama-3.2-3B
    "7b": Shape(32, 4096, 32, 8, 128, 14336, 32000, False, 1e6),  # Mistral-7B
    "8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, False, 5e5),  # Llama-3.1-8B
}


def write_synthetic(path: Path, shape: str, recipe: str, *, seed: int = 0, progress: Progress | None = None) -> None:
    """Writes the model; the file appears when it is whole. One seed, one file.

    shape: a name in SHAPES; recipe: one in weights.recipes, as for `headrace quantize`. Raises ArgumentError for others
    and for a folder that cannot be written to, CapacityError when the disk has too little space.
    """
    if shape not in SHAPES:
        raise ArgumentError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    if seed < 0:
        raise ArgumentError(f"seed: expected a whole number >= 0, got {seed}")
    write_shape(path, SHAPES[shape], recipe, seed=seed, progress=progress, name=f"synthetic {shape}")


def write_shape(
    path: Path,
    shape: Shape,
    recipe: str,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    name: str = "synthetic",
) -> None:
    """The same for any shape."""
    chosen = get_recipe(recipe)
    shapes = tensor_shapes(shape)
    formats = choose_formats(chosen, shapes, shape.num_heads // shape.num_kv_heads)
    total_bytes = sum(_tensor_bytes(formats[tensor], shapes[tensor]) for tensor in shapes)
    _check_space(path, total_bytes)
    filler = _Filler(seed, total_bytes, progress or (lambda message, done, total: None))
    tensors: list[Tensor] = [
        (tensor, formats[tensor], sizes, filler.pieces(number, formats[tensor], sizes))
        for number, (tensor, sizes) in enumerate(shapes.items())
    ]
    write_gguf(path, metadata_of(shape, chosen, name), tensors)


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by name, rows first."""
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab_size, shape.dim)}
    for layer in range(shape.num_layers):
        own = {
            "attn_norm": (shape.dim,),
            "attn_q": (heads, shape.dim),
            "attn_k": (kv_heads, shape.dim),
            "attn_v": (kv_heads, shape.dim),
            "attn_output": (shape.dim, heads),
            "ffn_norm": (shape.dim,),
            "ffn_gate": (shape.ffn_dim, shape.dim),
            "ffn_up": (shape.ffn_dim, shape.dim),
            "ffn_down": (shape.dim, shape.ffn_dim),
        }
        shapes |= {f"blk.{layer}.{role}.weight": sizes for role, sizes in own.items()}
    shapes["output_norm.weight"] = (shape.dim,)
    if not shape.tied_head:
        shapes["output.weight"] = (shape.vocab_size, shape.dim)
    return shapes


def metadata_of(shape: Shape, recipe: Recipe, name: str) -> dict[str, Any]:
    """What the file says of itself, its vocabulary included."""
    numbers = {
        "block_count": shape.num_layers,
        "context_length": shape.context_len,
        "embedding_length": shape.dim,
        "feed_forward_length": shape.ffn_dim,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": shape.rope_base,
        "vocab_size": shape.vocab_size,
    }
    return {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": recipe.file_type,
        "general.quantization_version": 2,
        **{f"llama.{key}": value for key, value in numbers.items()},
        **_vocabulary(shape.vocab_size),
    }


def _vocabulary(size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary that can spell any text, byte by byte, padded with words that no merge reaches."""
    marks = ["<unk>", "<s>", "</s>"]
    spelled = [*marks, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    if size < len(spelled):
        raise ArgumentError(f"shape: expected a vocabulary of at least {len(spelled)} tokens, got {size}")
    words = [f"\u2581word{number}" for number in range(size - len(spelled))]
    kinds = np.array([2, 3, 3, *[6] * 256, 1, *[1] * len(words)], np.int32)  # unknown, control, byte, normal
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": spelled + words,
        "tokenizer.ggml.scores": -np.arange(size, dtype=np.float32),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ",
    }


class _Filler:
    """Gives each tensor its random bytes, a few megabytes at a time."""

    def __init__(self, seed: int, total_bytes: int, progress: Progress) -> None:
        self.seed = seed
        self.total_bytes = total_bytes
        self.progress = progress
        self.done_bytes = 0
        self.drawn: dict[tuple[str, int], Bytes] = {}

    def pieces(self, number: int, format_name: str, shape: tuple[int, ...]) -> Iterator[Bytes]:
        random = np.random.default_rng([self.seed, number])
        if len(shape) == 1:  # a norm: about 1
            values = 1 + 0.1 * random.standard_normal(shape, np.float32)
            yield self._counted(quantize(values.astype(np.float32), format_name))
            return
        blocks = self._quantized(format_name, gcd(shape[-1], _PIECE_LEN))
        left = _tensor_bytes(format_name, shape) // blocks.shape[1]
        while left:
            count = min(left, max(1, _WRITE_BYTES // blocks.shape[1]))
            yield self._counted(np.take(blocks, random.integers(0, len(blocks), count), axis=0))
            left -= count

    def _quantized(self, format_name: str, piece_len: int) -> Bytes:
        """uint8 [pieces, piece_bytes]: what the tensors of a format are made of."""
        key = (format_name, piece_len)
        if key not in self.drawn:
            random = np.random.default_rng([self.seed, piece_len, get_format(format_name).gguf_id])
            values = random.standard_normal((_NUM_DRAWN // piece_len, piece_len), np.float32)
            self.drawn[key] = quantize(values * np.float32(WEIGHT_STD), format_name)
        return self.drawn[key]

    def _counted(self, piece: Bytes) -> Bytes:
        self.done_bytes += piece.nbytes
        self.progress("writing", self.done_bytes, self.total_bytes)
        return piece


def _tensor_bytes(format_name: str, shape: tuple[int, ...]) -> int:
    return prod(shape[:-1]) * get_format(format_name).row_bytes(shape[-1])


def _check_space(path: Path, num_bytes: int) -> None:
    # NOTE: a disk that fills up minutes later is found by the writer; that it must is known now.
    try:
        free_bytes = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise disk_error(path, error) from error
    if num_bytes > free_bytes:
        told = f"{path}: expected {num_bytes / 1e9:.1f} GB of free space, got {free_bytes / 1e9:.1f} GB"
        raise CapacityError(told, hint=f"free some space in {path.parent}, or a smaller --shape or --type")
