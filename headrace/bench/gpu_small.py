"""Norm, rope table, append and merge for `headrace bench gpu`: the ops that only move and scale.

Their results are checked against the ops' own references, on a sample of rows where those are many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from headrace.bench.gpu_work import Call, GpuWork, Margin, integers, margin, normal, num_sets
from headrace.bench.op_cases import WIDTHS

_CHECKED_ROWS = 64


def build_norm(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """tokens, dim, dtype."""
    import torch

    from headrace.ops import norm

    shape, dtype = (sizes["tokens"], sizes["dim"]), sizes["dtype"]
    sets = num_sets(2 * math.prod(shape) * WIDTHS[dtype], device)
    xs = [normal(shape, dtype, device, seed) for seed in range(sets)]
    weight = normal((shape[1],), "float32", device, 99)

    def call(kernel: str, number: int) -> Any:
        return norm.rms_norm(xs[number], weight, kernel=kernel)

    def check(kernel: str) -> Margin:
        x = xs[0][:_CHECKED_ROWS]
        exact, plain = (_normed(x.to(each), weight.to(each)) for each in (torch.float64, torch.float32))
        return margin([call(kernel, 0)[:_CHECKED_ROWS]], [exact], [plain], dtype)

    def torchs() -> Call:
        narrow = weight.to(xs[0].dtype)
        return lambda number: torch.nn.functional.rms_norm(xs[number], shape[1:], narrow, 1e-6)

    request = requests("rms_norm", (xs[0], weight), {})
    return _work(norm.kernels(), request, call, sets, check=check, peers={"torch rms_norm": torchs})


def _normed(x: Any, weight: Any) -> Any:
    return x * weight / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()


def build_rope(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """tokens, head_dim."""
    import torch

    from headrace.config import RopeConfig
    from headrace.ops import rope
    from headrace.ops.select import Request, Traffic, placed

    dim, tokens = sizes["head_dim"], sizes["tokens"]
    frequencies = torch.from_numpy(rope.inverse_frequencies(RopeConfig(rotary_dim=dim))).to(device)
    positions = integers(range(tokens), device)
    traffic = Traffic(4 * tokens * dim, 60 * tokens * dim // 2)

    def call(kernel: str, number: int) -> Any:
        return rope.rope_table(positions, frequencies, kernel=kernel or None)

    def check(kernel: str) -> Margin:
        angles = positions.double()[:, None] * frequencies
        exact = torch.cat([angles.cos(), angles.sin()], dim=1)
        return margin([call(kernel, 0)], [exact], [exact.float()], "float32")

    asked = placed(Request("rope_table", {"positions": (tokens,)}, {}, traffic), positions)
    return _work(rope.table_kernels(), asked, call, 1, check=check)


def build_rotate(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """tokens, heads, head_dim, dtype."""
    import torch

    from headrace.ops import rope
    from headrace.ops.select import placed

    shape, dtype = (sizes["tokens"], sizes["heads"], sizes["head_dim"]), sizes["dtype"]
    sets = num_sets(2 * math.prod(shape) * WIDTHS[dtype], device)
    xs = [normal(shape, dtype, device, seed) for seed in range(sets)]
    table = _angles(sizes["tokens"], sizes["head_dim"]).to(device)

    def call(kernel: str, number: int) -> Any:
        return rope.rotate(xs[number], table, kernel=kernel)

    def check(kernel: str) -> Margin:
        exact, plain = (_rotated(xs[0], table, each) for each in (torch.float64, torch.float32))
        return margin([call(kernel, 0)], [exact], [plain], dtype)

    request = placed(rope.rotate_request({"x": shape, "table": tuple(table.shape)}, dtype), xs[0])
    return _work(rope.rotate_kernels(), request, call, sets, check=check)


def build_append(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """tokens, page_size, heads, kv_heads, head_dim, dtype: queries and keys rotated, keys and values into pages."""
    import torch

    from headrace.ops import append_pages, page_append

    tokens, dim, dtype = sizes["tokens"], sizes["head_dim"], sizes["dtype"]
    query = normal((tokens, sizes["heads"], dim), dtype, device, 0)
    key, value = (normal((tokens, sizes["kv_heads"], dim), dtype, device, seed) for seed in (1, 2))
    pages = [normal((-(-tokens // sizes["page_size"]), sizes["page_size"], sizes["kv_heads"], dim), dtype, device, 3)]
    pages.append(pages[0].clone())
    slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).int().to(device)
    table = _angles(tokens, dim).to(device)
    out = torch.empty_like(query)
    options = {"slots": slots, "query": query, "table": table, "out": out}

    def call(kernel: str, number: int) -> Any:
        return append_pages(key, value, *pages, **options, kernel=kernel)

    def check(kernel: str) -> Margin:
        rows = [array.fill_(math.nan) for array in (out, *pages)] and call(kernel, 0)
        got = [rows, *(page.flatten(0, 1)[slots.long()] for page in pages)]
        exact, plain = (
            [_rotated(query, table, each), _rotated(key, table, each), value.to(each)]
            for each in (torch.float64, torch.float32)
        )
        return margin(got, exact, plain, dtype)

    request = requests("append_pages", (key, value, *pages), options)
    return _work(page_append.kernels(), request, call, 1, check=check)


def _angles(tokens: int, dim: int) -> Any:
    """A rope table of the first positions, on the host."""
    import torch

    from headrace.config import RopeConfig
    from headrace.ops.rope import inverse_frequencies

    angles = torch.arange(tokens)[:, None] * torch.from_numpy(inverse_frequencies(RopeConfig(rotary_dim=dim)))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def _rotated(x: Any, table: Any, dtype: Any) -> Any:
    """Heads [tokens, heads, dim] turned, pairs side by side."""
    import torch

    cosines, sines = table.to(dtype).chunk(2, dim=1)
    a, b = (x.to(dtype)[..., i::2] for i in (0, 1))
    turned = (a * cosines[:, None] - b * sines[:, None], b * cosines[:, None] + a * sines[:, None])
    return torch.stack(turned, dim=-1).flatten(-2)


def build_merge(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """parts, tokens, heads, head_dim, dtype."""
    import torch

    from headrace.ops import AttentionResult, attention_merge, merge_attention

    shape = (sizes["tokens"], sizes["heads"])
    outs = [normal((*shape, sizes["head_dim"]), sizes["dtype"], device, seed) for seed in range(sizes["parts"])]
    logs = [normal(shape, "float32", device, 50 + seed) for seed in range(sizes["parts"])]
    parts = [AttentionResult(*pair) for pair in zip(outs, logs, strict=True)]

    def call(kernel: str, number: int) -> Any:
        return merge_attention(parts, kernel=kernel)

    def check(kernel: str) -> Margin:
        exact, plain = (_merged(outs, torch.stack(logs).to(each), each) for each in (torch.float64, torch.float32))
        return margin([call(kernel, 0).out], [exact], [plain], sizes["dtype"])

    request = requests("merge_attention", (parts,), {})
    return _work(attention_merge.kernels(), request, call, 1, check=check)


def _merged(outs: Sequence[Any], logs: Any, dtype: Any) -> Any:
    weights = logs.softmax(dim=0)
    return sum(out.to(dtype) * weight[..., None] for out, weight in zip(outs, weights, strict=True))


def requests(op: str, arrays: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The one request of a call."""
    from headrace.ops.call_request import requests_of

    [request] = requests_of(op, *arrays, **options)
    return request


def _work(
    kernels: Any, request: Any, call: Any, sets: int, *, check: Any, peers: Mapping[str, Any] | None = None
) -> GpuWork:
    traffic = request.traffic
    work = GpuWork(traffic.num_bytes, traffic.flops, traffic.unit, kernels, request, call, sets, check)
    return replace(work, peers=peers) if peers else work
