"""What each op of a recorded step is for, and what it must move and compute.

A program knows its ops by name and order; a decoder's order is the same in every layer:

    embedding, rope_table
    per layer:  linear (qkv), append_pages, paged_attention, linear (output), linear_gated (gate and up), linear (down)
    select_rows, linear (head), sample

The norms are part of qkv, of gate and up, and of the head. The products tell where in the model an op is: the layer's
four, in this order, and after the last layer the head. Every other op goes by its name alone. An op that is not known
here is a part of its own, with no work to its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.config import ModelConfig
from headrace.errors import HeadraceError
from headrace.ops import linear, page_append
from headrace.ops.call_request import requests_of
from headrace.ops.formats import get_format
from headrace.ops.kv_formats import FORMATS, KVFormat
from headrace.ops.select import Traffic

if TYPE_CHECKING:
    from headrace.llm import LLM

PRODUCTS = ("qkv", "attention output", "gate and up", "down")  # of a layer, in order
HEAD = "head"
ROLES = {
    "embedding": "embedding",
    "rope_table": "rope table",
    "append_pages": "append",
    "paged_attention": "attention",
    "select_rows": "rows for the head",
    "sample": "sampling",
}
NOTHING = Traffic(0, 0)

Matrix = tuple[str, int, int]  # format, rows, cols: what ops.linear.request takes


@dataclass(frozen=True)
class StepSize:
    """One request's step: new tokens behind `depth` cached ones, and the rows of logits wanted."""

    tokens: int
    depth: int
    outputs: int = 1


@dataclass(frozen=True)
class StepModel:
    """What of a model decides the work of its steps: its numbers, its matrices by name, its cache."""

    config: ModelConfig
    matrices: Mapping[str, Matrix]
    kv_format: KVFormat
    page_size: int

    def cached(self, num_pages: int) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Shapes and types of a layer's pages and their scales, by the ops' names."""
        config, kept = self.config, self.kv_format
        rows = (num_pages, self.page_size, config.num_kv_heads)
        shapes: dict[str, tuple[int, ...]] = {
            "key_pages": (*rows, kept.num_items(config.head_dim)),
            "value_pages": (*rows, kept.num_items(config.value_head_dim or config.head_dim)),
        }
        dtypes = dict.fromkeys(shapes, kept.dtype)
        return shapes | dict.fromkeys(("key_scales", "value_scales") if kept.needs_scales else (), rows), dtypes


@dataclass(frozen=True)
class Part:
    """One op of a step: what it is for, its native name, and the least it must move and compute."""

    role: str
    op: str
    traffic: Traffic


def step_model(llm: LLM) -> StepModel:
    """What the loaded model's file and cache say."""
    from headrace.weights.gguf import open_gguf

    with open_gguf(llm.path) as file:
        matrices = {name: (i.format, *i.shape) for name, i in file.tensors.items() if len(i.shape) == 2}
    storage = llm.engine.runner.storage
    return StepModel(llm.config, matrices, FORMATS[storage.dtype], storage.page_size)  # type: ignore[arg-type]


def step_parts(op_names: Sequence[str], model: StepModel, size: StepSize) -> list[Part]:
    """One part per op of the program. HeadraceError when its products are not those of the model's layers and head."""
    products = sum(_is_product(name) for name in op_names)
    expected = len(PRODUCTS) * model.config.num_layers + 1
    if products != expected:
        raise HeadraceError(f"the step has {products} products, its model {expected}: its parts cannot be told")
    parts, done = [], 0  # products before an op: they tell its layer
    for name in op_names:
        parts.append(_part(name, done, model, size))
        done += _is_product(name)
    return parts


def _is_product(name: str) -> bool:
    return "linear" in name


def _part(name: str, done: int, model: StepModel, size: StepSize) -> Part:
    layer, place = divmod(done, len(PRODUCTS))
    # Past the last layer only the rows are left whose logits are wanted.
    rows = size.outputs if layer == model.config.num_layers else size.tokens
    if not _is_product(name):
        return Part(ROLES.get(name, name), name, _other_traffic(name, rows, model, size))
    role = HEAD if layer == model.config.num_layers else PRODUCTS[place]
    return Part(role, name, _product_traffic(role, layer, model, rows))


def _product_traffic(role: str, layer: int, model: StepModel, rows: int) -> Traffic:
    found = [model.matrices[name] for name in _matrix_names(role, layer, model)]
    traffic = linear.request(rows, found).traffic
    if role != "gate and up":
        return traffic
    # What gate and up give is multiplied and never stored: one output of the two.
    return replace(traffic, num_bytes=traffic.num_bytes - 4 * rows * found[0][1])


def _matrix_names(role: str, layer: int, model: StepModel) -> list[str]:
    if role == HEAD:
        return ["output.weight" if "output.weight" in model.matrices else "token_embd.weight"]
    names = {
        "qkv": ("attn_q", "attn_k", "attn_v"),
        "attention output": ("attn_output",),
        "gate and up": ("ffn_gate", "ffn_up"),
        "down": ("ffn_down",),
    }
    return [f"blk.{layer}.{name}.weight" for name in names[role]]


def _other_traffic(name: str, rows: int, model: StepModel, size: StepSize) -> Traffic:
    config = model.config
    if name == "embedding":
        format_name, _, dim = model.matrices["token_embd.weight"]
        return Traffic(rows * (get_format(format_name).row_bytes(dim) + 4 * dim), 0)
    if name == "rope_table":
        return Traffic(4 * rows * config.rope.rotary_dim, 0)
    if name == "select_rows":
        return Traffic(8 * rows * config.dim, 0)
    if name == "sample":
        return Traffic(4 * rows * config.vocab_size, 0)
    if name == "append_pages":
        return _append_traffic(model, rows)
    return _attention_traffic(model, size) if name == "paged_attention" else NOTHING


def _append_traffic(model: StepModel, tokens: int) -> Traffic:
    config = model.config
    key = (tokens, config.num_kv_heads, config.head_dim)
    value = (tokens, config.num_kv_heads, config.value_head_dim or config.head_dim)
    shapes = {"key": key, "value": value, "query": (tokens, config.num_heads, config.head_dim)}
    dtypes = {"key": "float32", "value": "float32", "query": "float32", "out": "float32"}
    cached_shapes, cached_dtypes = model.cached(1)
    return page_append.request(shapes | cached_shapes, dtypes | cached_dtypes).traffic


def _attention_traffic(model: StepModel, size: StepSize) -> Traffic:
    config, keys = model.config, size.depth + size.tokens
    pages = -(-keys // model.page_size)
    cached_shapes, dtypes = model.cached(pages)
    shapes: dict[str, Any] = dict(cached_shapes)
    [asked] = requests_of(
        "paged_attention",
        (size.tokens, config.num_heads, config.head_dim),
        page_table=np.zeros((1, pages), np.int32),
        sequence_lens=np.array([keys], np.int32),
        **shapes,
        query_starts=np.array([0, size.tokens], np.int32),
        window=(config.sliding_window - 1, None) if config.sliding_window else (None, None),
        out_dtype="float32",
        dtype=dtypes,
    )
    return asked.traffic
