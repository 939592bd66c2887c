"""Arrays, options, sequences of many lengths for the tests of FlashAttention's functions, and what the formula says."""

import torch
from plain_attention import plain, random


def arrays(dtype=torch.bfloat16, batch=2, queries=33, keys=45, heads=6, kv_heads=2, dim=32, value_dim=32):
    return (
        random(batch, queries, heads, dim, dtype=dtype, seed=1),
        random(batch, keys, kv_heads, dim, dtype=dtype, seed=2),
        random(batch, keys, kv_heads, value_dim, dtype=dtype, seed=3),
    )


def plus_inf(lse):
    return torch.where(lse == -torch.inf, torch.inf, lse)


def by_formula(q, k, v, **options):
    """What version 2 returns: out, and lse with +inf for nothing."""

    def compute(*, dtype, order=None):
        out, lse = plain(q, k, v, dtype=dtype, order=order, **options)
        return out, plus_inf(lse)

    return compute


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.05, 0.01, 0.0])
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "window": ({"window_size": (7, 3)}, {"window": (7, 3)}),
    "window to the left": ({"window_size": (7, -1)}, {"window": (7, -1)}),
    "window to the right": ({"window_size": [-1, 2]}, {"window": (-1, 2)}),
    "window of one": ({"window_size": (0, 0)}, {"window": (0, 0)}),
    "window and causal": ({"window_size": (5, 9), "causal": True}, {"window": (5, 9), "causal": True}),
    "window as numbers of torch": ({"window_size": torch.tensor([7, 3])}, {"window": (7, 3)}),
    "no window, as version 4 says it": ({"window_size": (None, None)}, {}),
    "softcap": ({"softcap": 2.0, "causal": True}, {"softcap": 2.0, "causal": True}),
    "slopes": ({"alibi_slopes": SLOPES}, {"slopes": SLOPES}),
    "slopes, causal": ({"alibi_slopes": SLOPES, "causal": True}, {"slopes": SLOPES, "causal": True}),
    "slopes of each": (
        {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES])},
        {"slopes": torch.stack([SLOPES, 2 * SLOPES])},
    ),
    "sink": ({"learnable_sink": SLOPES.bfloat16()}, {"sink": SLOPES.bfloat16()}),
    "chunks": ({"attention_chunk": 8}, {"chunk": 8}),
    "chunks and more": (
        {"attention_chunk": 11, "window_size": (6, 4), "softcap": 2.0, "alibi_slopes": SLOPES},
        {"chunk": 11, "window": (6, 4), "softcap": 2.0, "slopes": SLOPES},
    ),
    "chunks, causal": ({"attention_chunk": 8, "causal": True}, {"chunk": 8, "causal": True}),
}


def starts_of(lens):
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


QUERY_LENS, KEY_LENS = (5, 0, 17, 1, 3, 12), (9, 4, 17, 30, 0, 7)


def ragged_arrays(dtype=torch.bfloat16, query_lens=QUERY_LENS, key_lens=KEY_LENS):
    return (
        random(sum(query_lens), 6, 32, dtype=dtype, seed=4),
        random(sum(key_lens), 2, 32, dtype=dtype, seed=5),
        random(sum(key_lens), 2, 32, dtype=dtype, seed=6),
    )


def each_by_formula(q, k, v, query_lens, key_lens, *, slopes=None, **options):
    """out [tokens, heads, dim] and lse [heads, tokens], sequence by sequence; gradients flow."""

    def compute(*, dtype, order=None):
        outs, lses = [], []
        parts = zip(q.split(list(query_lens)), k.split(list(key_lens)), v.split(list(key_lens)), strict=True)
        for r, part in enumerate(parts):
            own = {} if slopes is None else {"slopes": slopes if slopes.dim() == 1 else slopes[r]}
            out, lse = plain(*(array[None] for array in part), dtype=dtype, order=order, **own, **options)
            outs.append(out[0])
            lses.append(plus_inf(lse[0]))
        return torch.cat(outs), torch.cat(lses, 1)

    return compute


SLOPES_OF_EACH = torch.stack([SLOPES * (r + 1) for r in range(len(QUERY_LENS))])
NAMES = ("plain", "causal", "window and causal", "softcap", "slopes", "sink", "chunks", "chunks, causal")
RAGGED = {name: OPTIONS[name] for name in NAMES}
RAGGED["slopes of each"] = (
    {"alibi_slopes": SLOPES_OF_EACH, "causal": True},
    {"slopes": SLOPES_OF_EACH, "causal": True},
)


LENS = (QUERY_LENS, KEY_LENS, KEY_LENS)


def used(array, lens, counts):
    return torch.cat([part[:count] for part, count in zip(array.split(list(lens)), counts, strict=True)])


def poisoned(array, lens, counts):
    """NaN in what is not used."""
    array = array.clone()
    for part, count in zip(array.split(list(lens)), counts, strict=True):
        part[count:] = torch.nan
    return array


def pages_of(array, lens, page_size):
    """Pages [pages, page_size, ..] in random places, full of NaN elsewhere, and a table with garbage past the ends."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // page_size) for length in lens]
    order = torch.randperm(sum(counts) + 3, generator=generator)[: sum(counts)]
    pages = torch.full((sum(counts) + 3, page_size, *array.shape[1:]), torch.nan, dtype=array.dtype)
    table = torch.full((len(lens), max(counts) + 1), 10**6, dtype=torch.int32)
    for r, (rows, mine) in enumerate(zip(array.split(list(lens)), order.split(counts), strict=True)):
        table[r, : len(mine)] = mine
        for i, page in enumerate(mine):
            part = rows[i * page_size : (i + 1) * page_size]
            pages[page, : len(part)] = part
    return pages, table
