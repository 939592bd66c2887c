"""FlashAttention's functions over sequences one after another or in pages: lengths of 0, unused rows, NaN elsewhere."""

import pytest
import torch
from flash_attn_cases import (
    KEY_LENS,
    LENS,
    QUERY_LENS,
    RAGGED,
    SLOPES_OF_EACH,
    arrays,
    each_by_formula,
    pages_of,
    poisoned,
    ragged_arrays,
    starts_of,
    used,
)
from plain_attention import hold

from headrace.compat import flash_attn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", RAGGED)
def test_sequences_of_many_lengths(name, dtype):
    theirs, ours = RAGGED[name]
    q, k, v = ragged_arrays(dtype)
    lens = (starts_of(QUERY_LENS), starts_of(KEY_LENS), max(QUERY_LENS), max(KEY_LENS))
    out, lse, probabilities = flash_attn.flash_attn_varlen_func(q, k, v, *lens, return_attn_probs=True, **theirs)
    assert lse.shape == (6, sum(QUERY_LENS)) and probabilities.shape == (0,)
    compute = each_by_formula(q, k, v, QUERY_LENS, KEY_LENS, **ours)
    hold([out, lse], compute, dtype, logarithms=[1])


@pytest.mark.parametrize("slopes", [None, SLOPES_OF_EACH])
def test_rows_behind_the_last_sequence(slopes):
    q, k, v = ragged_arrays()
    lens = (starts_of(QUERY_LENS), starts_of(KEY_LENS), 17, 30)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, *lens, causal=True, alibi_slopes=slopes)
    behind = [
        torch.cat([array, torch.full((3, *array.shape[1:]), torch.nan, dtype=array.dtype)]) for array in (q, k, v)
    ]
    found = flash_attn.flash_attn_varlen_func(*behind, *lens, causal=True, alibi_slopes=slopes)
    assert torch.equal(found[:-3], expected) and (found[-3:] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_that_are_not_used(causal):
    query_used, key_used = (3, 0, 17, 0, 2, 5), (9, 2, 11, 30, 0, 0)
    q, k, v = ragged_arrays(torch.float32)
    parts = list(zip((q, k, v), LENS, (query_used, key_used, key_used), strict=True))
    kept, with_nan = [used(*part) for part in parts], [poisoned(*part) for part in parts]
    used_args = {"seqused_q": torch.tensor(query_used), "seqused_k": torch.tensor(key_used, dtype=torch.int32)}
    lens = (starts_of(QUERY_LENS), starts_of(KEY_LENS), 17, 30)
    out, lse = flash_attn.flash_attn_varlen_func(*with_nan, *lens, causal=causal, return_lse=True, **used_args)
    marks = used(torch.arange(len(q)), QUERY_LENS, query_used)
    idle = torch.ones(len(q), dtype=torch.bool).index_fill(0, marks, False)
    assert (out[idle] == 0).all() and (lse[:, idle] == torch.inf).all()
    compute = each_by_formula(*kept, query_used, key_used, causal=causal)
    hold([out[marks], lse[:, marks]], compute, torch.float32, logarithms=[1])


@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("keyword", ["block_table", "page_table"])
def test_pages_of_any_size(page_size, keyword):
    q, k, v = ragged_arrays()
    (key_pages, table), (value_pages, _) = (pages_of(array, KEY_LENS, page_size) for array in (k, v))
    lens = (starts_of(QUERY_LENS), starts_of(KEY_LENS), 17, 30)
    options = {"causal": True, "window_size": (12, 0), "return_attn_probs": True}
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, key_pages, value_pages, *lens, **{keyword: table}, **options)
    compute = each_by_formula(q, k, v, QUERY_LENS, KEY_LENS, causal=True, window=(12, 0))
    hold([out, lse], compute, torch.bfloat16, logarithms=[1])


def test_pages_with_lengths_of_their_own():
    q, k, v = ragged_arrays()
    (key_pages, table), (value_pages, _) = (pages_of(array, KEY_LENS, 8) for array in (k, v))
    lens = torch.tensor(KEY_LENS, dtype=torch.int32)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, starts_of(QUERY_LENS), starts_of(KEY_LENS), 17, 30)
    found = flash_attn.flash_attn_varlen_func(
        q, key_pages, value_pages, starts_of(QUERY_LENS), None, 17, 30, block_table=table, seqused_k=lens
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="seqused_k, cu_seqlens_k"):
        flash_attn.flash_attn_varlen_func(
            q, key_pages, value_pages, starts_of(QUERY_LENS), None, 17, 30, block_table=table
        )


def test_batches_without_starts():
    q, k, v = arrays()
    used = torch.tensor([45, 20], dtype=torch.int32)
    out, lse = flash_attn.flash_attn_varlen_func(q, k, v, None, None, 33, 45, seqused_k=used, return_lse=True)
    for b, count in enumerate(used):
        expected, expected_lse = flash_attn.flash_attn_func(
            q[b : b + 1], k[b : b + 1, :count], v[b : b + 1, :count], return_lse=True
        )
        torch.testing.assert_close(out[b], expected[0])
        torch.testing.assert_close(lse[b], expected_lse[0])
