"""Decoding over a static cache, in one compiled graph: headrace's split-KV attention beside SDPA and FlexAttention.

    python examples/torch_decoder.py --batch 8 --context 8192        # --quick: small and soon over

One program, three attentions: what differs is how each is told which keys of the cache count, and the call itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from small_llama import Llama, Sizes
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from headrace.ops import attention

Cache = list[tuple[Tensor, Tensor]]  # of each layer: keys and values, [batch, kv_heads, room, head_dim]
BLOCK = 128


def lens_upto(position: int, cache: Cache) -> Tensor:
    return torch.full((len(cache[0][0]),), position + 1, dtype=torch.int32)


def by_headrace(query: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
    return attention(query, keys.transpose(1, 2), values.transpose(1, 2), key_lens=lens).out


def mask_upto(position: int, cache: Cache) -> Tensor:
    return (torch.arange(cache[0][0].shape[2]) <= position)[None, None, None]


def by_sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The heads that share a KV head are rows of it, so that each key is read once: SDPA at its best."""
    rows = query.unflatten(2, (keys.shape[1], -1)).squeeze(1)
    return scaled_dot_product_attention(rows, keys, values, attn_mask=mask).flatten(1, 2)[:, None]


def blocks_upto(position: int, cache: Cache) -> tuple[BlockMask, Tensor]:
    """Blocks before that of the position are seen whole, its own up to the position."""
    room = cache[0][0].shape[2]
    order, whole = torch.arange(-(-room // BLOCK), dtype=torch.int32), position // BLOCK
    counts = (torch.full((1, 1, 1), count, dtype=torch.int32) for count in (1, whole))
    indices = (each[None, None, None] for each in (order.roll(-whole), order))
    (partly, full), (partly_at, full_at) = counts, indices
    blocks = BlockMask.from_kv_blocks(partly, partly_at, full, full_at, BLOCK_SIZE=BLOCK, seq_lengths=(1, room))
    return blocks, torch.tensor(position)


def by_flex(query: Tensor, keys: Tensor, values: Tensor, seen: tuple[BlockMask, Tensor]) -> Tensor:
    blocks, position = seen
    blocks.mask_mod = lambda b, h, q, k: k <= position
    return flex_attention(query.transpose(1, 2), keys, values, block_mask=blocks, enable_gqa=True).transpose(1, 2)


ATTENTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "headrace": (lens_upto, by_headrace),
    "SDPA": (mask_upto, by_sdpa),
    "FlexAttention": (blocks_upto, by_flex),
}


class Decoder:
    """Greedy decoding of a batch, one compiled graph for every step."""

    def __init__(self, model: Llama, cache: Cache, name: str):
        self.cache, (self.upto, attend) = cache, ATTENTIONS[name]

        def step(tokens: Tensor, position: Tensor, seen: Any) -> Tensor:
            def cached(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                keys, values = cache[layer]
                keys[:, :, position] = key.transpose(1, 2)
                values[:, :, position] = value.transpose(1, 2)
                return attend(query, keys, values, seen)

            return model(tokens[:, None], position, cached)[:, -1].argmax(-1)

        self.step = torch.compile(step, fullgraph=True)

    def run(self, begin: int, steps: int) -> Tensor:
        """The tokens drawn at positions begin .. begin + steps, [batch, steps]."""
        tokens = torch.zeros(len(self.cache[0][0]), dtype=torch.long)
        drawn = []
        for position in range(begin, begin + steps):
            tokens = self.step(tokens, torch.tensor([position]), self.upto(position, self.cache))
            drawn.append(tokens)
        return torch.stack(drawn, 1)


def measured(decoders: dict[str, Decoder], begin: int, steps: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step. The decoders take turns: what a machine does for others changes by the minute."""
    samples: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(rounds):
        names = list(decoders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            decoders[name].run(begin, steps)
            samples[name].append((time.perf_counter() - started) / steps * 1e3)
    return {name: statistics.median(each) for name, each in samples.items()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 sequences, 300 keys, a tiny model in float32")
    sizes = {"batch": 8, "context": 8192, "layers": 4, "dim": 1024, "heads": 16, "kv-heads": 4, "steps": 8, "rounds": 9}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    given = parser.parse_args()
    if given.quick:
        small = {"batch": 2, "context": 300, "layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "steps": 4, "rounds": 1}
        vars(given).update(small, dtype="float32")
    return given


@torch.no_grad()
def main() -> None:
    given = options()
    torch.manual_seed(0)
    dtype, heads = getattr(torch, given.dtype), {"heads": given.heads, "kv_heads": given.kv_heads}
    sizes = Sizes(vocab=4096, dim=given.dim, layers=given.layers, hidden=3 * given.dim, **heads)
    model = Llama(sizes).to(dtype).eval()
    shape = (given.batch, given.kv_heads, given.context + given.steps, sizes.head_dim)
    cache = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(given.layers)]
    decoders = {name: Decoder(model, cache, name) for name in ATTENTIONS}
    drawn = {name: decoder.run(given.context, given.steps) for name, decoder in decoders.items()}  # compiles
    for name, tokens in drawn.items():
        same = int((tokens == drawn["SDPA"]).sum())
        print(f"{name}: {same} of {tokens.numel()} tokens are those drawn with SDPA")

    medians = measured(decoders, given.context, given.steps, given.rounds)
    read = sum(keys.numel() * 2 * keys.element_size() for keys, _ in cache) / 1e6
    print(f"batch {given.batch}, {given.context} keys each, {given.dtype}: {read:.0f} MB of cache a step")
    print(f"{'':14} {'ms a step':>10} {'x headrace':>11}")
    for name, median in medians.items():
        print(f"{name:14} {median:10.2f} {median / medians['headrace']:11.2f}")


if __name__ == "__main__":
    main()
