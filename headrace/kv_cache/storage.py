"""The memory of a KV cache: per layer, the pages of keys and the pages of values.

    keys[layer]    [pages, page_size, kv_heads, head_dim]
    values[layer]  [pages, page_size, kv_heads, value_head_dim]

A page has the same number in every layer, and its keys and values of all layers lie side by side: the arrays of a layer
are strided views of one block. The block is as large as the whole cache but takes memory only where a page has been
written, from the front: a large context costs nothing until it is used. Which pages are used is `pages.py`'s business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headrace.config import ModelConfig
from headrace.errors import ArgumentError
from headrace.kernels.cpu.arrays import Fixed, as_tensor, zeros

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Storage:
    """The arrays of one model's cache, on the CPU."""

    keys: tuple[Fixed, ...]
    values: tuple[Fixed, ...]
    page_size: int

    @property
    def num_pages(self) -> int:
        return self.keys[0].shape[0]

    @property
    def dtype(self) -> str:
        return self.keys[0].dtype


def allocate(config: ModelConfig, *, num_pages: int, page_size: int, dtype: str = "float16") -> Storage:
    """Zeroed pages for every layer of the model. CapacityError when the machine has no room for them."""
    _check_dtype(dtype)
    for name, count in (("num_pages", num_pages), ("page_size", page_size)):
        if count < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {count}")
    key_shape = (page_size, config.num_kv_heads, config.head_dim)
    value_shape = (page_size, config.num_kv_heads, _value_head_dim(config))
    num_keys, num_values = math.prod(key_shape), math.prod(value_shape)
    block = zeros((num_pages, config.num_layers, num_keys + num_values), dtype).numpy()
    keys = tuple(_view(block[:, i, :num_keys], key_shape) for i in range(config.num_layers))
    values = tuple(_view(block[:, i, num_keys:], value_shape) for i in range(config.num_layers))
    return Storage(keys, values, page_size)


def bytes_per_token(config: ModelConfig, dtype: str = "float16") -> int:
    """Bytes of keys and values one token takes in all layers together."""
    _check_dtype(dtype)
    per_head = (config.head_dim + _value_head_dim(config)) * ITEM_BYTES[dtype]
    return config.num_layers * config.num_kv_heads * per_head


def _view(pages: np.ndarray, shape: tuple[int, ...]) -> Fixed:
    return Fixed(as_tensor(pages.reshape(len(pages), *shape), "pages"))


def _value_head_dim(config: ModelConfig) -> int:
    return config.value_head_dim or config.head_dim


def _check_dtype(dtype: str) -> None:
    if dtype not in ITEM_BYTES:
        raise ArgumentError(f"dtype: expected {', '.join(ITEM_BYTES)}, got {dtype!r}")
