"""From a GGUF file to packed weights: every tensor checked against the configuration, packed, and let go of.

Matrices are read piece by piece, each thread into memory of its own that stays in its cache, and packed from there into
one block for all of them: the peak is the packed model. Vectors are small and come from the mapped file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace.config import ModelConfig
from headrace.errors import ModelFileError, UnsupportedError
from headrace.kernels.cpu import _native as native
from headrace.models.families import SMALLEST_REAL, config_from
from headrace.models.layers import AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights
from headrace.ops.formats import dequantize
from headrace.ops.linear import PackedWeight
from headrace.weights.gguf import GGUFFile, TensorInfo

Progress = Callable[[str, int, int], None]
Matrices = Callable[[TensorInfo], PackedWeight]  # where packed matrices come from


@dataclass
class Loader:
    """Takes tensors out of one file by name."""

    file: GGUFFile
    matrices: Matrices
    progress: Progress | None = None
    done_bytes: int = 0
    taken: set[str] = field(default_factory=set)

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Where the tensor lies; its shape must be the one the configuration asks for."""
        info = self.file.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.file.path}: tensor {name!r} is missing")
        if info.shape != shape:
            raise ModelFileError(f"tensor {name!r}: expected {list(shape)}, the file has {list(info.shape)}")
        self.taken.add(name)
        return info

    def matrix(self, name: str, rows: int, cols: int) -> PackedWeight:
        info = self.info(name, (rows, cols))
        packed = self.matrices(info)
        self._count(info)
        return packed

    def vector(self, name: str, length: int) -> np.ndarray:
        info = self.info(name, (length,))
        values = dequantize(self.file.data(name), info.format)
        self.file.release(name)
        self._count(info)
        if not np.isfinite(values).all():
            raise ModelFileError(f"tensor {name!r}: expected finite numbers, got {values[~np.isfinite(values)][0]}")
        return np.array(values, np.float32).reshape(-1)

    def optional_vector(self, name: str, length: int) -> np.ndarray | None:
        return self.vector(name, length) if name in self.file.tensors else None

    def _count(self, info: TensorInfo) -> None:
        self.done_bytes += info.num_bytes
        if self.progress:
            self.progress("loading", self.done_bytes, self.file.total_bytes)


def load_config(file: GGUFFile) -> ModelConfig:
    """The model's numbers, from the metadata and the embedding's shape."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{file.path}: no embedding 'token_embd.weight' [vocab, dim]")
    return config_from(file.metadata, embedding.shape[0], "output.weight" not in file.tensors)


def load_weights(
    file: GGUFFile,
    config: ModelConfig,
    pool: native.Pool,
    progress: Progress | None = None,
    *,
    kept: Matrices | None = None,
) -> ModelWeights:
    """All weights of the model, packed. Raises ModelFileError for a tensor that is missing or of another shape.

    kept: matrices that are packed already (`weights/packed.py`); the file then gives the vectors alone.
    """
    _check_layer_count(file, config)
    with nullcontext(kept) if kept else pack_matrices(file, pool) as matrices:
        return _load(Loader(file, matrices, progress), config)


@contextmanager
def pack_matrices(file: GGUFFile, pool: native.Pool, *, together: bool = True) -> Iterator[Matrices]:
    """What reads and packs a matrix, all into one block if `together`, else each into memory of its own."""
    with file.reading() as descriptor:
        with suppress(OSError, AttributeError):  # advice: not every system and file system takes it
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        block = _room_for(file) if together else None

        def pack(info: TensorInfo) -> PackedWeight:
            arena = block or native.Arena(native.packed_bytes(info.format, info.shape))
            return native.pack_file(pool, arena, info.format, info.shape, descriptor, info.offset)

        yield pack


def _room_for(file: GGUFFile) -> native.Arena:
    """One block for all matrices. NOTE: of address space; memory is taken as it is written."""
    matrices = [info for info in file.tensors.values() if len(info.shape) == 2]
    return native.Arena(sum(native.packed_bytes(info.format, info.shape) for info in matrices))


def _load(loader: Loader, config: ModelConfig) -> ModelWeights:
    embedding = loader.matrix("token_embd.weight", config.vocab_size, config.dim)
    head = embedding if config.tied_head else loader.matrix("output.weight", config.vocab_size, config.dim)
    layers = tuple(_layer(loader, f"blk.{i}", config) for i in range(config.num_layers))
    norm = loader.vector("output_norm.weight", config.dim)
    factors = _rope_factors(loader, config)
    _check_nothing_left(loader, config)
    return ModelWeights(embedding, layers, norm, head, factors)


def _check_layer_count(file: GGUFFile, config: ModelConfig) -> None:
    # NOTE: a lying block_count must fail before a loop of that length, not inside it.
    last, beyond = (f"blk.{i}.attn_norm.weight" for i in (config.num_layers - 1, config.num_layers))
    if last not in file.tensors:
        raise ModelFileError(f"{file.path}: says {config.num_layers} layers, but tensor {last!r} is missing")
    if beyond in file.tensors:
        raise ModelFileError(f"{file.path}: says {config.num_layers} layers, but holds tensor {beyond!r}")


def _check_nothing_left(loader: Loader, config: ModelConfig) -> None:
    # NOTE: a model computed without one of its tensors (a bias, a router) answers, and answers nonsense.
    for name in loader.file.tensors:
        if name not in loader.taken:
            raise UnsupportedError(
                f"{loader.file.path}: tensor {name!r} has no place in the {config.architecture} models supported here"
            )


def _rope_factors(loader: Loader, config: ModelConfig) -> np.ndarray | None:
    name = "rope_freqs.weight"
    factors = loader.optional_vector(name, config.rope.rotary_dim // 2)
    if factors is not None and not (factors > SMALLEST_REAL).all():
        raise ModelFileError(f"tensor {name!r}: expected positive numbers, got {factors.min()}..{factors.max()}")
    return factors


def _layer(loader: Loader, prefix: str, config: ModelConfig) -> LayerWeights:
    return LayerWeights(_attention(loader, prefix, config), _feed_forward(loader, prefix, config))


def _attention(loader: Loader, prefix: str, config: ModelConfig) -> AttentionWeights:
    query_dim = config.num_heads * config.head_dim
    key_dim, value_dim = config.num_kv_heads * config.head_dim, config.num_kv_heads * config.value_head_dim
    optional: dict[str, Any] = {}
    if config.qkv_bias:
        widths = {"q": query_dim, "k": key_dim, "v": value_dim}
        optional["biases"] = tuple(loader.vector(f"{prefix}.attn_{n}.bias", width) for n, width in widths.items())
    if config.qk_norm:
        optional["query_norm"] = loader.vector(f"{prefix}.attn_q_norm.weight", config.head_dim)
        optional["key_norm"] = loader.vector(f"{prefix}.attn_k_norm.weight", config.head_dim)
    return AttentionWeights(
        norm=loader.vector(f"{prefix}.attn_norm.weight", config.dim),
        query=loader.matrix(f"{prefix}.attn_q.weight", query_dim, config.dim),
        key=loader.matrix(f"{prefix}.attn_k.weight", key_dim, config.dim),
        value=loader.matrix(f"{prefix}.attn_v.weight", value_dim, config.dim),
        output=loader.matrix(f"{prefix}.attn_output.weight", config.dim, config.num_heads * config.value_head_dim),
        **optional,
    )


def _feed_forward(loader: Loader, prefix: str, config: ModelConfig) -> FeedForwardWeights:
    return FeedForwardWeights(
        norm=loader.vector(f"{prefix}.ffn_norm.weight", config.dim),
        gate=loader.matrix(f"{prefix}.ffn_gate.weight", config.ffn_dim, config.dim),
        up=loader.matrix(f"{prefix}.ffn_up.weight", config.ffn_dim, config.dim),
        down=loader.matrix(f"{prefix}.ffn_down.weight", config.dim, config.ffn_dim),
    )
