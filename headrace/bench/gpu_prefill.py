"""Dense causal attention for `headrace bench gpu`, forward and backward.

Arithmetic binds, or the keys of decode are many, so one set of buffers is enough. Of the forward some rows of some
heads are checked, of the backward the gradients of one KV head, whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.bench import gpu_peers
from headrace.bench.gpu_peers import SDPA
from headrace.bench.gpu_reference import Gradients, Sample, exact, gradients, straightforward
from headrace.bench.gpu_work import GpuWork, Margin, margin, normal, poisoned
from headrace.bench.op_cases import SpeedCase
from headrace.ops.call_request import kernels_of, requests_of

_CHECKED_ROWS, _CHECKED_HEADS = 16, 4


def build_dense(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """batch, tokens, heads, kv_heads, head_dim, dtype; precision, and queries where they are fewer, the last ones."""
    from headrace.ops import attention

    case, arrays = _case(sizes, "attention"), _arrays(sizes, device)
    options: dict[str, Any] = {"causal": True, "precision": case.precision}

    def call(kernel: str, number: int, out: Any = None) -> Any:
        return attention(*arrays, **options, kernel=kernel, out=out)

    def check(kernel: str) -> Margin:
        out = call(kernel, 0, poisoned(arrays[0].shape, case.dtype, device)).out
        return _forward_margin(case, arrays, out)

    [request] = requests_of("attention", *arrays, **options)
    peers = gpu_peers.dense_peers(arrays, case.head_dim**-0.5)

    def check_sdpa() -> Margin:
        return _forward_margin(case, arrays, peers[SDPA]()(0).transpose(1, 2))

    of_call = (case.num_bytes, case.flops, case.unit, kernels_of("attention"), request, call)
    return GpuWork(*of_call, check=check, peers=peers, peer_checks={SDPA: check_sdpa})


def build_backward(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """batch, tokens, heads, kv_heads, head_dim, dtype. What is timed is the backward alone: out and lse are there."""
    from headrace.ops import attention, attention_backward

    case, arrays = _case(sizes, "attention_backward"), _arrays(sizes, device)
    found = attention(*arrays, causal=True)
    d_out = normal(found.out.shape, case.dtype, device, seed=9)

    def call(kernel: str, number: int) -> Any:
        return attention_backward(d_out, *arrays, found.out, lse=found.lse, causal=True, kernel=kernel)

    def check(kernel: str) -> Margin:
        return _backward_margin(case, arrays, d_out, call(kernel, 0))

    op = "attention_backward"
    [request] = requests_of(op, d_out, *arrays, found.out, lse=found.lse, causal=True)
    peers = gpu_peers.backward_peers(arrays, d_out, case.head_dim**-0.5)
    of_call = (case.num_bytes, case.flops, case.unit, kernels_of(op), request, call)
    # torch computes gradients on the stream of the forward, which is not the one that is captured.
    return GpuWork(*of_call, check=check, peers=peers, eager=tuple(peers))


def _case(sizes: Mapping[str, Any], op: str) -> SpeedCase:
    batch, tokens = sizes["batch"], sizes["tokens"]
    queries, keys = (sizes.get("queries", tokens),) * batch, (tokens,) * batch
    dims = (sizes["heads"], sizes["kv_heads"], sizes["head_dim"], sizes["head_dim"])
    return SpeedCase("", queries, keys, *dims, sizes["dtype"], op, sizes.get("precision", "auto"))


def _arrays(sizes: Mapping[str, Any], device: str) -> tuple[Any, Any, Any]:
    """query, key, value [batch, tokens, heads, head_dim]."""
    batch, dim, dtype = sizes["batch"], sizes["head_dim"], sizes["dtype"]
    query = normal((batch, sizes.get("queries", sizes["tokens"]), sizes["heads"], dim), dtype, device, 0)
    key, value = (normal((batch, sizes["tokens"], sizes["kv_heads"], dim), dtype, device, seed) for seed in (1, 2))
    return query, key, value


def _forward_margin(case: SpeedCase, arrays: tuple[Any, Any, Any], out: Any) -> Margin:
    import torch

    query, key, value = arrays
    tokens, group = query.shape[1], case.heads // case.kv_heads
    generator = torch.Generator().manual_seed(1)
    got, true, plain = [], [], []
    for i in range(min(_CHECKED_HEADS, case.heads)):
        b, head = i % len(query), i * (case.heads - 1) // max(min(_CHECKED_HEADS, case.heads) - 1, 1)
        drawn = torch.randint(tokens, (_CHECKED_ROWS,), generator=generator)
        rows = torch.cat([torch.tensor([0, tokens // 2, tokens - 1]), drawn]).to(query.device)
        ends = key.shape[1] - tokens + rows + 1
        keys, values = (array[b, :, head // group] for array in (key, value))
        sample = Sample(query[b, rows, head], keys, values, ends, case.head_dim**-0.5)
        got.append(out[b, rows, head])
        true.append(exact(sample))
        plain.append(straightforward(sample, true[-1]))
    return margin(got, true, plain, case.dtype)


def _backward_margin(case: SpeedCase, arrays: tuple[Any, Any, Any], d_out: Any, found: Any) -> Margin:
    """The worst of the three gradients, by its share of its budget."""
    query, key, value = arrays
    group, b, kv_head = case.heads // case.kv_heads, len(query) - 1, case.kv_heads - 1
    heads = slice(kv_head * group, (kv_head + 1) * group)
    sample = Gradients(query[b, :, heads].transpose(0, 1), key[b, :, kv_head], value[b, :, kv_head])
    own_out = d_out[b, :, heads].transpose(0, 1)
    got = (found.query[b, :, heads].transpose(0, 1), found.key[b, :, kv_head], found.value[b, :, kv_head])
    pairs = [gradients(own_out, sample, case.head_dim**-0.5, narrow=narrow) for narrow in (False, True)]
    margins = [margin([ours], [true], [plain], case.dtype) for ours, true, plain in zip(got, *pairs, strict=True)]
    return max(margins, key=lambda each: each.error / each.allowed)
