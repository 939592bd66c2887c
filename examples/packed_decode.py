"""Sixteen packed sequences, one query each, under a dense block mask: what SDPA makes of it, and what headrace does."""

import timeit

import numpy as np

from headrace.ops import explain
from headrace.ops.attention_dense import attention

sequences, cache, heads, kv_heads, head_dim = 16, 8192, 32, 8, 128
random = np.random.default_rng(0)
query = random.standard_normal((1, sequences, heads, head_dim), dtype=np.float32)
key, value = random.standard_normal((2, 1, cache, kv_heads, head_dim), dtype=np.float32)
mask = np.arange(sequences)[:, None] == np.arange(cache) // (cache // sequences)  # each sees its own 512 keys

print(*explain("attention", query, key, value, mask=mask).chosen.notes, sep="\n")
ours = min(timeit.repeat(lambda: attention(query, key, value, mask=mask), number=1, repeat=10))
print(f"headrace     {ours * 1e3:6.2f} ms")
try:
    from torch import from_numpy, nn
except ImportError:
    raise SystemExit("torch is not installed: nothing to compare with") from None

q, k, v, seen = (from_numpy(array) for array in (query, key, value, mask))
k, v = (kept.repeat_interleave(heads // kv_heads, dim=2).transpose(1, 2).contiguous() for kept in (k, v))
sdpa = nn.functional.scaled_dot_product_attention
theirs = min(timeit.repeat(lambda: sdpa(q.transpose(1, 2), k, v, attn_mask=seen), number=1, repeat=10))
print(f"torch SDPA   {theirs * 1e3:6.2f} ms, {theirs / ours:.1f} times as long")
