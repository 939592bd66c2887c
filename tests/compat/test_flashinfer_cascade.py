"""FlashInfer's merges and the wrappers for keys that requests share: the same as attention over all keys at once."""

import pytest
import torch
from paged_oracle import LN_2, Request, cache_of, hold, indptr, near, normal

import headrace.compat.flashinfer as flashinfer

HEADS, DIM = 4, 16


def workspace():
    return torch.empty(16, dtype=torch.uint8)


def states(parts=2, dtype=torch.float32, tokens=7):
    """v [tokens, parts, heads, dim], s [tokens, parts, heads]; some that saw nothing, with NaN for results."""
    v, s = normal(tokens, parts, HEADS, DIM, dtype=dtype, seed=1), 3 * normal(tokens, parts, HEADS, seed=2)
    v[1, 0], s[1, 0] = torch.nan, -torch.inf
    v[2], s[2] = torch.nan, -torch.inf
    return v, s


def merged(v, s, dtype):
    """The formula: weights 2 ** s, over their sum; 0 and -inf where there are none."""
    weights = torch.exp2(s.to(dtype) - s.to(dtype).amax(1, keepdim=True).nan_to_num(neginf=0.0))
    total = weights.sum(1)
    shares = weights / torch.where(total > 0, total, 1)[:, None]
    mixed = torch.where(shares[..., None] > 0, shares[..., None] * v.to(dtype), 0).sum(1)
    return mixed, torch.log2(total) + s.to(dtype).amax(1).nan_to_num(neginf=0.0)


def check(out, lse, v, s):
    exact, plain = merged(v, s, torch.float64), merged(v, s, torch.float32)
    near(out, exact[0], plain[0])
    near(lse, exact[1], plain[1], logarithms=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merge_states(parts, dtype):
    v, s = states(parts, dtype)
    out, lse = flashinfer.merge_states(v, s)
    assert (
        out.shape == (7, HEADS, DIM) and out.dtype == dtype and lse.shape == (7, HEADS) and lse.dtype == torch.float32
    )
    check(out, lse, v, s)


def test_merge_state():
    v, s = states(dtype=torch.float16)
    out, lse = flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    assert out.dtype == torch.float16
    check(out, lse, v, s)
    told = flashinfer.cascade.merge_state(v[:, 0], s[:, 0].double(), v[:, 1], s[:, 1].half().float())
    assert told[1].dtype == torch.float32


def test_merge_state_in_place():
    v, s = states()
    for mask in (None, torch.tensor([True, False, True, True, False, True, False])):
        into_v, into_s = v[:, 0].clone(), s[:, 0].clone()
        assert flashinfer.merge_state_in_place(into_v, into_s, v[:, 1], s[:, 1], mask) is None
        rows = torch.ones(7, dtype=torch.bool) if mask is None else mask
        check(into_v[rows], into_s[rows], v[rows], s[rows])
        assert torch.equal(into_s[~rows], s[:, 0][~rows])
        assert torch.equal(into_v[~rows].nan_to_num(9), v[:, 0][~rows].nan_to_num(9))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_levels_are_one_attention(causal, kv_layout):
    lens, q_lens = [12, 8, 9, 4], [2, 1]  # what all share, what none has, and the requests' own
    cache = cache_of(lens, 4, 2, DIM)
    q = normal(3, HEADS, DIM, seed=9)
    counts = cache.indptr.diff().tolist()
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(), kv_layout)
    shared = (indptr([3]), indptr(counts[:1]), cache.indices[: counts[0]], cache.last_page_len[:1])
    own_pages = cache.indices[counts[0] + counts[1] :]
    own = (indptr(q_lens), indptr(counts[2:]), own_pages, cache.last_page_len[2:])
    levels = [list(pair) for pair in zip(shared, own, strict=True)]
    wrapper.plan(*levels, HEADS, 2, DIM, 4, causal=causal, sm_scale=0.3, logits_soft_cap=2.0)
    out = wrapper.run(q, cache.arrays(kv_layout))
    requests, begin = [], 0
    for r, n in enumerate(q_lens):
        parts = [torch.cat(pair) for pair in zip(cache.of(0), cache.of(2 + r), strict=True)]
        requests.append(Request(q[begin : begin + n], *parts, {"causal": causal, "scale": 0.3, "cap": 2.0}))
        begin += n
    hold(out, None, requests)
    assert torch.equal(wrapper.forward(q, cache.arrays(kv_layout)), out)
    wrapper.begin_forward(*levels, HEADS, 2, DIM, 4, causal=causal, sm_scale=0.3, logits_soft_cap=2.0)
    wrapper.reset_workspace_buffer(workspace(), [workspace(), workspace()])
    assert torch.equal(wrapper.run(q, cache.arrays(kv_layout)), out) and not wrapper.is_cuda_graph_enabled


def test_levels_want_a_plan():
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace())
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(normal(1, HEADS, DIM), cache_of([1]).arrays())


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_a_shared_beginning_in_an_array_of_its_own(kv_layout):
    cache, q = cache_of([9, 0, 4], 4, 2, DIM), normal(3, HEADS, DIM, seed=9)
    k, v = normal(20, 2, DIM, seed=4), normal(20, 2, DIM, seed=5)
    shared = (k, v) if kv_layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    pages = (cache.indptr, cache.indices, cache.last_page_len, HEADS, 2, DIM, 4)
    requests = [Request(q[r : r + 1], *(torch.cat(p) for p in zip((k, v), cache.of(r), strict=True))) for r in range(3)]
    decode = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(), kv_layout)
    decode.begin_forward(*pages, data_type=torch.float32)
    hold(decode.forward(q, *shared, cache.arrays(kv_layout)), None, requests)
    decode.end_forward()
    prefill = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(), kv_layout)
    prefill.begin_forward(indptr([1, 1, 1]), *pages)
    for request in requests:
        request.options |= {"causal": True, "scale": 0.3}
    out = prefill.forward(q, *shared, cache.arrays(kv_layout), causal=True, sm_scale=0.3)
    hold(out, None, requests)
    prefill.reset_workspace_buffer(workspace(), workspace())
    prefill.end_forward()
    assert torch.equal(prefill.forward(q, *shared, cache.arrays(kv_layout), True, False, 0.3), out)


def test_parts_of_the_keys_merge_to_all_of_them():
    q, k, v = normal(5, HEADS, DIM), normal(21, 2, DIM, seed=1), normal(21, 2, DIM, seed=2)
    parts = [flashinfer.single_prefill_with_kv_cache(q, k[a:b], v[a:b], return_lse=True) for a, b in ((0, 9), (9, 21))]
    out, lse = flashinfer.merge_state(*parts[0], *parts[1])
    hold(out, lse, [Request(q, k, v)])
    assert torch.allclose(lse * LN_2, torch.logaddexp(*(part[1] * LN_2 for part in parts)))


# A mixed batch, and a prefill beside a decode


def test_batch_attention():
    cache, q_lens = cache_of([9, 0, 5], 4, 2, DIM, dtype=torch.bfloat16), [4, 1, 1]
    q = normal(6, HEADS, DIM, dtype=torch.bfloat16, seed=9)
    lens = torch.tensor(cache.lens, dtype=torch.int32)
    wrapper = flashinfer.BatchAttention("HND")
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(q, cache.arrays("HND"))
    sizes = (HEADS, 2, DIM, DIM, 4)
    wrapper.plan(indptr(q_lens), cache.indptr, cache.indices, lens, *sizes, causal=True, logits_soft_cap=2.0)
    buffers = torch.empty_like(q), torch.empty(6, HEADS)
    out, lse = wrapper.run(q, cache.arrays("HND"), *buffers, k_scale=0.5, v_scale=2.0, logits_soft_cap=2.0)
    assert out is buffers[0] and lse is buffers[1]
    own = {"causal": True, "cap": 2.0, "scale": 0.5 * DIM**-0.5}
    ends = indptr(q_lens).tolist()
    hold(out, lse, [Request(q[ends[r] : ends[r + 1]], *cache.of(r), own) for r in range(3)], factor=2.0)


def test_a_prefill_beside_a_decode():
    cache, q_d = cache_of([9, 5], 4, 2, DIM), normal(2, HEADS, DIM, seed=9)
    q, k, v = normal(5, HEADS, DIM), normal(7, 2, DIM, seed=1), normal(7, 2, DIM, seed=2)
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(workspace())
    wrapper.plan(cache.indptr, cache.indices, cache.last_page_len, HEADS, 2, DIM, 4, sm_scale=0.3)
    prefilled, decoded = wrapper.run(q, k, v, q_d, cache.arrays(), causal_p=True, sm_scale_d=9.0, return_lse_p=True)
    hold(prefilled, None, [Request(q, k, v, {"causal": True})])
    hold(decoded, None, [Request(q_d[r : r + 1], *cache.of(r), {"scale": 0.3}) for r in range(2)])
    wrapper.reset_workspace_buffer(workspace(), workspace())
    wrapper.end_forward()
    assert not wrapper.is_cuda_graph_enabled
