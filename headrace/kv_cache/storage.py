"""The memory of a KV cache: per layer, the pages of keys and the pages of values, and the scales of what is quantized.

    keys, values              [pages, page_size, kv_heads, head_dim]; int4: uint8 with half as many
    key_scales, value_scales  [pages, page_size, kv_heads] float32 for int8 and int4, else None

A page has the same number in every layer, and all of its layers lie side by side: the arrays of a layer are strided
views of one block, each part of a page beginning at a cache line. The block is as large as the whole cache but takes
memory only where a page has been written, from the front: a large context costs nothing until it is used. Which pages
are used is `pages.py`'s business, what a number becomes is `ops/kv_formats.py`'s.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from headrace.config import KV_DTYPES, EngineConfig, ModelConfig
from headrace.errors import ArgumentError
from headrace.kernels.arrays import Fixed, numpy_dtype
from headrace.kernels.cpu.arrays import as_tensor, zeros
from headrace.kv_cache.pages import pages_needed
from headrace.machine import this_machine
from headrace.ops.kv_formats import FORMAT_OF_DTYPE, FORMATS, KVFormat

_LINE_BYTES = 64
_SCALE_BYTES = 4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerPages:
    """The arrays of one layer. Scales are None where pages hold the numbers themselves."""

    keys: Fixed
    values: Fixed
    key_scales: Fixed | None = None
    value_scales: Fixed | None = None

    @property
    def coded(self) -> bool:
        """Whether numbers are stored as codes of eight bits or less."""
        return FORMAT_OF_DTYPE[self.keys.dtype].bits <= 8


@dataclass(frozen=True)
class Storage:
    """The arrays of one model's cache, on the CPU. dtype: as `EngineConfig.kv_dtype` names it."""

    layers: tuple[LayerPages, ...]
    page_size: int
    dtype: str
    pages: np.ndarray  # uint8 [pages, layers, bytes]: what the layers' arrays are views of

    @property
    def num_pages(self) -> int:
        return len(self.pages)

    def copy_page(self, source: int, target: int) -> None:
        """Gives one page the keys and values of another, in every layer."""
        self.pages[target] = self.pages[source]


def allocate(config: ModelConfig, *, num_pages: int, page_size: int, dtype: str = "float16") -> Storage:
    """Zeroed pages for every layer of the model. CapacityError when the machine has no room for them."""
    kv_format = _format(config, dtype)
    for name, count in (("num_pages", num_pages), ("page_size", page_size)):
        if count < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {count}")
    parts = _parts(config, kv_format, page_size)
    ends = list(itertools.accumulate((_in_lines(shape, name) for shape, name in parts), initial=0))
    block = zeros((num_pages, config.num_layers, ends[-1]), "uint8").numpy()

    def layer(i: int) -> LayerPages:
        return LayerPages(*(_view(block[:, i, first:], *part) for first, part in zip(ends, parts, strict=False)))

    return Storage(tuple(layer(i) for i in range(config.num_layers)), page_size, dtype, block)


def pages_that_fit(config: ModelConfig, engine: EngineConfig, context_len: int) -> int:
    """How many pages a cache may have. Pages take memory only when they are first written."""
    page_bytes = engine.page_size * bytes_per_token(config, engine.kv_dtype)
    if engine.kv_cache_bytes is not None:
        if engine.kv_cache_bytes < page_bytes:
            raise ArgumentError(
                f"kv_cache_bytes: expected at least {page_bytes}, one page of {engine.page_size} tokens, "
                f"got {engine.kv_cache_bytes}"
            )
        return engine.kv_cache_bytes // page_bytes
    one = pages_needed(context_len, engine.page_size)
    return max(one, min(engine.max_requests * one, this_machine().memory_bytes // 2 // page_bytes))


def bytes_per_token(config: ModelConfig, dtype: str = "float16") -> int:
    """Bytes of keys and values, scales included, that one token takes in all layers together."""
    kv_format = _format(config, dtype)
    per_head = sum(kv_format.num_bytes(dim) for dim in (config.head_dim, _value_head_dim(config)))
    per_head += 2 * _SCALE_BYTES * kv_format.needs_scales
    return config.num_layers * config.num_kv_heads * per_head


def _parts(config: ModelConfig, kv_format: KVFormat, page_size: int) -> list[tuple[Shape, str]]:
    """Shape and type of what a page holds in a layer, in the order of LayerPages."""
    rows = (page_size, config.num_kv_heads)
    dims = (config.head_dim, _value_head_dim(config))
    parts: list[tuple[Shape, str]] = [((*rows, kv_format.num_items(dim)), kv_format.dtype) for dim in dims]
    return [*parts, (rows, "float32"), (rows, "float32")] if kv_format.needs_scales else parts


def _num_bytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def _in_lines(shape: Shape, dtype: str) -> int:
    """Bytes of a part, up to the next cache line."""
    return -(-_num_bytes(shape, dtype) // _LINE_BYTES) * _LINE_BYTES


def _view(pages: np.ndarray, shape: Shape, dtype: str) -> Fixed:
    """The part that begins where `pages` [pages, bytes] does."""
    part = pages[:, : _num_bytes(shape, dtype)].view(numpy_dtype(dtype))
    return Fixed(as_tensor(part.reshape(len(pages), *shape), "pages"))


def _value_head_dim(config: ModelConfig) -> int:
    return config.value_head_dim or config.head_dim


def _format(config: ModelConfig, dtype: str) -> KVFormat:
    if dtype not in KV_DTYPES:
        raise ArgumentError(f"dtype: expected {', '.join(KV_DTYPES)}, got {dtype!r}")
    odd = [dim for dim in (config.head_dim, _value_head_dim(config)) if dim % 2]
    if dtype == "int4" and odd:
        raise ArgumentError(f"kv_dtype: int4 needs an even head_dim, this model's is {odd[0]}", "int8")
    return FORMATS[dtype]
