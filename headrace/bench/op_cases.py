"""What `headrace bench ops` measures: calls of the attention ops with what they must move and compute, and their check.

Keys and values lie in one buffer that every call reads again; the read roof beside it is that of a working set of the
same size. Numbers are random and normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace.check.compare import assert_within_budget, rounded
from headrace.errors import HeadraceError
from headrace.ops.explanation import Explanation

WIDTHS = {"bfloat16": 2, "float32": 4}
CHECKED_OUTPUTS = 24  # pairs of a row and a head that the check computes in float64


@dataclass(frozen=True)
class Part:
    """One request, dense: query [queries, heads, dim], keys [keys, kv_heads, dim], values [.., value_dim]."""

    query: np.ndarray
    keys: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Work:
    """A call that is ready: its parts, what it runs, and where its rows are in the output."""

    parts: Sequence[Part]
    causal: bool
    scale: float
    run: Callable[[], Any]  # gives out, [all queries in order, heads, value_dim]; of a backward its gradients
    explain: Callable[[], Explanation]
    beside: Mapping[str, Any] = field(default_factory=dict)  # other arrays by name: what a backward is given


@dataclass(frozen=True)
class SpeedCase:
    """Requests that are alike but for their lengths. latent: keys and values are one array (MLA), read once."""

    name: str
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    op: str = "attention"
    precision: str = "auto"

    @property
    def causal(self) -> bool:
        return self.query_lens[0] > 1

    @property
    def backward(self) -> bool:
        return self.op == "attention_backward"

    @property
    def unit(self) -> str:
        """The arithmetic that the roof is of."""
        return "bf16" if self.dtype == "bfloat16" else "fp32"

    @property
    def num_bytes(self) -> int:
        """Keys and values once, queries in, outputs out; for gradients those read and these written, too."""
        latent = self.op == "mla_attention"
        per_key = self.kv_heads * (self.head_dim if latent else self.head_dim + self.value_dim)
        per_row = self.heads * (self.head_dim + self.value_dim)
        return (
            WIDTHS[self.dtype]
            * (2 if self.backward else 1)
            * (sum(self.key_lens) * per_key + sum(self.query_lens) * per_row)
        )

    @property
    def flops(self) -> int:
        """Two per product: scores and mixture, over the keys each row sees; five products of a backward."""
        pairs = zip(self.query_lens, self.key_lens, strict=True)
        seen = sum(q * k - (q * (q - 1) // 2 if self.causal else 0) for q, k in pairs)
        products = (3, 2) if self.backward else (1, 1)
        return 2 * seen * self.heads * (products[0] * self.head_dim + products[1] * self.value_dim)

    def __str__(self) -> str:
        rows, keys = _lengths(self.query_lens), _lengths(self.key_lens)
        dims = f"d {self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        causal = ", causal" if self.causal else ""
        return (
            f"{self.op}, {rows} queries, {keys} keys, {self.heads}/{self.kv_heads} heads, {dims}, {self.dtype}{causal}"
        )


def _lengths(lens: Sequence[int]) -> str:
    runs = [f"{lens.count(n)} x {n}" if lens.count(n) > 1 else str(n) for n in dict.fromkeys(lens)]
    return " + ".join(runs)


def _llama(name: str, query_lens: tuple[int, ...], key_lens: tuple[int, ...], **rest: Any) -> SpeedCase:
    """The heads of an 8-billion-parameter Llama."""
    sizes: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128}
    return SpeedCase(name, query_lens, key_lens, **sizes | {"dtype": "bfloat16"} | rest)


CASES = (
    _llama("decode_4096", (1,), (4096,)),
    _llama("decode_32768", (1,), (32768,)),
    _llama("prefill_2048", (2048,), (2048,)),
    _llama("prefill_2048_exact", (2048,), (2048,), dtype="float32", precision="exact"),
    SpeedCase("mla_decode_4096", (1,), (4096,), 128, 1, 576, 512, "bfloat16", "mla_attention"),
    _llama("ragged_decode", (1,) * 16, (32768, *(512,) * 15), op="paged_attention"),
    _llama("backward_2048", (2048,), (2048,), op="attention_backward"),
    _llama("backward_2048_exact", (2048,), (2048,), op="attention_backward", dtype="float32", precision="exact"),
    _llama("backward_2048_8_heads", (2048,), (2048,), op="attention_backward", heads=8),
    _llama(
        "backward_2048_8_heads_exact",
        (2048,),
        (2048,),
        op="attention_backward",
        heads=8,
        dtype="float32",
        precision="exact",
    ),
)
PAGE_SIZE = 64


def build(case: SpeedCase, seed: int = 0) -> Work:
    """The case with its arrays."""
    from headrace.bench.op_backward import build_backward

    builders = {"attention": _dense, "paged_attention": _paged, "mla_attention": _latent}
    return build_backward(case, seed) if case.backward else builders[case.op](case, seed)


def _dense(case: SpeedCase, seed: int) -> Work:
    from headrace.ops.attention_dense import attention
    from headrace.ops.call_request import explain

    random = np.random.default_rng(seed)
    part = part_of(case, case.query_lens[0], case.key_lens[0], random)
    arrays, options = [array[None] for array in (part.query, part.keys, part.values)], _options(case)
    scale = case.head_dim**-0.5
    return Work(
        [part],
        case.causal,
        scale,
        lambda: attention(*arrays, **options).out[0],
        lambda: explain("attention", *arrays, **options),
    )


def _options(case: SpeedCase) -> dict[str, Any]:
    return {"causal": case.causal, "precision": case.precision}


def _paged(case: SpeedCase, seed: int) -> Work:
    from headrace.ops.attention_paged import paged_attention
    from headrace.ops.call_request import explain

    random = np.random.default_rng(seed)
    parts = [part_of(case, *lens, random) for lens in zip(case.query_lens, case.key_lens, strict=True)]
    table = page_table(case.key_lens)
    query = np.concatenate([part.query for part in parts])
    pages = [paged([getattr(part, name) for part in parts]) for name in ("keys", "values")]
    arguments = (query, *pages, table, np.array(case.key_lens, np.int32))
    options: dict[str, Any] = {
        "query_starts": np.cumsum([0, *case.query_lens], dtype=np.int32),
        "precision": case.precision,
    }
    return Work(
        parts,
        case.causal,
        case.head_dim**-0.5,
        lambda: paged_attention(*arguments, **options).out,
        lambda: explain("paged_attention", *arguments, **options),
    )


def _latent(case: SpeedCase, seed: int) -> Work:
    from headrace.ops.attention_latent import mla_attention
    from headrace.ops.call_request import explain

    random = np.random.default_rng(seed)
    parts = []
    for lens in zip(case.query_lens, case.key_lens, strict=True):
        part = part_of(case, *lens, random)
        parts.append(Part(part.query, part.keys, part.keys[..., : case.value_dim]))
    query, pages = np.concatenate([part.query for part in parts]), paged([part.keys for part in parts])[:, :, 0]
    arguments = (query, pages, page_table(case.key_lens), np.array(case.key_lens, np.int32))
    options: dict[str, Any] = {
        "query_starts": np.cumsum([0, *case.query_lens], dtype=np.int32),
        "value_dim": case.value_dim,
    }
    options |= {"precision": case.precision, "scale": case.head_dim**-0.5}
    return Work(
        parts,
        case.causal,
        case.head_dim**-0.5,
        lambda: mla_attention(*arguments, **options).out,
        lambda: explain("mla_attention", *arguments, **options),
    )


def part_of(case: SpeedCase, queries: int, keys: int, random: np.random.Generator) -> Part:
    """A request of normal numbers."""

    def normal(*shape: int) -> np.ndarray:
        return rounded(random.standard_normal(shape, np.float32), case.dtype)

    query = normal(queries, case.heads, case.head_dim)
    key, value = (normal(keys, case.kv_heads, dim) for dim in (case.head_dim, case.value_dim))
    return Part(query, key, value)


def paged(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """The sequences in pages, one after the other, the rest of each last page zero."""
    num_pages = [math.ceil(len(sequence) / PAGE_SIZE) for sequence in sequences]
    pages = np.zeros((sum(num_pages), PAGE_SIZE, *sequences[0].shape[1:]), sequences[0].dtype)
    for first, sequence in zip(np.cumsum([0, *num_pages]), sequences, strict=False):
        pages[first:].reshape(-1, *sequence.shape[1:])[: len(sequence)] = sequence
    return pages


def page_table(key_lens: Sequence[int]) -> np.ndarray:
    """The pages of each sequence, int32 [requests, max_pages]."""
    counts = [math.ceil(length / PAGE_SIZE) for length in key_lens]
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, first, count in zip(table, np.cumsum([0, *counts]), counts, strict=False):
        row[:count] = np.arange(first, first + count)
    return table


def check(case: SpeedCase, work: Work) -> None:
    """Raises HeadraceError unless a sample of the outputs is within its error budget: no speed without that."""
    if case.backward:
        from headrace.bench.op_backward import check_backward

        return check_backward(case, work)
    out, random = np.asarray(work.run()).astype(np.float64), np.random.default_rng(1)
    got, exact, plain = [], [], []
    starts = np.cumsum([0, *case.query_lens])
    for _ in range(CHECKED_OUTPUTS):
        r = int(random.integers(len(work.parts)))
        row, head = int(random.integers(case.query_lens[r])), int(random.integers(case.heads))
        got.append(out[starts[r] + row, head])
        exact.append(_one(case, work, (r, row, head), np.float64))
        plain.append(_one(case, work, (r, row, head), np.float32))
    try:
        assert_within_budget(np.stack(got), np.stack(exact), rounded(np.stack(plain), case.dtype), case.dtype)
    except AssertionError as error:
        raise HeadraceError(f"{case.name}: the result is wrong, no speed is printed: {error}") from error


def _one(case: SpeedCase, work: Work, place: tuple[int, int, int], dtype: Any) -> np.ndarray:
    """One output, [value_dim]: exact in float64; in float32 a plain loop, weights rounded where products are bf16."""
    request, row, head = place
    part = work.parts[request]
    end = len(part.keys) - (len(part.query) - 1 - row if case.causal else 0)
    kv_head = head * case.kv_heads // case.heads
    keys, values = (array[:end, kv_head].astype(dtype) for array in (part.keys, part.values))
    scores = (keys @ part.query[row, head].astype(dtype)) * dtype(work.scale)
    weights = np.exp(scores - scores.max())
    narrow = dtype is np.float32 and case.dtype == "bfloat16"
    used = rounded(weights, "bfloat16").astype(dtype) if narrow else weights
    return np.asarray((used[:, None] * values).sum(axis=0) / weights.sum())
