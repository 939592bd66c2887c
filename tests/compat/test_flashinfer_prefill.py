"""FlashInfer's prefill: pages and ragged arrays, masks as bools and bits, positions inside, wrappers' lives."""

from itertools import pairwise

import pytest
import torch
from paged_oracle import LN_2, Request, cache_of, hold, indptr, near, normal, of_requests, requests_of, starts

import headrace.compat.flashinfer as flashinfer

Q_LENS, K_LENS = [3, 0, 5, 1, 4], [9, 4, 5, 0, 17]
HEADS, DIM = 4, 16
LOGICAL = {"scale": 0.3, "cap": 2.0, "left": 5}
OPTIONS = {"sm_scale": 0.3, "logits_soft_cap": 2.0, "window_left": 5}


def workspace():
    return torch.empty(16, dtype=torch.int8)


class Paged:
    """A batch over pages, its wrapper planned."""

    def __init__(self, kv_layout="NHD", dtype=torch.float32, kv_dtype=None, value_dim=None, **plan):
        self.cache = cache_of(K_LENS, 4, 2, DIM, value_dim=value_dim, dtype=kv_dtype or dtype)
        self.q = normal(sum(Q_LENS), HEADS, DIM, dtype=dtype, seed=9)
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), kv_layout)
        self.kv_layout = kv_layout
        self.places = (indptr(Q_LENS), self.cache.indptr, self.cache.indices, self.cache.last_page_len)
        self.sizes = (HEADS, 2, DIM, 4)
        self.wrapper.plan(*self.places, *self.sizes, **plan)

    def arrays(self, pair=True):
        return (self.cache.arrays(self.kv_layout, pair),)

    def run(self, *args, pair=True, **options):
        return self.wrapper.run(self.q, *self.arrays(pair), *args, **options)

    def requests(self, **options):
        return requests_of(self.q, Q_LENS, self.cache, **options)


class Ragged:
    """A batch over keys and values in a row."""

    def __init__(self, kv_layout="NHD", dtype=torch.float32, value_dim=None, **plan):
        self.q = normal(sum(Q_LENS), HEADS, DIM, dtype=dtype, seed=9)
        self.k = normal(sum(K_LENS), 2, DIM, dtype=dtype, seed=1)
        self.v = normal(sum(K_LENS), 2, value_dim or DIM, dtype=dtype, seed=2)
        self.kv_layout = kv_layout
        self.wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), kv_layout)
        self.places, self.sizes = (indptr(Q_LENS), indptr(K_LENS)), (HEADS, 2, DIM)
        self.wrapper.plan(*self.places, *self.sizes, **plan)

    def arrays(self):
        if self.kv_layout == "HND":
            return self.k.transpose(0, 1).contiguous(), self.v.transpose(0, 1).contiguous()
        return self.k, self.v

    def run(self, *args, **options):
        return self.wrapper.run(self.q, *self.arrays(), *args, **options)

    def requests(self, **options):
        found = []
        for r, ((a, b), (c, d)) in enumerate(zip(pairwise(starts(Q_LENS)), pairwise(starts(K_LENS)), strict=True)):
            own = {name: value[r] if isinstance(value, list) else value for name, value in options.items()}
            found.append(Request(self.q[a:b], self.k[c:d], self.v[c:d], own))
        return found


BATCHES = [Paged, Ragged]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", BATCHES)
def test_batch_prefill(kind, dtype, kv_layout, causal):
    case = kind(kv_layout, dtype, causal=causal)
    out, lse = case.run(return_lse=True)
    assert out.dtype == dtype and out.shape == case.q.shape and lse.shape == case.q.shape[:2]
    assert (out[8] == 0).all() and torch.isneginf(lse[8]).all()
    hold(out, lse, case.requests(causal=causal))
    assert torch.equal(case.run(), out)


def test_one_array_holds_both():
    case = Paged(causal=True)
    assert torch.equal(case.run(pair=False), case.run())


@pytest.mark.parametrize("kind", BATCHES)
def test_values_of_another_size(kind):
    case = kind(value_dim=24, head_dim_vo=24, causal=True)
    out = case.run()
    assert out.shape == (sum(Q_LENS), HEADS, 24)
    hold(out, None, case.requests(causal=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_options_of_plan(kind, causal):
    case = kind(causal=causal, **OPTIONS)
    hold(*case.run(return_lse=True), case.requests(causal=causal, **LOGICAL))


def masks():
    """A mask for each request, and all of them flat."""
    generator = torch.Generator().manual_seed(7)
    own = [torch.rand(q, k, generator=generator) < 0.6 for q, k in zip(Q_LENS, K_LENS, strict=True)]
    own[0][1] = False
    return own, torch.cat([mask.flatten() for mask in own])


@pytest.mark.parametrize("form", ["bools", "segments", "bits"])
@pytest.mark.parametrize("kind", BATCHES)
def test_custom_masks_take_the_place_of_causal(kind, form):
    own, flat = masks()
    counts = torch.tensor([mask.numel() for mask in own])
    given = {
        "bools": {"custom_mask": flat},
        "segments": {"packed_custom_mask": flashinfer.segment_packbits(flat, indptr(counts.tolist()), "little")[0]},
        "bits": {"packed_custom_mask": flashinfer.packbits(flat, bitorder="little")},
    }[form]
    case = kind(causal=True, **given)
    out, lse = case.run(return_lse=True)
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()
    hold(out, lse, case.requests(seen=own))
    case = kind(window_left=3, **given)
    hold(*case.run(return_lse=True), case.requests(seen=own, left=3))


@pytest.mark.parametrize("kind", BATCHES)
def test_masks_too_short_are_refused(kind):
    with pytest.raises(ValueError, match="custom_mask"):
        kind(custom_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="custom_mask by its name"):
        kind(head_dim_vo=torch.ones(9, dtype=torch.bool))
    with pytest.raises(ValueError, match="packed_custom_mask"):
        kind(packed_custom_mask=torch.ones(3, dtype=torch.uint8))


# Positions inside attention


def turned(array, positions, theta, scale):
    """[tokens, heads, dim] rotated in halves: pair (i, i + dim / 2) by position * theta ** (-2i / dim) / scale."""
    half = array.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half) / scale
    cos, sin = angles.cos()[:, None].to(array.dtype), angles.sin()[:, None].to(array.dtype)
    a, b = array[..., :half], array[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotated(requests, theta=1e4, scale=1.0):
    """The same requests with queries and keys rotated, in float64: what the wrapper does in float32."""
    found = []
    for r in requests:
        own = torch.arange(len(r.q)) + len(r.k) - len(r.q)
        q, k = turned(r.q.double(), own, theta, scale), turned(r.k.double(), torch.arange(len(r.k)), theta, scale)
        found.append(Request(q, k, r.v.double(), r.options))
    return found


@pytest.mark.parametrize("theta,scale", [(None, None), (500.0, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", BATCHES)
def test_rotary_positions(kind, dtype, theta, scale):
    case = kind(dtype=dtype, causal=True, pos_encoding_mode="ROPE_LLAMA", rope_theta=theta, rope_scale=scale)
    out, lse = case.run(return_lse=True)
    hold(out, lse, rotated(case.requests(causal=True), theta or 1e4, scale or 1.0), dtype=dtype)


def slopes(heads):
    """Of a power of two of heads: 2 ** (-8 i / heads); further ones lie between those of twice as many."""
    assert heads == 6
    return torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])


def alibi(request):
    """slope * (key - query), both counted from 0."""
    distance = torch.arange(len(request.k))[None] - torch.arange(len(request.q))[:, None]
    return slopes(request.q.shape[1])[:, None, None] * distance


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 7])
def test_alibi(queries, causal, masked):
    q, k, v = normal(queries, 6, DIM), normal(11, 2, DIM, seed=1), normal(11, 2, DIM, seed=2)
    seen = torch.rand(queries, 11, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    out, lse = flashinfer.single_prefill_with_kv_cache(
        q, k, v, causal=causal, custom_mask=seen, pos_encoding_mode="ALIBI", return_lse=True
    )
    request = Request(q, k, v, {"causal": causal and not masked, "seen": seen})
    request.options["bias"] = alibi(request)
    hold(out, lse, [request])


@pytest.mark.parametrize("causal", [False, True])
def test_alibi_over_pages(causal):
    case = Paged(causal=causal, pos_encoding_mode="ALIBI")
    case.q = normal(sum(Q_LENS), 6, DIM, seed=9)
    requests = case.requests(causal=causal)
    for request in requests:
        request.options["bias"] = alibi(request)
    hold(*case.run(return_lse=True), requests)


def test_alibi_of_decode():
    q, k, v = normal(6, DIM), normal(11, 2, DIM, seed=1), normal(11, 2, DIM, seed=2)
    out, lse = flashinfer.single_decode_with_kv_cache(q, k, v, pos_encoding_mode="ALIBI", return_lse=True)
    request = Request(q[None], k, v)
    request.options["bias"] = alibi(request)
    hold(out[None], lse[None], [request])


# Lives of wrappers


@pytest.mark.parametrize("kind", BATCHES)
def test_results_go_into_buffers(kind):
    case = kind(dtype=torch.float16, causal=True)
    out, lse = torch.full_like(case.q, torch.nan), torch.full(case.q.shape[:2], torch.nan)
    told = case.run(out=out, lse=lse)
    assert told is out
    hold(out, lse, case.requests(causal=True))
    assert case.run(out=out, lse=lse, return_lse=True)[1] is lse


@pytest.mark.parametrize("kind", BATCHES)
def test_the_type_of_the_result_may_be_another(kind):
    case = kind(dtype=torch.float16, o_data_type="float32")
    out = case.run()
    assert out.dtype == torch.float32
    hold(out, None, case.requests())


@pytest.mark.parametrize("kind", BATCHES)
def test_names_of_a_life(kind):
    case = kind(causal=True)
    out, lse = case.run(return_lse=True)
    wrapper = type(case.wrapper)(workspace())
    wrapper.begin_forward(*case.places, *case.sizes)
    given = {"causal": True, "logits_soft_cap": 2.0, "sm_scale": 0.3, "window_left": 5}
    hold(*wrapper.forward_return_lse(case.q, *case.arrays(), **given), case.requests(causal=True, **LOGICAL))
    assert torch.equal(wrapper.forward(case.q, *case.arrays(), causal=True), out)
    told = wrapper.run_return_lse(case.q, *case.arrays())
    assert all(torch.equal(a, b) for a, b in zip(told, (out, lse), strict=True))
    wrapper.end_forward()
    wrapper.reset_workspace_buffer(workspace(), workspace())
    assert torch.equal(wrapper.run(case.q, *case.arrays()), out) and not wrapper.is_cuda_graph_enabled


@pytest.mark.parametrize("kind", BATCHES)
def test_forward_keeps_the_mask_of_the_plan(kind):
    own, flat = masks()
    case = kind(custom_mask=flat)
    hold(case.wrapper.forward(case.q, *case.arrays(), causal=True), None, case.requests(seen=own))


@pytest.mark.parametrize("kind", BATCHES)
def test_run_wants_a_plan(kind):
    case = kind()
    wrapper = type(case.wrapper)(workspace())
    for name in ("run", "forward"):
        with pytest.raises(RuntimeError, match="plan"):
            getattr(wrapper, name)(case.q, *case.arrays())


@pytest.mark.parametrize("kind", BATCHES)
def test_as_many_queries_as_planned(kind):
    case = kind()
    with pytest.raises(ValueError, match="q: expected 13 tokens"):
        case.wrapper.run(case.q[:-1], *case.arrays())


@pytest.mark.parametrize("kind", BATCHES)
def test_what_is_of_gpus_changes_nothing(kind):
    case, plain = kind(causal=True), kind(causal=True).run()
    plan = {
        "use_fp16_qk_reduction": True,
        "non_blocking": False,
        "q_data_type": torch.bfloat16,
        "max_token_per_sequence": 9,
        "max_sequence_kv": 9,
        "seq_lens_q": torch.tensor(Q_LENS),
    }
    for backend in ("fa2", "fa3", "cudnn", "cutlass"):
        wrapper = type(case.wrapper)(workspace(), backend=backend)
        wrapper.plan(*case.places, *case.sizes, causal=True, **plan)
        assert torch.equal(wrapper.run(case.q, *case.arrays(), enable_pdl=False), plain)


@pytest.mark.parametrize("kind", BATCHES)
def test_results_may_be_had_independent_of_neighbours(kind):
    case = kind(causal=True, disable_split_kv=True)
    hold(*case.run(return_lse=True), case.requests(causal=True))


@pytest.mark.parametrize("kind", BATCHES)
def test_buffers_of_cuda_graphs_are_filled(kind):
    case = kind(causal=True)
    buffers = [
        torch.zeros(max(len(values), 40) if i == 2 else len(values), dtype=torch.int32)
        for i, values in enumerate(case.places)
    ]
    wrapper = type(case.wrapper)(workspace(), "NHD", True, *buffers)
    wrapper.plan(*case.places, *case.sizes, causal=True)
    assert wrapper.is_cuda_graph_enabled and torch.equal(wrapper.run(case.q, *case.arrays()), case.run())
    for buffer, values in zip(buffers, case.places, strict=True):
        assert torch.equal(buffer[: len(values)], values)
    with pytest.raises(ValueError, match="qo_indptr_buf"):
        type(case.wrapper)(workspace(), use_cuda_graph=True)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", ["prefix_len_ptr", "token_pos_in_items_ptr", "max_item_len_ptr"])
def test_multi_item_scoring_is_refused(kind, name):
    with pytest.raises(NotImplementedError, match=name):
        kind(**{name: torch.ones(5)})


@pytest.mark.parametrize("kind", BATCHES)
def test_compiled_variants_are_refused(kind):
    with pytest.raises(NotImplementedError, match="jit_args"):
        type(kind().wrapper)(workspace(), jit_args=["name"])
    with pytest.raises(NotImplementedError, match="kv_cache_sf"):
        kind().run(kv_cache_sf=torch.ones(1))
    with pytest.raises(NotImplementedError, match="args"):
        kind().run(torch.ones(1))


def test_offsets_of_values_of_their_own_are_refused():
    for name in ("v_indptr", "o_indptr"):
        with pytest.raises(NotImplementedError, match=name):
            Ragged(**{name: indptr(K_LENS)})


def test_sinks_and_windows_of_a_run():
    case, sinks = Paged(causal=True), normal(HEADS, seed=4)
    hold(*case.run(return_lse=True, sinks=sinks), case.requests(causal=True, sink=sinks))
    hold(*case.run(return_lse=True, window_left=2), case.requests(causal=True, left=2))


def test_the_sink_wrapper_counts_its_sink():
    case, sink = Paged(dtype=torch.bfloat16, causal=True), normal(HEADS, seed=4)
    wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(
        workspace(), q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, head_dim_qk=DIM, head_dim_vo=DIM
    )
    wrapper.plan(*case.places, *case.sizes, causal=True)
    requests = case.requests(causal=True, sink=sink, scale=0.3)
    out, lse = wrapper.run(case.q, *case.arrays(), sink, 0.3, return_lse=True)
    hold(out, None, requests)
    exact, plain = (torch.logaddexp(of_requests(requests, kind)[1], sink) for kind in (torch.float64, torch.bfloat16))
    near(lse, exact / LN_2, plain / LN_2, logarithms=True)
    assert torch.equal(wrapper.run_return_lse(case.q, *case.arrays(), sink, 0.3)[1], lse)
    assert torch.equal(wrapper.run(case.q, *case.arrays(), sink=sink, sm_scale=0.3), out)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_narrow_caches(kv_dtype):
    scale = 0.02 if kv_dtype == torch.int8 else 0.7
    case = Paged(dtype=torch.bfloat16, kv_dtype=kv_dtype, causal=True)
    out, lse = case.run(return_lse=True, k_scale=torch.tensor(scale), v_scale=scale)
    hold(out, lse, case.requests(causal=True, scale=scale * DIM**-0.5), factor=scale)
