"""FlashMLA's functions: shapes, defaults, alignment, log-sum-exp, sinks, sparse lists, and what must not be read."""

import math
from itertools import pairwise

import pytest
import torch
from paged_oracle import ORDERS, Request, hold, indptr, near, normal, of_requests, signature

from headrace.compat import flash_mla
from headrace.compat.flash_mla import (
    FlashMLASchedMeta,
    flash_attn_varlen_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

GARBAGE = 2147480000
WITH_KVCACHE = (
    "q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None, softmax_scale=None, "
    "causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None, "
    "extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None"
)
VARLEN = "dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False, is_varlen=True"
SIGNATURES = {
    "get_mla_metadata": "*args, **kwargs",
    "flash_mla_with_kvcache": WITH_KVCACHE,
    "flash_mla_sparse_fwd": "q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, " + VARLEN,
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen, head_dim_qk, " + VARLEN,
    "flash_attn_varlen_kvpacked_func": (
        "q, kv, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, head_dim_qk, " + VARLEN
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_librarys(name):
    assert signature(getattr(flash_mla, name)) == SIGNATURES[name]
    assert name in flash_mla.__all__


class Dense:
    """Requests of these lengths over pages in any order, NaN behind every end and garbage behind every table."""

    def __init__(self, lens, s_q, h_q, h_k=1, d=40, dv=32, page_size=8, dtype=torch.bfloat16):
        self.lens, self.dv, columns = lens, dv, max(-(-n // page_size) for n in lens) + 1
        self.q = normal(len(lens), s_q, h_q, d, dtype=dtype, seed=1)
        self.cache = torch.full((len(lens) * columns, page_size, h_k, d), torch.nan, dtype=dtype)
        order = torch.randperm(len(lens) * columns, generator=torch.Generator().manual_seed(2))
        self.table = order.to(torch.int32).view(len(lens), columns)
        self.keys = [normal(n, h_k, d, dtype=dtype, seed=3 + r) for r, n in enumerate(lens)]
        for r, keys in enumerate(self.keys):
            used = -(-len(keys) // page_size)
            for i in range(used):
                part = keys[i * page_size : (i + 1) * page_size]
                self.cache[self.table[r, i].long(), : len(part)] = part
            self.table[r, used:] = GARBAGE
        self.seqlens = torch.tensor(lens, dtype=torch.int32)

    def run(self, metadata=None, num_splits=None, **options):
        metadata = FlashMLASchedMeta() if metadata is None else metadata
        places = (self.q, self.cache, self.table, self.seqlens, self.dv)
        return flash_mla_with_kvcache(*places, metadata, num_splits, **options)

    def requests(self, **options):
        return [Request(q, keys, keys[..., : self.dv], options) for q, keys in zip(self.q, self.keys, strict=True)]

    def hold(self, out, lse, **options):
        batch, s_q, h_q, _ = self.q.shape
        assert out.shape == (batch, s_q, h_q, self.dv) and out.dtype == self.q.dtype
        assert lse.shape == (batch, h_q, s_q) and lse.dtype == torch.float32
        sums = lse.transpose(1, 2).flatten(0, 1)
        hold(out.flatten(0, 1), lonely(sums), self.requests(**options), base_2=False)


def lonely(lse):
    """The log-sum-exp with the library's +inf of rows without keys as -inf, of which there is no other."""
    assert not torch.isneginf(lse).any()
    return torch.where(torch.isposinf(lse), -torch.inf, lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "s_q,h_q,h_k,page_size,dtype",
    [
        (1, 16, 1, 64, torch.bfloat16),
        (3, 9, 1, 7, torch.bfloat16),
        (2, 6, 3, 8, torch.bfloat16),
        (2, 4, 1, 1, torch.float16),
        (4, 5, 1, 16, torch.float32),
    ],
)
def test_dense_decode(s_q, h_q, h_k, page_size, dtype, causal):
    case = Dense([70, 0, 20, 1, 33], s_q, h_q, h_k, page_size=page_size, dtype=dtype)
    case.hold(*case.run(causal=causal), causal=causal)


def test_sizes_of_deepseek():
    case = Dense([100, 31], 2, 16, d=576, dv=512, page_size=64)
    case.hold(*case.run(causal=True), causal=True)


def test_the_scale_is_the_root_of_the_whole_head_by_default():
    case = Dense([20], 1, 2)
    told = case.run(softmax_scale=40**-0.5)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), told, strict=True))
    case.hold(*case.run(softmax_scale=0.5), scale=0.5)


def test_rows_without_keys_are_zero_and_infinite():
    case = Dense([2, 0], 4, 3)
    out, lse = case.run(causal=True)
    seeing = torch.tensor([[False, False, True, True], [False] * 4])
    assert torch.equal(torch.isposinf(lse), ~seeing[:, None].expand(2, 3, 4))
    assert (out[~seeing] == 0).all() and (out[seeing] != 0).any()


def test_the_cache_may_be_strided_and_queries_too():
    case = Dense([20, 9], 2, 4)
    expected = case.run(causal=True)
    wide = torch.full((*case.cache.shape[:-1], 2 * case.cache.shape[-1]), torch.nan, dtype=case.cache.dtype)
    wide[:, :, :, : case.cache.shape[-1]] = case.cache
    case.cache, case.q = wide[..., : case.cache.shape[-1]], case.q.transpose(1, 2).contiguous().transpose(1, 2)
    case.table = case.table.T.contiguous().T
    assert all(torch.equal(a, b) for a, b in zip(case.run(causal=True), expected, strict=True))


def test_new_metadata_is_reused_across_layers_and_checked():
    metadata, none = get_mla_metadata()
    assert isinstance(metadata, FlashMLASchedMeta) and none is None and not metadata.have_initialized
    case, other = Dense([20, 9], 2, 4), Dense([20, 9, 3], 2, 4)
    first = case.run(metadata, none, causal=True)
    assert metadata.have_initialized and (metadata.config.b, metadata.config.page_block_size) == (2, 8)
    assert all(torch.equal(a, b) for a, b in zip(case.run(metadata, none, causal=True), first, strict=True))
    with pytest.raises(AssertionError, match="b: expected 2"):
        other.run(metadata, causal=True)
    with pytest.raises(AssertionError, match="causal: expected True"):
        case.run(metadata, causal=False)
    with pytest.raises(AssertionError, match="num_splits"):
        case.run(metadata, torch.zeros(3, dtype=torch.int32), causal=True)


def test_older_metadata():
    case = Dense([20, 9], 2, 4)
    metadata, num_splits = get_mla_metadata(case.seqlens, 2 * 4 // 1, 1)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.ndim == 2 and metadata.shape[1] == 8 and num_splits.shape == (3,)
    case.hold(*case.run(metadata, num_splits, causal=True), causal=True)
    named = get_mla_metadata(
        case.seqlens, num_q_tokens_per_head_k=8, num_heads_k=1, num_heads_q=4, is_fp8_kvcache=False, topk=None
    )
    assert all(torch.equal(a, b) for a, b in zip(named, (metadata, num_splits), strict=True))


def test_dense_attention_asks_for_a_table_and_takes_no_lists():
    case = Dense([20], 1, 2)
    with pytest.raises(AssertionError, match="block_table"):
        flash_mla_with_kvcache(case.q, case.cache, None, None, 32, FlashMLASchedMeta())
    with pytest.raises(AssertionError, match="topk_length"):
        case.run(topk_length=torch.tensor([1], dtype=torch.int32))


class Sparse:
    """Queries that list keys by page * page_size + place; what is not listed is NaN."""

    def __init__(self, topk=12, batch=3, s_q=2, h_q=4, d=40, dv=32, page_size=5, dtype=torch.bfloat16):
        self.dv, keys = dv, 40
        self.q = normal(batch, s_q, h_q, d, dtype=dtype, seed=1)
        self.rows = normal(keys, d, dtype=dtype, seed=2)
        generator = torch.Generator().manual_seed(3)
        lists = [torch.randperm(keys, generator=generator)[:topk] for _ in range(batch * s_q)]
        self.indices = torch.stack(lists).view(batch, s_q, topk).to(torch.int32)
        self.indices[0, 0, 3:7] = torch.tensor([-1, keys, GARBAGE, -123456])
        self.indices[1, 1] = -1
        self.cache = self.rows.clone().view(-1, page_size, 1, d)
        self.poison(self.indices)

    def poison(self, indices):
        used = indices[(indices >= 0) & (indices < len(self.rows))].long()
        unused = torch.ones(len(self.rows), dtype=torch.bool)
        unused[used] = False
        self.cache.view(len(self.rows), -1)[unused] = torch.nan

    def requests(self, lengths=None, **options):
        found = []
        for b, (q, lists) in enumerate(zip(self.q, self.indices, strict=True)):
            for query, listed in zip(q, lists, strict=True):
                listed = listed if lengths is None else listed[: lengths[b]]
                keys = self.rows[listed[(listed >= 0) & (listed < len(self.rows))].long()][:, None]
                found.append(Request(query[None], keys, keys[..., : self.dv], options))
        return found

    def run(self, **options):
        given = {"indices": self.indices} | options
        return flash_mla_with_kvcache(self.q, self.cache, None, None, self.dv, get_mla_metadata()[0], **given)

    def hold(self, out, lse, requests):
        hold(out.flatten(0, 1), lonely(lse.transpose(1, 2).flatten(0, 1)), requests, base_2=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparse_decode(dtype):
    case = Sparse(dtype=dtype)
    out, lse = case.run()
    case.hold(out, lse, case.requests())
    assert (out[1, 1] == 0).all() and torch.isposinf(lse[1, :, 1]).all()


def test_only_the_first_of_a_list_count():
    case, lengths = Sparse(), torch.tensor([5, 0, 12], dtype=torch.int32)
    counted = torch.where(torch.arange(12) < lengths[:, None, None], case.indices, -1)
    case.poison(counted)
    case.hold(*case.run(topk_length=lengths), case.requests(lengths.tolist()))


def test_sinks_weigh_and_leave_the_log_sum_exp():
    sinks = torch.tensor([0.5, -math.inf, 2.0, -3.0])
    for case in (Sparse(), Dense([20, 0, 9], 2, 4)):
        out, lse = case.run(attn_sink=sinks)
        case.hold(out, lse, case.requests(sink=sinks)) if isinstance(case, Sparse) else case.hold(out, lse, sink=sinks)
        assert torch.equal(lse, case.run()[1])


def test_an_infinite_sink_leaves_nothing():
    sinks = torch.tensor([math.inf, -math.inf, 0.0, math.inf])
    for case in (Sparse(), Dense([20, 9], 2, 4)):
        out, plain = case.run(attn_sink=sinks)[0], case.run()[0]
        assert (out[:, :, [0, 3]] == 0).all()
        assert torch.equal(out[:, :, 1], plain[:, :, 1])


def test_a_second_cache_is_attended_beside_the_first():
    case, extra = Sparse(), Sparse(topk=7, page_size=8)
    lengths = torch.tensor([7, 2, 0], dtype=torch.int32)
    extra.poison(torch.where(torch.arange(7) < lengths[:, None, None], extra.indices, -1))
    given = {"extra_k_cache": extra.cache, "extra_indices_in_kvcache": extra.indices, "extra_topk_length": lengths}
    both = [
        Request(a.q, torch.cat([a.k, b.k]), torch.cat([a.v, b.v]))
        for a, b in zip(case.requests(), extra.requests(lengths.tolist()), strict=True)
    ]
    case.hold(*case.run(**given), both)


def test_sparse_attention_is_not_causal():
    with pytest.raises(AssertionError, match="causal"):
        Sparse().run(causal=True)


@pytest.mark.parametrize("h_kv", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparse_prefill(dtype, h_kv):
    s_q, s_kv, topk, h_q, d, dv = 9, 30, 11, 4, 40, 32
    q, kv = normal(s_q, h_q, d, dtype=dtype, seed=1), normal(s_kv, h_kv, d, dtype=dtype, seed=2)
    generator = torch.Generator().manual_seed(3)
    lists = [torch.randperm(s_kv, generator=generator)[:topk] for _ in range(s_q * h_kv)]
    indices = torch.stack(lists).view(s_q, h_kv, topk).to(torch.int32)
    indices[0, :, 2:5] = torch.tensor([-1, s_kv, -(2**31)])
    indices[1] = 2**31 - 1
    length = torch.randint(0, topk + 1, (s_q,), generator=generator, dtype=torch.int32)
    length[0] = topk
    sinks = torch.tensor([0.3, -math.inf, 1.0, -2.0])
    for limit, sink in ((None, None), (length, sinks)):
        out, largest, lse = flash_mla_sparse_fwd(q, kv, indices, 0.3, dv, sink, limit)
        assert out.shape == (s_q, h_q, dv) and out.dtype == dtype
        assert largest.shape == lse.shape == (s_q, h_q) and largest.dtype == lse.dtype == torch.float32
        for head in range(h_kv):
            own = slice(head * h_q // h_kv, (head + 1) * h_q // h_kv)
            requests = [listed(q[i, own], kv[:, head], indices[i, head], limit, i, dv) for i in range(s_q)]
            for request in requests:
                request.options |= {"scale": 0.3, "sink": None if sink is None else sink[own]}
            hold(out[:, own], lonely(lse[:, own]), requests, base_2=False)
            exact, plain = (torch.stack([best(r, kind) for r in requests]) for kind in (torch.float64, torch.float32))
            near(largest[:, own], exact, plain)


def listed(query, keys, indices, limit, i, dv):
    indices = indices if limit is None else indices[: limit[i]]
    found = keys[indices[(indices >= 0) & (indices < len(keys))].long()][:, None]
    return Request(query[None], found, found[..., :dv])


def best(request, dtype):
    scores = torch.einsum("qhd,kgd->hk", request.q.to(dtype), request.k.to(dtype)) * 0.3
    return scores.amax(-1) if scores.shape[-1] else torch.full((len(scores),), -torch.inf, dtype=dtype)


def varlen(dtype=torch.float32):
    """Queries, keys and values of requests of unequal lengths, one of them empty on each side."""
    q_lens, k_lens = [5, 0, 3, 4], [7, 6, 3, 0]
    q, k = normal(12, 4, 24, dtype=dtype, seed=1), normal(16, 2, 24, dtype=dtype, seed=2)
    v = normal(16, 2, 16, dtype=dtype, seed=3)
    bounds = zip(indptr(q_lens).tolist(), indptr(k_lens).tolist(), strict=True)
    ends = list(bounds)
    requests = [Request(q[a:c], k[b:d], v[b:d]) for (a, b), (c, d) in pairwise(ends)]
    return (q, k, v, indptr(q_lens), indptr(k_lens), 5, 7), requests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(causal, dtype):
    arrays, requests = varlen(dtype)
    for request in requests:
        request.options |= {"causal": causal, "scale": 0.3}
    out, lse = flash_attn_varlen_func(*arrays, softmax_scale=0.3, causal=causal)
    assert out.shape == (12, 4, 16) and out.dtype == dtype and lse.shape == (12, 4) and lse.dtype == torch.float32
    hold(out, lse, requests, base_2=False)


def test_packed_arrays_are_the_same_attention():
    (q, k, v, q_starts, k_starts, *_), _ = varlen()
    whole = flash_attn_varlen_func(q, k, v, q_starts, k_starts, 5, 7, causal=True)
    packed = torch.cat([k, v], -1)
    told = flash_mla.flash_attn_varlen_kvpacked_func(q, packed, q_starts, k_starts, 5, 7, 24, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(told, whole, strict=True))
    k4, v4 = normal(12, 4, 24, seed=5), normal(12, 4, 16, seed=6)
    whole = flash_attn_varlen_func(q, k4, v4, q_starts, q_starts, 5, 5, causal=True)
    told = flash_mla.flash_attn_varlen_qkvpacked_func(torch.cat([q, k4, v4], -1), q_starts, 5, 24, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(told, whole, strict=True))


def test_dropout_is_refused():
    arrays, _ = varlen()
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attn_varlen_func(*arrays, dropout_p=0.1)


def test_gradients_of_varlen():
    arrays, _ = varlen()
    wanted = [array.clone().requires_grad_() for array in arrays[:3]]
    out, _ = flash_attn_varlen_func(*wanted, *arrays[3:], causal=True)
    d_out = normal(*out.shape, seed=9)
    got = torch.autograd.grad((out * d_out).sum(), wanted)
    exact = plain_gradients(arrays, d_out, torch.float64)
    worst = list(exact)
    for seed in range(ORDERS):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        for i, other in enumerate(plain_gradients(arrays, d_out, torch.float32, order)):
            farther = (other.double() - exact[i]).abs() > (worst[i] - exact[i]).abs()
            worst[i] = torch.where(farther, other.double(), worst[i])
    for each in zip(got, exact, worst, strict=True):
        near(*each)


def plain_gradients(arrays, d_out, dtype, order=None):
    q, k, v = inputs = [array.to(dtype).requires_grad_() for array in arrays[:3]]
    ends = list(zip(arrays[3].tolist(), arrays[4].tolist(), strict=True))
    parts = [Request(q[a:c], k[b:d], v[b:d], {"causal": True}) for (a, b), (c, d) in pairwise(ends)]
    return torch.autograd.grad((of_requests(parts, dtype, order)[0] * d_out.to(dtype)).sum(), inputs)
