"""merge_attention on a GPU: partial attentions over parts of the keys as the attention over all of them.

Wins: always, where the arrays are. Schedule: a program has a few rows; it reads the logarithms of up to four parts,
makes weights of them, reads each part once and writes the whole. More parts are merged four at a time, what has been
merged being the first of the next four, in float32. Source: Dao 2023, "Flash-Decoding"; Ye et al. 2024, "Cascades".
Error: weights and sums in float32. Bound: reading the parts. Not measured yet: `headrace bench gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.attention_scores import HIDDEN, LN_2, LOG2_E, rounded_to
from headrace.kernels.triton.launch import named_strides, on_device_of
from headrace.kernels.triton.variants import Variant

AT_ONCE = 4
_ELEMENTS = 2048  # of a program


@triton.jit
def logarithms(lse, token, head, live, lse_token, lse_head):
    return tl.load(lse + token * lse_token + head * lse_head, mask=live, other=HIDDEN)


@triton.jit
def added(total, sums, part, mine, top, token, head, part_token, part_head, item, dim: tl.constexpr):
    """The sum of weights and the weighted sum with one more part; where its weight is 0 it is not looked at."""
    weight = tl.exp2((mine - top) * LOG2_E)
    counts = weight > 0
    places = part + token * part_token + head * part_head
    inside = counts[:, None] & (item < dim)[None, :]
    values = tl.load(places[:, None] + item[None, :], mask=inside, other=0.0).to(tl.float32)
    weighted = tl.where(counts[:, None], weight[:, None] * values, 0.0)
    return total + weight, sums + tl.where((weight == weight)[:, None], weighted, float("nan"))


@triton.jit
def merge_kernel(
    out_0,
    lse_0,
    out_1,
    lse_1,
    out_2,
    lse_2,
    out_3,
    lse_3,
    out,
    lse,
    sinks,
    num_rows,
    num_heads,
    out_0_token,
    out_0_head,
    lse_0_token,
    lse_0_head,
    out_1_token,
    out_1_head,
    lse_1_token,
    lse_1_head,
    out_2_token,
    out_2_head,
    lse_2_token,
    lse_2_head,
    out_3_token,
    out_3_head,
    lse_3_token,
    lse_3_head,
    out_token,
    out_head,
    lse_token,
    lse_head,
    dim: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    live = row < num_rows
    token, head = row // num_heads, row % num_heads
    item = tl.arange(0, block)
    first = logarithms(lse_0, token, head, live, lse_0_token, lse_0_head)
    second, third, fourth = first, first, first
    if lse_1 is not None:
        second = logarithms(lse_1, token, head, live, lse_1_token, lse_1_head)
    if lse_2 is not None:
        third = logarithms(lse_2, token, head, live, lse_2_token, lse_2_head)
    if lse_3 is not None:
        fourth = logarithms(lse_3, token, head, live, lse_3_token, lse_3_head)
    top = tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth))
    top = tl.where(top == HIDDEN, 0.0, top)
    total = tl.full([rows], 0.0, tl.float32)
    sums = tl.full([rows, block], 0.0, tl.float32)
    total, sums = added(total, sums, out_0, first, top, token, head, out_0_token, out_0_head, item, dim)
    if lse_1 is not None:
        total, sums = added(total, sums, out_1, second, top, token, head, out_1_token, out_1_head, item, dim)
    if lse_2 is not None:
        total, sums = added(total, sums, out_2, third, top, token, head, out_2_token, out_2_head, item, dim)
    if lse_3 is not None:
        total, sums = added(total, sums, out_3, fourth, top, token, head, out_3_token, out_3_head, item, dim)
    everything = total
    if sinks is not None:
        everything += tl.exp2((tl.load(sinks + head, mask=live, other=0.0) - top) * LOG2_E)
    nobody = total == 0.0
    result = tl.where(nobody[:, None], 0.0, sums / tl.where(nobody, 1.0, everything)[:, None])
    logarithm = tl.where(nobody, HIDDEN, top + tl.log2(tl.where(nobody, 1.0, total)) * LN_2)
    # The whole may be written over a part: all of the program have read it by now.
    tl.debug_barrier()
    places = out + token * out_token + head * out_head
    tl.store(
        places[:, None] + item[None, :],
        rounded_to(result, out.dtype.element_ty),
        mask=live[:, None] & (item < dim)[None, :],
    )
    tl.store(lse + token * lse_token + head * lse_head, logarithm, mask=live)


def run(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], *, out: Any, lse: Any, sinks: Any) -> None:
    """Writes the whole to `out` and `lse`."""
    if not out.numel():
        return
    parts = list(zip(map(_three, outs), map(_two, lses), strict=True))
    whole, logarithm = _three(out), _two(lse)
    sinks = None if sinks is None else sinks.contiguous()
    with on_device_of(out):
        while len(parts) > AT_ONCE:
            first = parts[0][0]
            merged = torch.empty(first.shape, dtype=torch.float32, device=first.device)
            between = torch.empty(first.shape[:2], dtype=torch.float32, device=first.device)
            _launch(parts[:AT_ONCE], merged, between, None)
            parts = [(merged, between), *parts[AT_ONCE:]]
        _launch(parts, whole, logarithm, sinks)
    for given, used in ((out, whole), (lse, logarithm)):
        if given.data_ptr() != used.data_ptr():
            given.copy_(used.view(given.shape))


def _three(part: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, value_dim], a copy where the dimensions before do not lie evenly."""
    return part.reshape(-1, *part.shape[-2:])


def _two(lse: torch.Tensor) -> torch.Tensor:
    return lse.reshape(-1, lse.shape[-1])


def _launch(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], out: torch.Tensor, lse: torch.Tensor, sinks: Any
) -> None:
    tokens, heads, dim = out.shape
    block = triton.next_power_of_2(dim)
    rows = min(max(_ELEMENTS // block, 1), 64)
    arguments: dict[str, Any] = {}
    for n in range(AT_ONCE):
        part = parts[n] if n < len(parts) else (None, None)
        for name, array in zip((f"out_{n}", f"lse_{n}"), part, strict=True):
            arguments |= {name: array} | _strides(name, array)
    arguments |= {"out": out, "lse": lse, "sinks": sinks} | _strides("out", out) | _strides("lse", lse)
    sizes = {"num_rows": tokens * heads, "num_heads": heads, "dim": dim, "block": block, "rows": rows}
    merge_kernel[(triton.cdiv(tokens * heads, rows),)](**arguments, **sizes, num_warps=4)


def _strides(name: str, array: torch.Tensor | None) -> dict[str, int]:
    return named_strides({name: array}, {f"{name}_token {name}_head": name})


def variants() -> list[Variant]:
    """Two parts as float32, and four in bfloat16."""
    return [_variant("2 parts fp32 d128", 2, "fp32", 128), _variant("4 parts bf16 d512", 4, "bf16", 512)]


def _variant(name: str, count: int, dtype: str, dim: int) -> Variant:
    types = dict.fromkeys(merge_kernel.arg_names[:-3], "i32") | {"out": f"*{dtype}", "lse": "*fp32"}
    types |= {f"out_{n}": f"*{dtype}" for n in range(count)} | {f"lse_{n}": "*fp32" for n in range(count)}
    absent = [f"{word}_{n}" for n in range(count, AT_ONCE) for word in ("out", "lse")] + ["sinks"]
    constants: dict[str, Any] = dict.fromkeys(absent)
    constants |= {"dim": dim, "block": dim, "rows": max(_ELEMENTS // dim, 1)}
    types = {n: kind for n, kind in types.items() if n not in constants}
    strides = tuple(n for n in types if n.startswith("out_") and n.endswith(("_token", "_head")))
    return Variant(name, merge_kernel, types, constants, num_warps=4, aligned=strides)
