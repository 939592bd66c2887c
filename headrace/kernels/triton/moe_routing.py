"""Routing of tokens to experts on a GPU, and their grouping by expert, without the host.

Wins always there. Bound: launches; the counts of a step's pairs are integers of a few kilobytes.
Schedule:
  1. `choose_experts`: a program takes a few tokens whole; with groups it first takes those whose two best sum highest;
     then the best expert, again and again, of equal ones the lowest.
  2. `count_pairs`: each (token, place) pair takes a number within its expert, by an atomic counter.
  3. `place_pairs`: each program sums the counts to where experts begin, writes its pairs there, and says of its tiles
     which expert and which rows are theirs. How many tiles there may be at most follows from the shapes.
Source: Shazeer et al. 2017 for the choice; DeepSeek-AI 2024, "DeepSeek-V3", for sigmoid scores, biases and groups.
The order of pairs within an expert may change from run to run; what is computed of each row does not depend on it.
Error: scores in float32, one rounding of the exponential and one of the division.
Speed: not measured yet (`headrace bench gpu`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.launch import on_device_of
from headrace.kernels.triton.rows import packed
from headrace.kernels.triton.variants import Variant

ROUTED_TOKENS = 2048  # experts times tokens of a program
PAIRS = 64  # of a program that counts or places


@triton.jit
def best_of(keys, columns, FAR: tl.constexpr):
    """The largest of each row and the first place that has it."""
    most = tl.max(keys, axis=1)
    return most, tl.min(tl.where(keys == most[:, None], columns[None, :], FAR), axis=1)


@triton.jit
def choose_experts(
    logits, logits_stride, bias, experts, weights, num_tokens, num_experts, num_groups, top_groups, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, GROUPED: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Experts of some tokens, best first, and their weights."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, EXPERTS)
    real = columns < num_experts
    mask = (tokens < num_tokens)[:, None] & real[None, :]
    x = tl.load(logits + tokens.to(tl.int64)[:, None] * logits_stride + columns[None, :], mask=mask, other=0.0)
    scores = scores_of(x.to(tl.float32), real, SIGMOID)
    keys = scores
    if bias is not None:
        keys += tl.load(bias + columns, mask=real, other=0.0)[None, :]
    keys = tl.where(real[None, :], keys, float("-inf"))
    if GROUPED:
        keys = of_best_groups(keys, columns, num_experts // num_groups, num_groups, top_groups, EXPERTS)
    places = tl.arange(0, PLACES)[None, :]
    picked = tl.zeros([TOKENS, PLACES], tl.float32)
    numbers = tl.zeros([TOKENS, PLACES], tl.int32)
    for place in tl.static_range(TOP_K):
        _, best = best_of(keys, columns, EXPERTS)
        chosen = columns[None, :] == best[:, None]
        score = tl.sum(tl.where(chosen, scores, 0.0), axis=1)
        keys = tl.where(chosen, float("-inf"), keys)
        picked = tl.where(places == place, score[:, None], picked)
        numbers = tl.where(places == place, best[:, None], numbers)
    if NORMALIZE:
        total = tl.sum(picked, axis=1)
        picked = tl.div_rn(picked, tl.where(total > 0, total, 1.0)[:, None])
    mask = (tokens < num_tokens)[:, None] & (places < TOP_K)
    where = tokens[:, None] * TOP_K + places
    tl.store(experts + where, numbers, mask=mask)
    tl.store(weights + where, picked * scale, mask=mask)


@triton.jit
def scores_of(x, real, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(0.0 - x))
    x = tl.where(real[None, :], x, float("-inf"))
    weight = tl.exp(x - tl.max(x, axis=1)[:, None])
    return tl.div_rn(weight, tl.sum(weight, axis=1)[:, None])


@triton.jit
def of_best_groups(keys, columns, group_len, num_groups, top_groups, EXPERTS: tl.constexpr):
    """The keys of the groups whose two largest sum highest; -inf elsewhere."""
    group = columns // group_len
    sums = tl.full(keys.shape, float("-inf"), tl.float32)
    for each in range(num_groups):
        inside = (group == each)[None, :]
        members = tl.where(inside, keys, float("-inf"))
        first, place = best_of(members, columns, EXPERTS)
        second = tl.max(tl.where(columns[None, :] == place[:, None], float("-inf"), members), axis=1)
        both = first + tl.where(second > float("-inf"), second, 0.0)
        sums = tl.where(inside, both[:, None], sums)
    kept = tl.zeros(keys.shape, tl.int1)
    for _ in range(top_groups):
        _, place = best_of(tl.where(kept, float("-inf"), sums), columns, EXPERTS)
        kept = kept | (group[None, :] == (place // group_len)[:, None])
    return tl.where(kept, keys, float("-inf"))


@triton.jit
def count_pairs(experts, counts, ranks, num_pairs, num_experts, PAIRS: tl.constexpr):
    """How many pairs each expert has, and the number of each pair among them."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(experts + pairs, mask=pairs < num_pairs, other=-1)
    here = (expert >= 0) & (expert < num_experts)
    rank = tl.atomic_add(counts + tl.where(here, expert, 0), 1, mask=here, sem="relaxed")
    tl.store(ranks + pairs, rank, mask=here)


@triton.jit
def place_pairs(
    experts, counts, ranks, order, tiles, num_pairs, num_experts, num_tiles, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """order: pairs by expert. tiles [num_tiles, 3]: the expert, -1 for none, the first row and the end of its rows."""
    columns = tl.arange(0, EXPERTS)
    count = tl.load(counts + columns, mask=columns < num_experts, other=0)
    ends = tl.cumsum(count, axis=0)
    needed = (count + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(needed, axis=0)
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(experts + pairs, mask=pairs < num_pairs, other=-1)
    here = (expert >= 0) & (expert < num_experts)
    mine = columns[None, :] == expert[:, None]
    start = tl.sum(tl.where(mine, (ends - count)[None, :], 0), axis=1)
    rank = tl.load(ranks + pairs, mask=here, other=0)
    tl.store(order + start + rank, pairs, mask=here)

    owner = tl.sum((tile_ends[None, :] <= pairs[:, None]).to(tl.int32), axis=1)  # pairs, here as numbers of tiles
    mine = columns[None, :] == owner[:, None]
    first_tile = tl.sum(tl.where(mine, (tile_ends - needed)[None, :], 0), axis=1)
    first = tl.sum(tl.where(mine, (ends - count)[None, :], 0), axis=1) + (pairs - first_tile) * ROWS
    end = tl.minimum(tl.sum(tl.where(mine, ends[None, :], 0), axis=1), first + ROWS)
    inside = pairs < num_tiles
    tl.store(tiles + pairs * 3, tl.where(owner < num_experts, owner, -1), mask=inside)
    tl.store(tiles + pairs * 3 + 1, first, mask=inside)
    tl.store(tiles + pairs * 3 + 2, end, mask=inside)


class Groups(NamedTuple):
    """Pairs by expert, and which rows of them are whose tile."""

    order: torch.Tensor  # [pairs] int32
    tiles: torch.Tensor  # [num_tiles, 3] int32


def num_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles of `rows` rows that pairs of so many experts may need, however they fall."""
    busy = min(num_pairs, num_experts)
    return (num_pairs + busy * (rows - 1)) // rows


def group_pairs(experts: torch.Tensor, num_experts: int, rows: int) -> Groups:
    """The pairs of experts [tokens, top_k] int32 by expert, in tiles of `rows`. On its device alone."""
    pairs = experts.numel()
    new: dict[str, Any] = {"dtype": torch.int32, "device": experts.device}
    counts, ranks = torch.zeros(num_experts, **new), torch.empty(pairs, **new)
    most = num_tiles(pairs, num_experts, rows)
    order, tiles = torch.empty(pairs, **new), torch.empty((most, 3), **new)
    grid = (triton.cdiv(pairs, PAIRS),)
    with on_device_of(experts):
        count_pairs[grid](experts, counts, ranks, pairs, num_experts, PAIRS=PAIRS, num_warps=2)
        place_pairs[grid](
            experts, counts, ranks, order, tiles, pairs, num_experts, most,
            ROWS=rows, PAIRS=PAIRS, EXPERTS=triton.next_power_of_2(num_experts), num_warps=4,
        )  # fmt: skip
    return Groups(order, tiles)


def run(logits: Any, bias: Any, experts: Any, weights: Any, options: Any) -> None:
    """Experts and weights [tokens, top_k] of logits [tokens, experts]; options: RoutingOptions of ops/moe.py."""
    logits, experts, weights = packed(logits, "logits"), packed(experts, "experts"), packed(weights, "weights")
    bias = None if bias is None else packed(bias, "bias", dtype="float32")
    num_tokens, num_experts = logits.shape
    if not num_tokens:
        return
    columns, tokens = tile_of(num_experts)
    with on_device_of(logits):
        choose_experts[(triton.cdiv(num_tokens, tokens),)](
            logits, logits.stride(0), bias, experts, weights, num_tokens, num_experts,
            options.num_groups, options.top_groups, options.scale,
            TOP_K=options.top_k, SIGMOID=options.scores == "sigmoid", NORMALIZE=options.normalize,
            GROUPED=options.top_groups < options.num_groups, TOKENS=tokens, EXPERTS=columns,
            PLACES=triton.next_power_of_2(options.top_k), num_warps=4,
        )  # fmt: skip


def tile_of(num_experts: int) -> tuple[int, int]:
    """Columns and tokens of a program that chooses."""
    columns = triton.next_power_of_2(max(num_experts, 2))
    return columns, max(1, ROUTED_TOKENS // columns)


def variants() -> list[Variant]:
    """The choice as Mixtral, Qwen3 and DeepSeek-V3 make it; counting and placing."""
    types = {"logits": "*fp32", "logits_stride": "i32", "experts": "*i32", "weights": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("num_tokens", "num_experts", "num_groups", "top_groups"), "i32")
    flags = {"SIGMOID": False, "NORMALIZE": True, "GROUPED": False, "bias": None}
    found = []
    for name, experts, top_k, changes in (
        ("softmax 2 of 8", 8, 2, {}),
        ("softmax 8 of 128", 128, 8, {}),
        ("sigmoid 8 of 256 in groups", 256, 8, {"SIGMOID": True, "GROUPED": True}),
    ):
        columns, tokens = tile_of(experts)
        constants = flags | {"TOP_K": top_k, "PLACES": top_k, "TOKENS": tokens, "EXPERTS": columns} | changes
        own = types | ({"bias": "*fp32"} if changes else {})
        constants = {key: value for key, value in constants.items() if key not in own}
        found.append(Variant(name, choose_experts, own, constants))
    pairs = dict.fromkeys(("experts", "counts", "ranks"), "*i32") | {"num_pairs": "i32", "num_experts": "i32"}
    found.append(Variant("counts", count_pairs, pairs, {"PAIRS": PAIRS}, 2))
    placed = pairs | {"order": "*i32", "tiles": "*i32", "num_tiles": "i32"}
    return [*found, Variant("places", place_pairs, placed, {"ROWS": 64, "PAIRS": PAIRS, "EXPERTS": 256})]
