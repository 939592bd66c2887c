"""A small Llama in PyTorch, as its paper tells it, whose attention is an argument: what the torch examples share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# (layer, query [.., heads, head_dim], key [.., kv_heads, head_dim], value like key) -> [.., heads, head_dim]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What a Llama's matrices are made of; kv_heads of the heads are shared by a group of queries each."""

    vocab: int = 256
    dim: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 384

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Llama(nn.Module):
    """Logits [.., vocab] of tokens [..] at their positions, which may be [..] or any shape that broadcasts to it."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocab, sizes.dim)
        self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, sizes.vocab, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        hidden = self.embedding(tokens)
        turns = turns_at(positions, self.sizes.head_dim, hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, turns, attention)
        return self.head(self.norm(hidden))


class Block(nn.Module):
    """One layer: attention, then a gated feed-forward, each on a normed copy and added to what came in."""

    def __init__(self, sizes: Sizes, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, sizes.head_dim
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.dim) for _ in range(2))
        self.query = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.key = nn.Linear(sizes.dim, sizes.kv_heads * sizes.head_dim, bias=False)
        self.value = nn.Linear(sizes.dim, sizes.kv_heads * sizes.head_dim, bias=False)
        self.out = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.gate = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.dim, bias=False)

    def forward(self, hidden: Tensor, turns: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        normed = self.norms[0](hidden)
        query, key, value = (
            made(normed).unflatten(-1, (-1, self.head_dim)) for made in (self.query, self.key, self.value)
        )
        mixed = attention(self.layer, turned(query, turns), turned(key, turns), value)
        hidden = hidden + self.out(mixed.flatten(-2))
        normed = self.norms[1](hidden)
        return hidden + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def turns_at(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles at positions, [.., 1, head_dim / 2]: the same for every head."""
    speeds = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = positions[..., None, None] * speeds
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(heads: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair (i, i + head_dim / 2) of a head's elements, rotated by its angle."""
    (first, second), (cos, sin) = heads.chunk(2, dim=-1), turns
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
