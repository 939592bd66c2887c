"""Log-probabilities on a GPU: of each row's drawn token and of its likeliest ones, without a sort or the host.

Wins always there. Bound: a row of 150000 logits is read once, 0.15 us of the memory's time; two launches and the
rounds, one for each of the likeliest in both, are all of it.
Schedule:
  1. `weigh`, a program per segment of a row (4096 logits, more for large vocabularies): its largest logit, the sum of
     e^(x - largest), and its own num_top likeliest as keys, an integer that rises with the logit and, of equal ones,
     falls with the id. A round finds the largest key below the one before: nothing is moved.
  2. `tell`, a program per row: the sums of all segments make the logarithm of the row's; rounds over the segments' keys
     give the row's likeliest; the token's own logit is looked up.
Source: the log-sum-exp of parts, as in split-KV attention.
Error: exponentials are float32 (tl.exp), sums float64 over float32 sums of one number of each block of a segment; a
result is rounded to float32 once. All in an order that follows from the row alone.
Speed: not measured yet (`headrace bench gpu`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.rows import packed
from headrace.kernels.triton.sampling import order_of, segments_of, value_of
from headrace.kernels.triton.variants import Variant

BLOCK = 4096  # logits that a program holds at a time
WARPS = 8

_NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def key_of(x, ids):
    """Rises with a logit and falls with its id: no two are the same."""
    return (order_of(x).to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def weigh(
    logits, logits_stride, peaks, sums, keys, vocab, num_segments, num_top, SEGMENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a segment: its largest logit, its weight, its likeliest. NaN where one is NaN or infinite."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, SEGMENT, BLOCK):
        ids = segment * SEGMENT + start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * logits_stride + ids, mask=ids < vocab, other=float("-inf"))
        bad |= (~(x < float("inf"))).to(tl.int32)
        most = tl.maximum(most, x)
    peak = tl.max(most)
    shift = tl.where(peak > float("-inf"), peak, 0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SEGMENT, BLOCK):
        ids = segment * SEGMENT + start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * logits_stride + ids, mask=ids < vocab, other=float("-inf"))
        total += tl.exp(x - shift)
    place = row * num_segments + segment
    tl.store(peaks + place, tl.where(tl.max(bad) > 0, float("nan"), shift))
    tl.store(sums + place, tl.sum(total.to(tl.float64)))
    last = tl.full([], 0x7FFFFFFF, tl.int64) << 32
    for n in range(num_top):
        best = tl.full([BLOCK], _NO_KEY, tl.int64)
        for start in range(0, SEGMENT, BLOCK):
            ids = segment * SEGMENT + start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * logits_stride + ids, mask=ids < vocab, other=float("-inf"))
            key = key_of(x, ids)
            best = tl.maximum(best, tl.where((ids < vocab) & (key < last), key, _NO_KEY))
        last = tl.max(best)
        tl.store(keys + place * num_top + n, last)


@triton.jit
def tell(
    logits, logits_stride, tokens, peaks, sums, keys, chosen, top_ids, top, vocab, num_segments, num_top,
    SEGMENTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Of a row: the logarithm of its weight, its token's logprob, its likeliest."""
    row = tl.program_id(0).to(tl.int64)
    segments = tl.arange(0, SEGMENTS)
    inside = segments < num_segments
    peak = tl.load(peaks + row * num_segments + segments, mask=inside, other=float("-inf"))
    weight = tl.load(sums + row * num_segments + segments, mask=inside, other=0.0)
    bad = tl.max((peak != peak).to(tl.int32)) > 0
    largest = tl.max(tl.where(weight > 0, peak, float("-inf")))
    total = tl.sum(tl.where(weight > 0, weight * tl.exp((peak - largest).to(tl.float64)), 0.0))
    zero = tl.where(bad, float("nan"), largest.to(tl.float64) + tl.log(total))
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < vocab)
    own = tl.load(logits + row * logits_stride + token, mask=known, other=float("nan"))
    tl.store(chosen + row, (own.to(tl.float64) - zero).to(tl.float32))
    places = tl.arange(0, KEYS)
    found = tl.load(keys + row * num_segments * num_top + places, mask=places < num_segments * num_top, other=_NO_KEY)
    last = tl.full([], 0x7FFFFFFF, tl.int64) << 32
    for n in range(num_top):
        last = tl.max(tl.where(found < last, found, _NO_KEY))
        x = value_of((last >> 32).to(tl.int32))
        tl.store(top_ids + row * num_top + n, ((last & 0x7FFFFFFF) ^ 0x7FFFFFFF).to(tl.int32))
        tl.store(top + row * num_top + n, (x.to(tl.float64) - zero).to(tl.float32))


def run(logits: Any, tokens: Any, chosen: Any, top_ids: Any, top: Any) -> None:
    """The results of every row; arrays as ops/logprobs.py names them."""
    (rows, vocab), num_top = logits.shape, top_ids.shape[1]
    if not rows:
        return
    logits = packed(logits, "logits")
    segment, number = segments_of(vocab)
    segments, block = triton.next_power_of_2(number), min(BLOCK, segment)
    new: dict[str, Any] = {"device": logits.device}
    peaks = torch.empty((rows, number), **new)
    sums = torch.empty((rows, number), dtype=torch.float64, **new)
    keys = torch.empty((rows, number, max(num_top, 1)), dtype=torch.int64, **new)
    sizes, room = (vocab, number, num_top), triton.next_power_of_2(number * max(num_top, 1))
    with on_device_of(logits):
        weigh[(rows, number)](
            logits, logits.stride(0), peaks, sums, keys, *sizes, SEGMENT=segment, BLOCK=block, num_warps=WARPS
        )
        tell[(rows,)](
            logits, logits.stride(0), tokens.contiguous(), peaks, sums, keys, chosen, top_ids, top, *sizes,
            SEGMENTS=segments, KEYS=room, num_warps=WARPS,
        )  # fmt: skip


def variants() -> list[Variant]:
    """A vocabulary of 150000 with 20 likeliest tokens, and with as many as there may be."""
    segment, number = segments_of(151936)
    rows = {"logits": "*fp32", "logits_stride": "i32", "peaks": "*fp32", "sums": "*fp64", "keys": "*i64"}
    rows |= {"vocab": "i32", "num_segments": "i32", "num_top": "i32"}
    told = rows | {"tokens": "*i32", "chosen": "*fp32", "top_ids": "*i32", "top": "*fp32"}
    aligned, shape = ("logits_stride", "vocab"), {"SEGMENTS": triton.next_power_of_2(number)}
    found = [Variant("segments", weigh, rows, {"SEGMENT": segment, "BLOCK": BLOCK}, WARPS, aligned=aligned)]
    for top in (20, 128):
        keys = triton.next_power_of_2(number * top)
        found.append(Variant(f"rows, top {top}", tell, told, shape | {"KEYS": keys}, WARPS, aligned=aligned))
    return found
