"""The backward of attention for `headrace bench ops`: its call, the check of a sample of its gradients, and torch's.

What is timed is the backward alone: out and lse are there, and torch's graph is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.bench.op_cases import CHECKED_OUTPUTS, SpeedCase, Work, part_of
from headrace.check.compare import assert_within_budget, rounded
from headrace.errors import HeadraceError

# Of one head: rows, keys and values, d_out, out and lse, of as many as take part.
Arrays = tuple[np.ndarray, ...]


def build_backward(case: SpeedCase, seed: int) -> Work:
    """One request, dense."""
    from headrace.ops.attention_dense import attention
    from headrace.ops.attention_gradients import attention_backward
    from headrace.ops.call_request import explain

    random = np.random.default_rng(seed)
    part = part_of(case, case.query_lens[0], case.key_lens[0], random)
    arrays = [array[None] for array in (part.query, part.keys, part.values)]
    options: dict[str, Any] = {"causal": case.causal, "precision": case.precision}
    found = attention(*arrays, **options)
    d_out = rounded(random.standard_normal(found.out.shape, np.float32), case.dtype)
    arguments = (d_out, *arrays, found.out)
    return Work(
        [part],
        case.causal,
        case.head_dim**-0.5,
        lambda: attention_backward(*arguments, lse=found.lse, **options),
        lambda: explain("attention_backward", *arguments, lse=found.lse, **options),
        {"d_out": d_out[0], "out": found.out[0], "lse": found.lse[0]},
    )


# Check


def check_backward(case: SpeedCase, work: Work) -> None:
    """Raises HeadraceError unless a sample of the gradients is within its error budget."""
    found, random = work.run(), np.random.default_rng(1)
    samples: dict[str, list[Arrays]] = {"query": [], "key": [], "value": []}
    for _ in range(CHECKED_OUTPUTS):
        row, head = int(random.integers(case.query_lens[0])), int(random.integers(case.heads))
        pair = [_of_row(case, work, row, head, dtype) for dtype in (np.float64, np.float32)]
        samples["query"].append((np.asarray(found.query[0][row, head]), *pair))
        key, kv_head = int(random.integers(case.key_lens[0])), int(random.integers(case.kv_heads))
        pairs = [_of_key(case, work, key, kv_head, dtype) for dtype in (np.float64, np.float32)]
        for i, name in enumerate(("key", "value")):
            samples[name].append((np.asarray(getattr(found, name)[0][key, kv_head]), *(pair[i] for pair in pairs)))
    for name, each in samples.items():
        got, exact, plain = (np.stack(column) for column in zip(*each, strict=True))
        try:
            assert_within_budget(got, exact, rounded(plain, case.dtype), case.dtype)
        except AssertionError as error:
            raise HeadraceError(f"{case.name}: d_{name} is wrong, no speed is printed: {error}") from error


def _of_row(case: SpeedCase, work: Work, row: int, head: int, dtype: Any) -> np.ndarray:
    """The gradient of one query, from out and lse as they are."""
    part, kv_head = work.parts[0], head * case.kv_heads // case.heads
    end = len(part.keys) - (len(part.query) - 1 - row if work.causal else 0)
    keys, values = (array[:end, kv_head].astype(dtype) for array in (part.keys, part.values))
    one = [array[row, head][None].astype(dtype) for array in (part.query, work.beside["d_out"], work.beside["out"])]
    _, slopes = _weights(
        case, work, (one[0], keys, values, *one[1:], work.beside["lse"][row, head][None].astype(dtype))
    )
    return np.asarray((slopes[0][:, None] * keys).sum(axis=0))


def _of_key(case: SpeedCase, work: Work, key: int, kv_head: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of one key and its value."""
    part, group = work.parts[0], case.heads // case.kv_heads
    heads = slice(kv_head * group, (kv_head + 1) * group)
    first = max(key - (len(part.keys) - len(part.query)), 0) if work.causal else 0
    rows = [array[first:, heads].astype(dtype) for array in (part.query, work.beside["d_out"], work.beside["out"])]
    query, d_out, out = (array.reshape(-1, array.shape[-1]) for array in rows)
    lse = work.beside["lse"][first:, heads].astype(dtype).reshape(-1)
    one = (part.keys[key, kv_head][None].astype(dtype), part.values[key, kv_head][None].astype(dtype))
    weights, slopes = _weights(case, work, (query, *one, d_out, out, lse))
    return np.asarray((slopes * query).sum(axis=0)), np.asarray((weights * d_out).sum(axis=0))


def _weights(case: SpeedCase, work: Work, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Weights and slopes [rows, keys]; in float32 rounded where products are bf16."""
    query, keys, values, d_out, out, lse = arrays
    dtype = query.dtype.type
    weights = np.exp(query @ keys.T * dtype(work.scale) - lse[:, None])
    slopes = weights * (d_out @ values.T - (d_out * out).sum(axis=1)[:, None]) * dtype(work.scale)
    if dtype is np.float32 and case.unit == "bf16":
        weights, slopes = (rounded(array, "bfloat16").astype(dtype) for array in (weights, slopes))
    return weights, slopes


# torch


def torch_backward(parts: list[tuple[Any, Any, Any]], work: Work) -> dict[str, Callable[[], Any]]:
    """The gradients by SDPA: with enable_gqa, and with keys and values repeated for every query head."""
    calls = {"torch SDPA": _sdpa_backward(parts[0], work, repeated=False)}
    query, keys, _ = parts[0]
    if query.shape[1] != keys.shape[1]:
        calls["torch SDPA, keys repeated"] = _sdpa_backward(parts[0], work, repeated=True)
    return calls


def _sdpa_backward(part: tuple[Any, Any, Any], work: Work, *, repeated: bool) -> Callable[[], Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    inputs = [tensor.detach().requires_grad_() for tensor in part]
    query, keys, values = inputs
    group = query.shape[1] // keys.shape[1]
    if repeated:
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    out = sdpa(query, keys, values, is_causal=work.causal, scale=work.scale, enable_gqa=group > 1 and not repeated)
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)
