"""The same attention by torch on the CPU, as its users call it: SDPA, SDPA with the heads of a group as rows, and
compiled FlexAttention.

Arrays are what torch wants: [batch, heads, tokens, dim], contiguous. A batch of unequal lengths is a loop over its
requests. What torch does not have or cannot compile here is said and left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.bench.op_backward import torch_backward
from headrace.bench.op_cases import Part, SpeedCase, Work
from headrace.talk import say

Call = Callable[[], Any]


def torch_calls(case: SpeedCase, work: Work, threads: int, flex: bool = True) -> dict[str, Call]:
    """Calls by name; none without torch."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    torch.set_num_threads(threads)
    parts = [_tensors(part) for part in work.parts]
    if case.backward:
        return torch_backward(parts, work)
    calls = {"torch SDPA": _sdpa(parts, work)}
    if not case.causal:
        calls["torch SDPA, heads as rows"] = _sdpa([_folded(part) for part in parts], work)
    if flex and case.op == "attention":
        call = _flex(parts[0], case, work)
        if call:
            calls["torch FlexAttention, compiled"] = call
    return calls


def _tensors(part: Part) -> tuple[Any, Any, Any]:
    query, keys, values = (
        _tensor(np.ascontiguousarray(a.swapaxes(0, 1))[None]) for a in (part.query, part.keys, part.values)
    )
    return query, keys, values


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _folded(part: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The query heads that read one KV head as rows of one head: each key is then read once."""
    query, keys, values = part
    kv_heads = keys.shape[1]
    return query.reshape(1, kv_heads, -1, query.shape[-1]), keys, values


def _sdpa(parts: list[tuple[Any, Any, Any]], work: Work) -> Call:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def call() -> None:
        with torch.inference_mode():
            for query, keys, values in parts:
                shared = query.shape[1] != keys.shape[1]
                sdpa(query, keys, values, is_causal=work.causal, scale=work.scale, enable_gqa=shared)

    return call


def _flex(part: tuple[Any, Any, Any], case: SpeedCase, work: Work) -> Call | None:
    """Compiled FlexAttention, or None when it does not compile here."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, keys, values = part
    options: dict[str, Any] = {"scale": work.scale, "enable_gqa": True}
    if case.causal:
        lens = (query.shape[2], keys.shape[2])
        options["block_mask"] = create_block_mask(lambda b, h, q, k: q >= k, None, None, *lens, device="cpu")
    compiled = torch.compile(flex_attention)

    def call() -> None:
        with torch.inference_mode():
            compiled(query, keys, values, **options)

    try:
        call()
    except Exception as error:
        say(f"{case.name}: torch FlexAttention left out, it does not compile here: {str(error).splitlines()[0][:120]}")
        return None
    return call
