"""Decode over a paged cache: which kernel runs and why, and the same from two halves of the keys, merged."""

import numpy as np

from headrace.ops import choices, explain
from headrace.ops.attention_merge import merge_attention
from headrace.ops.attention_paged import paged_attention

lens, page_size, heads, kv_heads, head_dim = [3000, 77, 1025], 64, 32, 8, 128
random = np.random.default_rng(0)
counts = [-(-length // page_size) for length in lens]
key_pages, value_pages = random.standard_normal((2, sum(counts), page_size, kv_heads, head_dim)).astype(np.float16)
query = random.standard_normal((len(lens), heads, head_dim)).astype(np.float32)
table = np.zeros((len(lens), max(counts)), np.int32)
for row, count, end in zip(table, counts, np.cumsum(counts), strict=True):
    row[:count] = np.arange(end - count, end)
tables = {"page_table": table, "sequence_lens": np.array(lens, np.int32), "query_starts": np.arange(4, dtype=np.int32)}

print(explain("paged_attention", query, key_pages, value_pages, **tables))
whole = paged_attention(query, key_pages, value_pages, **tables)

# The first 64 keys of each sequence, and the others: any split of the keys merges into the whole.
first = tables | {"page_table": table[:, :1].copy(), "sequence_lens": np.full(3, page_size, np.int32)}
rest = tables | {"page_table": table[:, 1:].copy(), "sequence_lens": tables["sequence_lens"] - page_size}
parts = [paged_attention(query, key_pages, value_pages, **part) for part in (first, rest)]
print(f"merged and whole are {np.max(np.abs(merge_attention(parts).out - whole.out)):.0e} apart at most")
print(dict(choices()))
