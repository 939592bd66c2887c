"""FlashMLA's float8 caches: both layouts, written byte by byte here, read as the numbers they mean."""

import math
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from paged_oracle import Request, hold, normal

from headrace.compat.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache

PAGES, LISTED = 4, 9


def e4m3(numbers):
    """The nearest float8_e4m3fn codes, as bytes."""
    return np.asarray(numbers, np.float32).astype(ml_dtypes.float8_e4m3fn).tobytes()


def bf16(numbers):
    return np.asarray(numbers, np.float32).astype(ml_dtypes.bfloat16).tobytes()


def decoded(codes):
    return np.frombuffer(codes, ml_dtypes.float8_e4m3fn).astype(np.float64)


def token_656(numbers):
    """A token of 576 numbers as 656 bytes, and what they mean."""
    tiles = numbers[:512].reshape(4, 128)
    scales = np.float32(np.abs(tiles).max(1) / 448)
    codes = [e4m3(tile / scale) for tile, scale in zip(tiles, scales, strict=True)]
    rope = bf16(numbers[512:])
    meant = [decoded(code) * float(scale) for code, scale in zip(codes, scales, strict=True)]
    return b"".join(codes) + struct.pack("<4f", *scales) + rope, np.concatenate([*meant, bf16_numbers(rope)])


def bf16_numbers(raw):
    return np.frombuffer(raw, ml_dtypes.bfloat16).astype(np.float64)


def token_584(numbers):
    """A token of 512 numbers as 576 bytes and, elsewhere, 8; and what they mean."""
    tiles = numbers[:448].reshape(7, 64)
    powers = [math.ceil(math.log2(np.abs(tile).max() / 448)) for tile in tiles]
    codes = [e4m3(tile / 2.0**power) for tile, power in zip(tiles, powers, strict=True)]
    rope = bf16(numbers[448:])
    meant = [decoded(code) * 2.0**power for code, power in zip(codes, powers, strict=True)]
    scales = bytes([power + 127 for power in powers]) + b"\xff"
    return b"".join(codes) + rope, scales, np.concatenate([*meant, bf16_numbers(rope)])


def cache_656(rows, page_size):
    """[pages, page_size, 1, 656], pages apart by a token of garbage; and the numbers, [tokens, 1, 576]."""
    tokens = [token_656(row) for row in rows]
    raw = np.frombuffer(b"".join(raw for raw, _ in tokens), np.uint8).reshape(-1, page_size, 656)
    apart = np.full((len(raw), page_size + 1, 656), 0x7F, np.uint8)
    apart[:, :page_size] = raw
    cache = torch.from_numpy(apart)[:, :page_size].view(torch.float8_e4m3fn)[:, :, None]
    return cache, torch.from_numpy(np.stack([meant for _, meant in tokens]))[:, None]


def cache_584(rows, page_size):
    """[pages, page_size, 1, 584], pages padded with garbage; and the numbers, [tokens, 1, 512]."""
    tokens = [token_584(row) for row in rows]
    pages = []
    for i in range(0, len(tokens), page_size):
        own = tokens[i : i + page_size]
        pages.append(b"".join(raw for raw, _, _ in own) + b"".join(scales for _, scales, _ in own))
    size = -(-len(pages[0]) // 576) * 576
    padded = np.frombuffer(b"".join(page.ljust(size, b"\x7f") for page in pages), np.uint8).reshape(-1, size)
    cache = torch.from_numpy(padded.copy())[:, : page_size * 584].view(torch.float8_e4m3fn)
    shaped = cache.view(len(pages), page_size, 1, 584)
    return shaped, torch.from_numpy(np.stack([meant for _, _, meant in tokens]))[:, None]


LAYOUTS = {"656": (cache_656, 576), "584": (cache_584, 512)}


def made(layout, page_size, seed=1, pages=PAGES):
    make, dim = LAYOUTS[layout]
    rows = normal(pages * page_size, dim, seed=seed).numpy().astype(np.float64)
    rows[::3] *= 30
    return make(rows, page_size)


def lists(num_keys, batch=2, s_q=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randperm(num_keys, generator=generator)[:LISTED] for _ in range(batch * s_q)]
    indices = torch.stack(found).view(batch, s_q, LISTED).to(torch.int32)
    indices[0, 0, 4] = -1
    return indices


def requests(q, scopes):
    """Every query with the keys it lists in each scope: (numbers, indices [batch, queries, topk])."""
    found = []
    for b in range(len(q)):
        for i, query in enumerate(q[b]):
            keys = torch.cat([numbers[own[own >= 0].long()] for numbers, own in ((n, x[b, i]) for n, x in scopes)])
            found.append(Request(query[None], keys, keys[..., :512]))
    return found


def run(q, cache, indices, **options):
    metadata = FlashMLASchedMeta()
    return flash_mla_with_kvcache(q, cache, None, None, 512, metadata, None, None, False, True, indices, **options)


def check(found, q, scopes):
    out, lse = found
    assert out.shape == (*q.shape[:3], 512) and out.dtype == q.dtype and lse.shape == (len(q), q.shape[2], q.shape[1])
    hold(out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1), requests(q, scopes), base_2=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout,page_size", [("656", 2), ("656", 7), ("584", 2), ("584", 7), ("584", 1)])
def test_sparse_attention_over_float8(layout, page_size, dtype):
    cache, numbers = made(layout, page_size, pages=12)
    q, indices = normal(2, 2, 3, numbers.shape[-1], dtype=dtype, seed=2), lists(len(numbers))
    check(run(q, cache, indices), q, [(numbers, indices)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_may_come_as_bytes(layout):
    cache, numbers = made(layout, 5)
    q, indices = normal(2, 2, 3, numbers.shape[-1], dtype=torch.bfloat16, seed=2), lists(len(numbers))
    expected = run(q, cache, indices)
    assert all(torch.equal(a, b) for a, b in zip(run(q, cache.view(torch.uint8), indices), expected, strict=True))


def test_a_second_float8_cache_of_other_pages():
    (cache, numbers), (extra, more) = made("584", 5), made("584", 3, seed=7, pages=6)
    q, indices = normal(2, 2, 3, 512, dtype=torch.bfloat16, seed=2), lists(len(numbers))
    others, lengths = lists(len(more), seed=6), torch.tensor([4, 0], dtype=torch.int32)
    counted = torch.where(torch.arange(LISTED) < lengths[:, None, None], others, -1)
    given = {"extra_k_cache": extra, "extra_indices_in_kvcache": others, "extra_topk_length": lengths}
    check(run(q, cache, indices, **given), q, [(numbers, indices), (more, counted)])


def test_nothing_listed_is_zero_and_infinite():
    cache, _ = made("656", 5)
    q = normal(2, 2, 3, 576, dtype=torch.bfloat16, seed=2)
    out, lse = run(q, cache, torch.full((2, 2, LISTED), -1, dtype=torch.int32))
    assert (out == 0).all() and torch.isposinf(lse).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_listed_is_not_read(layout):
    cache, numbers = made(layout, 5)
    q, indices = normal(2, 2, 3, numbers.shape[-1], dtype=torch.bfloat16, seed=2), lists(10)
    expected = run(q, cache, indices)
    cache.view(torch.uint8)[2:] = 0x7F  # NaN, as a code and as a scale
    assert all(torch.equal(a, b) for a, b in zip(run(q, cache, indices), expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_attention_over_float8(layout):
    cache, numbers = made(layout, 5)
    q = normal(2, 3, 2, numbers.shape[-1], dtype=torch.bfloat16, seed=2)
    table = torch.tensor([[3, 1, 2147480000], [0, 2147480000, 2147480000]], dtype=torch.int32)
    seqlens = torch.tensor([8, 2], dtype=torch.int32)
    found = flash_mla_with_kvcache(
        q, cache, table, seqlens, 512, FlashMLASchedMeta(), causal=True, is_fp8_kvcache=True, softmax_scale=0.05
    )
    keys = numbers.view(PAGES, 5, 1, -1)
    own = [keys[[3, 1]].flatten(0, 1)[:8], keys[0, :2]]
    options = {"causal": True, "scale": 0.05}
    seen = [Request(query, key, key[..., :512], options) for query, key in zip(q, own, strict=True)]
    lse = torch.where(torch.isposinf(found[1]), -torch.inf, found[1]).transpose(1, 2).flatten(0, 1)
    hold(found[0].flatten(0, 1), lse, seen, base_2=False)


def test_other_layouts_are_refused_by_name():
    cache = torch.zeros(2, 4, 1, 600, dtype=torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="k_cache"):
        run(normal(1, 1, 2, 576), cache, torch.zeros(1, 1, 1, dtype=torch.int32))
