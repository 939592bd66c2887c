"""Decode over pages for `headrace bench gpu`: one token each of many requests, against paged keys or latents.

Pages lie in one pool in random order, those of all sets of buffers together; page 0 is NaN, and it is what a page table
names where a request has no more pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.bench import gpu_peers
from headrace.bench.gpu_reference import Sample, exact, straightforward
from headrace.bench.gpu_work import GpuWork, Margin, integers, margin, normal, num_sets, poisoned
from headrace.bench.op_cases import WIDTHS, SpeedCase
from headrace.ops.call_request import kernels_of, requests_of

_CHECKED = 4  # requests of which a KV head is computed in float64
_LATENT_SCALE = (128 + 64) ** -0.5  # DeepSeek's heads before they are absorbed


@dataclass(frozen=True)
class Pages:
    """A batch's pages. pools: keys and values, or latents alone; tables: one for each set of buffers."""

    query: Any  # [requests, heads, dim]
    pools: tuple[Any, ...]  # [pages, page_size, ...]
    tables: tuple[Any, ...]  # int32 [requests, max_pages]
    lens: Any  # int32 [requests]
    starts: Any  # int32 [requests + 1]
    key_lens: tuple[int, ...]

    def keys(self, pool: int, request: int) -> Any:
        """Those of a request in the first set, [keys, ...]."""
        pages = self.pools[pool]
        table = self.tables[0][request, : -(-self.key_lens[request] // pages.shape[1])]
        return pages[table.long()].flatten(0, 1)[: self.key_lens[request]]

    def in_order(self, pool: int, number: int) -> Any:
        """A set's pages as if they were dense, [requests, keys, ...], for those who know none; of equal lengths."""
        pages, requests = self.pools[pool], len(self.key_lens)
        count = self.tables[0].shape[1]
        first = 1 + number * requests * count
        return pages[first : first + requests * count].view(requests, count * pages.shape[1], *pages.shape[2:])


def make_pages(
    key_lens: Sequence[int], page_size: int, row_shapes: Sequence[tuple[int, ...]], dtype: str, device: str
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Pools of pages whose rows have these shapes, and a table for each set of buffers."""
    import torch

    counts = [-(-length // page_size) for length in key_lens]
    per_set = sum(counts)
    row = sum(math.prod(shape) for shape in row_shapes) * WIDTHS[dtype]
    sets = num_sets(per_set * page_size * row, device)
    pools = []
    for seed, shape in enumerate(row_shapes):
        pool = normal((1 + sets * per_set, page_size, *shape), dtype, device, seed)
        pool[0] = math.nan
        pools.append(pool)
    order = 1 + torch.randperm(sets * per_set, generator=torch.Generator().manual_seed(0)).int()
    tables = [_table(order[s * per_set : (s + 1) * per_set], counts).to(device) for s in range(sets)]
    for pool in pools:
        _poison_tails(pool, tables, key_lens)
    return tuple(pools), tuple(tables)


def _table(pages: Any, counts: Sequence[int]) -> Any:
    import torch

    table, first = torch.zeros(len(counts), max(counts), dtype=torch.int32), 0
    for row, count in enumerate(counts):
        table[row, :count] = pages[first : first + count]
        first += count
    return table


def _poison_tails(pool: Any, tables: Sequence[Any], key_lens: Sequence[int]) -> None:
    """NaN into the places of a last page that hold no key."""
    page_size = pool.shape[1]
    for table in tables:
        for request, length in enumerate(key_lens):
            if length % page_size:
                pool[table[request, length // page_size], length % page_size :] = math.nan


def build_paged(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """key_lens, page_size, heads, kv_heads, head_dim, dtype."""
    from headrace.ops import paged_attention

    lens, kv_heads, dim = sizes["key_lens"], sizes["kv_heads"], sizes["head_dim"]
    case = _case(sizes, "paged_attention", kv_heads, dim)
    shapes = [(kv_heads, dim)] * 2
    pools, tables = make_pages(lens, sizes["page_size"], shapes, sizes["dtype"], device)
    batch = _batch(sizes, pools, tables, device)

    def arguments(number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.query, *pools, tables[number], batch.lens), {"query_starts": batch.starts}

    def call(kernel: str, number: int, out: Any = None) -> Any:
        arrays, options = arguments(number)
        return paged_attention(*arrays, **options, kernel=kernel, out=out)

    return _work(case, batch, call, arguments(0), gpu_peers.paged_peers(batch, dim**-0.5))


def build_latent(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """key_lens, page_size, heads, head_dim, value_dim, dtype."""
    from headrace.ops import mla_attention

    case = _case(sizes, "mla_attention", 1, sizes["value_dim"])
    pools, tables = make_pages(sizes["key_lens"], sizes["page_size"], [(sizes["head_dim"],)], sizes["dtype"], device)
    batch = _batch(sizes, pools, tables, device)

    def arguments(number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        options = {"query_starts": batch.starts, "value_dim": sizes["value_dim"], "scale": _LATENT_SCALE}
        return (batch.query, *pools, tables[number], batch.lens), options

    def call(kernel: str, number: int, out: Any = None) -> Any:
        arrays, options = arguments(number)
        return mla_attention(*arrays, **options, kernel=kernel, out=out)

    peers = gpu_peers.latent_peers(batch, sizes["value_dim"], _LATENT_SCALE)
    return _work(case, batch, call, arguments(0), peers)


def _case(sizes: Mapping[str, Any], op: str, kv_heads: int, value_dim: int) -> SpeedCase:
    lens = sizes["key_lens"]
    dims = (sizes["head_dim"], value_dim)
    return SpeedCase("", (1,) * len(lens), tuple(lens), sizes["heads"], kv_heads, *dims, sizes["dtype"], op)


def _batch(sizes: Mapping[str, Any], pools: tuple[Any, ...], tables: tuple[Any, ...], device: str) -> Pages:
    lens = tuple(sizes["key_lens"])
    query = normal((len(lens), sizes["heads"], sizes["head_dim"]), sizes["dtype"], device, seed=7)
    starts = integers(range(len(lens) + 1), device)
    return Pages(query, pools, tables, integers(lens, device), starts, lens)


def _work(
    case: SpeedCase, batch: Pages, call: Callable[..., Any], arguments: Any, peers: Mapping[str, Callable[[], Any]]
) -> GpuWork:
    arrays, options = arguments
    [request] = requests_of(case.op, *arrays, **options)
    scale = options.get("scale", case.head_dim**-0.5)

    def check(kernel: str) -> Margin:
        query = batch.query
        out = poisoned((*query.shape[:2], case.value_dim), case.dtype, str(query.device))
        return _margin(case, batch, call(kernel, 0, out).out, scale)

    kernels = kernels_of(case.op)
    return GpuWork(case.num_bytes, case.flops, case.unit, kernels, request, call, len(batch.tables), check, peers)


def _margin(case: SpeedCase, batch: Pages, out: Any, scale: float) -> Margin:
    """Of the heads of one KV head of some requests, the first and the last among them."""
    group, requests = case.heads // case.kv_heads, len(batch.key_lens)
    got, true, plain = [], [], []
    for i in range(min(_CHECKED, requests)):
        request = i * (requests - 1) // max(min(_CHECKED, requests) - 1, 1)
        kv_head = i % case.kv_heads
        heads = slice(kv_head * group, (kv_head + 1) * group)
        sample = _sample(case, batch, request, kv_head, heads, scale=scale)
        got.append(out[request, heads])
        true.append(exact(sample))
        plain.append(straightforward(sample, true[-1]))
    return margin(got, true, plain, case.dtype)


def _sample(case: SpeedCase, batch: Pages, request: int, kv_head: int, heads: slice, *, scale: float) -> Sample:
    import torch

    keys = batch.keys(0, request)
    if case.op == "mla_attention":
        values = keys[:, : case.value_dim]
    else:
        keys, values = keys[:, kv_head], batch.keys(1, request)[:, kv_head]
    query = batch.query[request, heads]
    ends = torch.full((len(query),), len(keys), device=query.device)
    return Sample(query, keys, values, ends, scale)
