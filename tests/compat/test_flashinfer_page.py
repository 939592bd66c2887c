"""FlashInfer's appends write where they should, in place, and nowhere else; and the numbers that say where."""

import pytest
import torch
from paged_oracle import indptr, normal

import headrace.compat.flashinfer as flashinfer

# Requests of 9, 3 and 6 tokens, the last 4, 0 and 3 of which are new; pages of 4.
LENS, NEW = [9, 3, 6], [4, 0, 3]
INDPTR, INDICES = indptr([3, 1, 2]), torch.tensor([5, 0, 3, 6, 1, 4, 2147480000], dtype=torch.int32)
LAST = torch.tensor([1, 3, 2], dtype=torch.int32)
# page and place of each new token
WHERE = [(0, 1), (0, 2), (0, 3), (3, 0), (1, 3), (4, 0), (4, 1)]


def placed():
    lens = flashinfer.get_seq_lens(INDPTR, LAST, 4)
    return flashinfer.get_batch_indices_positions(indptr(NEW), lens, sum(NEW))


def written(pages, rows):
    expected = pages.clone()
    for (page, place), row in zip(WHERE, rows, strict=True):
        expected[page, place] = row
    return expected


def test_lengths_of_sequences():
    assert flashinfer.get_seq_lens(INDPTR, LAST, 4).tolist() == LENS
    told = flashinfer.page.get_seq_lens(torch.tensor([0, 0, 2]), torch.tensor([0, 1]), 16)
    assert told.tolist() == [0, 17]


def test_whose_tokens_are_and_where():
    owners, positions = placed()
    assert owners.dtype == positions.dtype == torch.int32
    assert owners.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert positions.tolist() == [5, 6, 7, 8, 3, 4, 5]


def test_the_example_of_the_documentation():
    starts, lens = torch.tensor([0, 1, 3, 6, 10], dtype=torch.int32), torch.tensor([5, 5, 5, 5])
    owners, positions = flashinfer.get_batch_indices_positions(starts, lens, 10)
    assert owners.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert positions.tolist() == [4, 3, 4, 2, 3, 4, 1, 2, 3, 4]


def test_tokens_of_nobody():
    buffers = [torch.full((5,), 7, dtype=torch.int32) for _ in range(2)]
    told = flashinfer.get_batch_indices_positions(indptr([2, 1]), torch.tensor([2, 9]), 5, *buffers)
    assert told[0] is buffers[0] and told[1] is buffers[1]
    assert told[0].tolist() == [0, 0, 1, -1, -1] and told[1][:3].tolist() == [0, 1, 8]


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_append(dtype, kv_layout, pair):
    keys, values = normal(7, 2, 16, dtype=dtype, seed=1), normal(7, 2, 16, dtype=dtype, seed=2)
    pages = normal(7, 2, 4, 2, 16, dtype=dtype, seed=3)
    expected = [written(pages[:, i], rows) for i, rows in enumerate((keys, values))]
    if kv_layout == "HND":
        pages = pages.transpose(2, 3).contiguous()
    cache = (pages[:, 0], pages[:, 1]) if pair else pages
    given = (cache, INDICES, INDPTR, LAST)
    assert flashinfer.append_paged_kv_cache(keys, values, *placed(), *given, kv_layout) is None
    got = pages.transpose(2, 3) if kv_layout == "HND" else pages
    assert torch.equal(got[:, 0], expected[0]) and torch.equal(got[:, 1], expected[1])


def test_tokens_of_nobody_are_written_nowhere():
    pages, rows = normal(7, 2, 4, 2, 16, seed=3), normal(7, 2, 16, seed=1)
    owners, positions = placed()
    owners[2] = -1
    expected = written(pages[:, 0], rows)
    expected[WHERE[2]] = pages[:, 0][WHERE[2]]
    flashinfer.append_paged_kv_cache(rows, rows, owners, positions, pages, INDICES, INDPTR, LAST)
    assert torch.equal(pages[:, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_narrow_caches(dtype):
    cache_type = torch.float8_e4m3fn if dtype == torch.float32 else dtype
    rows = (normal(7, 2, 16, seed=1) * 3).to(dtype)
    pages = torch.zeros(7, 2, 4, 2, 16, dtype=cache_type)
    flashinfer.append_paged_kv_cache(rows, rows, *placed(), pages, INDICES, INDPTR, LAST)
    expected = written(torch.zeros(7, 4, 2, 16), rows.to(cache_type).float())
    assert torch.equal(pages[:, 0].float(), expected) and torch.equal(pages[:, 1].float(), expected)


def test_types_that_need_scales_are_refused():
    rows, pages = normal(7, 2, 16), torch.zeros(7, 2, 4, 2, 16, dtype=torch.int8)
    with pytest.raises(NotImplementedError, match="append_key"):
        flashinfer.append_paged_kv_cache(rows, rows, *placed(), pages, INDICES, INDPTR, LAST)


@pytest.mark.parametrize("together", [True, False])
def test_append_of_latents(together):
    latents, ropes = normal(7, 32, dtype=torch.bfloat16, seed=1), normal(7, 8, dtype=torch.bfloat16, seed=2)
    whole = normal(7, 4, 40, dtype=torch.bfloat16, seed=3)
    ckv, kpe = whole[..., :32], whole[..., 32:]
    if not together:
        ckv, kpe = ckv.clone(), kpe.clone()
    expected = written(ckv, latents), written(kpe, ropes)
    flashinfer.append_paged_mla_kv_cache(latents, ropes, *placed(), ckv, kpe, INDICES, INDPTR, LAST)
    assert torch.equal(ckv, expected[0]) and torch.equal(kpe, expected[1])


def test_appended_keys_are_attended():
    q, rows, values = normal(3, 4, 16, seed=4), normal(12, 2, 16, seed=1), normal(12, 2, 16, seed=2)
    pages = torch.full((4, 2, 4, 2, 16), torch.nan)
    starts, order, last = indptr([2, 2]), torch.tensor([3, 1, 0, 2], dtype=torch.int32), torch.tensor([3, 1])
    lens = flashinfer.get_seq_lens(starts, last, 4)
    owners, positions = flashinfer.get_batch_indices_positions(indptr([7, 5]), lens, 12)
    flashinfer.append_paged_kv_cache(rows, values, owners, positions, pages, order, starts, last)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1))
    wrapper.plan(indptr([2, 1]), starts, order, last, 4, 2, 16, 4, causal=True)
    expected = [
        flashinfer.single_prefill_with_kv_cache(q[a:b], rows[c:d], values[c:d], causal=True)
        for a, b, c, d in ((0, 2, 0, 7), (2, 3, 7, 12))
    ]
    assert torch.allclose(wrapper.run(q, pages), torch.cat(expected), atol=0, rtol=2**-20)
