"""Training on packed documents: ragged attention over each document alone, beside SDPA under a block-diagonal mask.

    python examples/train_packed.py                       # 200 steps of 1024 bytes of headrace's own texts
    python examples/train_packed.py --tokens 4096 --steps 20

Before the first step, loss and gradients of both are held to those of float64: ours may be twice as far off as SDPA's.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from small_llama import Attention, Llama, Sizes
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from headrace.ops import attention

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 2.0**-24  # of float32


@dataclass(frozen=True)
class Packed:
    """Documents one behind the other: inputs, targets and positions are [tokens], starts int32 [documents + 1]."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    starts: Tensor


def documents() -> list[bytes]:
    """The paragraphs of headrace's README and docs."""
    texts = (path.read_text(encoding="utf-8") for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]))
    return [part.encode() for text in texts for part in re.split(r"\n{2,}", text) if len(part) > 1]


def batches(texts: list[bytes], tokens: int) -> Iterator[Packed]:
    """Packs of exactly so many tokens, for ever: documents drawn at random, the last one cut."""
    draw = random.Random(0)
    while True:
        inputs: list[int] = []
        targets: list[int] = []
        starts = [0]
        while len(inputs) < tokens:
            text = draw.choice(texts)[: tokens - len(inputs) + 1]
            inputs += text[:-1]
            targets += text[1:]
            starts.append(len(inputs))
        positions = [place for begin, end in itertools.pairwise(starts) for place in range(end - begin)]
        yield Packed(*map(torch.tensor, (inputs, targets, positions)), torch.tensor(starts, dtype=torch.int32))


def by_headrace(pack: Packed) -> Attention:
    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, causal=True, query_starts=pack.starts).out

    return attend


def by_sdpa(pack: Packed) -> Attention:
    owner = torch.repeat_interleave(torch.arange(len(pack.starts) - 1), pack.starts.diff())
    mask = (owner[:, None] == owner).tril()

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (kept.repeat_interleave(group, dim=1) for kept in (key, value))
        query, key, value = (rows.transpose(0, 1)[None] for rows in (query, key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1)

    return attend


ATTENTIONS: dict[str, Callable[[Packed], Attention]] = {"headrace": by_headrace, "SDPA": by_sdpa}


def loss_of(model: Llama, pack: Packed, attend: Attention) -> Tensor:
    return cross_entropy(model(pack.inputs, pack.positions, attend), pack.targets)


def gradients(model: Llama, pack: Packed, attend: Attention) -> dict[str, Tensor]:
    """The loss and every parameter's gradient."""
    loss = loss_of(model, pack, attend)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def furthest(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest error of any element, over the largest element of its tensor."""
    return max(float((found[name] - each).abs().max() / each.abs().max()) for name, each in exact.items())


def check_gradients(model: Llama, pack: Packed) -> None:
    exact = gradients(copy.deepcopy(model).double(), pack, by_sdpa(pack))
    ours, theirs = (furthest(gradients(model, pack, make(pack)), exact) for make in ATTENTIONS.values())
    print(f"loss and gradients, furthest from float64's: headrace {ours:.1e}, SDPA {theirs:.1e}")
    if not ours <= 2 * (theirs + ROUNDING):
        raise SystemExit("headrace's gradients are further off than the budget allows")


class Run:
    """A model in training with one of the attentions: its losses, and how long each step took."""

    def __init__(self, model: Llama, name: str):
        self.model, self.attention = copy.deepcopy(model), ATTENTIONS[name]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, betas=(0.9, 0.95))
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, pack: Packed) -> None:
        started = time.perf_counter()
        loss = loss_of(self.model, pack, self.attention(pack))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1024, help="of a pack, a byte each")
    given = parser.parse_args()

    torch.manual_seed(0)
    model, packs = Llama(Sizes()), batches(documents(), given.tokens)
    check_gradients(model, next(packs))
    runs = {name: Run(model, name) for name in ATTENTIONS}
    for number, pack in zip(range(given.steps), packs, strict=False):
        for run in list(runs.values())[:: 1 if number % 2 else -1]:  # in turns: both see the same machine
            run.step(pack)
        if number % max(1, given.steps // 10) == 0 or number == given.steps - 1:
            print(f"step {number:4}  " + "  ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items()))
    for name, run in runs.items():
        few = max(1, given.steps // 10)
        first, last = (statistics.mean(some) for some in (run.losses[:few], run.losses[-few:]))
        speed = given.tokens / statistics.median(run.seconds)
        print(f"{name:9} {speed:7.0f} tokens/s, loss from {first:.3f} to {last:.3f}")
    ratio = statistics.median(runs["SDPA"].seconds) / statistics.median(runs["headrace"].seconds)
    print(f"headrace is {ratio:.2f} x as fast")


if __name__ == "__main__":
    main()
