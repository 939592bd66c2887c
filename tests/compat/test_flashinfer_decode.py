"""FlashInfer's decode: one request and batches over pages, every option, and the life of a wrapper."""

import pytest
import torch
from paged_oracle import Request, cache_of, hold, normal, requests_of

import headrace.compat.flashinfer as flashinfer

LENS = [9, 0, 4, 1, 17]
HEADS, DIM = 4, 16
LOGICAL = {"scale": 0.3, "cap": 2.0, "left": 5}


def workspace():
    return torch.empty(16, dtype=torch.uint8)


class Decode:
    """A batch, its wrapper planned."""

    def __init__(self, lens=LENS, kv_layout="NHD", dtype=torch.float32, kv_dtype=None, page_size=4, q_len=1, **plan):
        self.cache = cache_of(lens, page_size, 2, DIM, dtype=kv_dtype or dtype)
        self.q, self.q_lens = normal(q_len * len(lens), HEADS, DIM, dtype=dtype, seed=9), [q_len] * len(lens)
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), kv_layout)
        self.pages = (self.cache.indptr, self.cache.indices, self.cache.last_page_len)
        self.sizes = (HEADS, 2, DIM, page_size)
        self.kv_layout = kv_layout
        self.wrapper.plan(*self.pages, *self.sizes, **({"q_len_per_req": q_len} | plan))

    def run(self, pair=True, **options):
        return self.wrapper.run(self.q, self.cache.arrays(self.kv_layout, pair), **options)

    def requests(self, **options):
        return requests_of(self.q, self.q_lens, self.cache, **options)


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batch_decode(dtype, kv_layout, pair):
    case = Decode(dtype=dtype, kv_layout=kv_layout)
    out, lse = case.run(pair, return_lse=True)
    assert out.dtype == dtype and out.shape == case.q.shape and lse.shape == case.q.shape[:2]
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()
    hold(out, lse, case.requests())
    assert torch.equal(case.run(pair), out)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_of_any_size(page_size):
    case = Decode(page_size=page_size)
    hold(*case.run(return_lse=True), case.requests())


def test_pages_of_one_token_without_their_dimension():
    case = Decode(page_size=1)
    keys, values = case.cache.arrays()
    expected = case.run()
    assert torch.equal(case.wrapper.run(case.q, (keys[:, 0], values[:, 0])), expected)
    assert torch.equal(case.wrapper.run(case.q, torch.stack([keys[:, 0], values[:, 0]], 1)), expected)


def test_strided_caches_are_read_where_they_lie():
    case = Decode()
    keys, values = case.cache.arrays()
    apart = [torch.full((2 * len(a), 5, 3, DIM), torch.nan) for a in (keys, values)]
    for whole, part in zip(apart, (keys, values), strict=True):
        whole[::2, :4, :2] = part
    assert torch.equal(case.wrapper.run(case.q, tuple(a[::2, :4, :2] for a in apart)), case.run())


def test_options_of_plan():
    case = Decode(sm_scale=0.3, logits_soft_cap=2.0, window_left=5)
    hold(*case.run(return_lse=True), case.requests(**LOGICAL))
    assert torch.equal(case.run(window_left=5), case.run())
    hold(*case.run(return_lse=True, window_left=-1), case.requests(scale=0.3, cap=2.0))


def test_sinks_take_weight_and_no_part_in_the_log_sum_exp():
    case, sinks = Decode(), normal(HEADS, seed=4)
    out, lse = case.run(return_lse=True, sinks=sinks)
    hold(out, lse, case.requests(sink=sinks))
    assert torch.equal(lse, case.run(return_lse=True)[1])


def test_scales_multiply_scores_and_results():
    case = Decode(lens=[9, 4])
    out, lse = case.run(return_lse=True, q_scale=0.5, k_scale=1.5, v_scale=3.0)
    hold(out, lse, case.requests(scale=0.75 * DIM**-0.5), factor=3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_narrow_caches(kv_dtype, dtype):
    case = Decode(dtype=dtype, kv_dtype=kv_dtype)
    scale = 0.02 if kv_dtype == torch.int8 else 0.7
    out, lse = case.run(return_lse=True, k_scale=scale, v_scale=scale)
    hold(out, lse, case.requests(scale=scale * DIM**-0.5), factor=scale)


def test_several_queries_of_each_request_are_causal():
    lens = [9, 4, 17]
    case = Decode(lens=lens, q_len=3)
    hold(*case.run(return_lse=True), case.requests(causal=True))
    case = Decode(lens=lens, q_len=3, window_right=-1)
    hold(*case.run(return_lse=True), case.requests())
    with pytest.raises(ValueError, match="q: expected 9 tokens"):
        case.wrapper.run(case.q[:3], case.cache.arrays())


def test_results_go_into_buffers():
    case = Decode(dtype=torch.float16)
    out, lse = torch.full_like(case.q, torch.nan), torch.full(case.q.shape[:2], torch.nan)
    expected = case.run(return_lse=True)
    told = case.run(out=out, lse=lse, return_lse=True)
    assert told[0] is out and told[1] is lse
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    scaled = case.run(out=out, v_scale=2.0)
    assert scaled is out
    hold(out, None, case.requests(), factor=2.0)
    with pytest.raises(ValueError, match="lse"):
        case.run(lse=lse[:2])


@pytest.mark.parametrize("o_data_type", ["float32", torch.bfloat16])
def test_the_type_of_the_result_may_be_another(o_data_type):
    case = Decode(dtype=torch.float16, o_data_type=o_data_type)
    out = case.run()
    assert out.dtype == (torch.float32 if o_data_type == "float32" else o_data_type)
    hold(out, None, case.requests())


def test_float8_results():
    case = Decode(dtype=torch.float16, o_data_type=torch.float8_e4m3fn)
    assert torch.equal(
        case.run().float(), Decode(o_data_type="float32", dtype=torch.float16).run().to(torch.float8_e4m3fn).float()
    )


def test_names_of_a_life():
    case = Decode()
    arrays = case.cache.arrays()
    out, lse = case.run(return_lse=True)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.begin_forward(*case.pages, *case.sizes, "NONE", -1, None, "float16", None, None, torch.float16)
    assert torch.equal(wrapper.forward(case.q, arrays), out)
    assert all(torch.equal(a, b) for a, b in zip(wrapper.forward_return_lse(case.q, arrays), (out, lse), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wrapper.run_return_lse(case.q, arrays), (out, lse), strict=True))
    wrapper.end_forward()
    wrapper.reset_workspace_buffer(workspace(), workspace())
    assert torch.equal(wrapper.run(case.q, arrays), out)
    assert wrapper.workspace_size(*case.pages, *case.sizes) == (0, 0)
    assert not wrapper.is_cuda_graph_enabled and not wrapper.use_tensor_cores


def test_forward_replaces_the_options_of_the_plan():
    case = Decode(sm_scale=9.0, window_left=1)
    out, lse = case.wrapper.forward_return_lse(
        case.q, case.cache.arrays(), sm_scale=0.3, logits_soft_cap=2.0, window_left=5
    )
    hold(out, lse, case.requests(**LOGICAL))
    assert torch.equal(case.run(), out)


def test_run_wants_a_plan():
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())
    for name in ("run", "forward", "run_return_lse", "forward_return_lse"):
        with pytest.raises(RuntimeError, match="plan"):
            getattr(wrapper, name)(normal(1, HEADS, DIM), cache_of([1]).arrays())


def test_what_is_of_gpus_changes_nothing():
    plain = Decode().run()
    plan = {"non_blocking": False, "fixed_split_size": 8, "disable_split_kv": True, "q_data_type": torch.float32}
    case = Decode(**plan)
    assert torch.allclose(case.run(enable_pdl=True), plain)
    for backend in ("fa2", "fa3", "trtllm-gen"):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), use_tensor_cores=True, backend=backend)
        wrapper.plan(*case.pages, *case.sizes)
        assert torch.equal(wrapper.run(case.q, case.cache.arrays()), plain) and wrapper.use_tensor_cores


@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA", "ALIBI"])
def test_the_default_type_of_torch_changes_nothing(mode):
    case = Decode(pos_encoding_mode=mode)
    expected = case.run(return_lse=True, v_scale=2.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        case.wrapper.plan(*case.pages, *case.sizes, pos_encoding_mode=mode)
        found = case.run(return_lse=True, v_scale=2.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


def test_tables_and_lengths_may_stand_for_the_list_of_pages():
    case = Decode()
    width = int(case.cache.indptr.diff().max())
    table = torch.full((len(LENS), width + 1), 2147480000, dtype=torch.int32)
    for r, (begin, end) in enumerate(zip(case.cache.indptr[:-1], case.cache.indptr[1:], strict=True)):
        table[r, : end - begin] = case.cache.indices[begin:end]
    expected, lens = case.run(), torch.tensor(LENS, dtype=torch.int32)
    case.wrapper.plan(*case.pages, *case.sizes, block_tables=table, seq_lens=lens)
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("own_class", [True, False])
def test_buffers_of_cuda_graphs_are_filled(own_class):
    case = Decode()
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (len(LENS) + 1, 50, len(LENS))]
    if own_class:
        wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers)
    else:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", True, False, *buffers)
    wrapper.plan(*case.pages, *case.sizes)
    assert wrapper.is_cuda_graph_enabled
    assert torch.equal(wrapper.run(case.q, case.cache.arrays()), case.run())
    for buffer, values in zip(buffers, case.pages, strict=True):
        assert torch.equal(buffer[: len(values)], values)
    with pytest.raises(ValueError, match="indices"):
        wrapper.plan(case.cache.indptr, torch.zeros(51, dtype=torch.int32), case.cache.last_page_len, *case.sizes)


def test_cuda_graphs_want_their_buffers():
    with pytest.raises(ValueError, match="paged_kv_indptr_buffer"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True)


def test_fast_plan():
    case = Decode()
    expected = case.run()
    flashinfer.fast_decode_plan(case.wrapper, *case.pages, *case.sizes, global_override_indptr_cpu=case.cache.indptr)
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize(
    "name,refused",
    [
        ("jit_args", lambda: flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), jit_args=["name"])),
        ("kv_cache_sf", lambda: Decode().run(kv_cache_sf=(torch.ones(1), torch.ones(1)))),
        ("skip_softmax", lambda: Decode().run(skip_softmax_threshold_scale_factor=1.0)),
        ("args", lambda: (case := Decode()).wrapper.run(case.q, case.cache.arrays(), torch.ones(1))),
        ("NVFP4", lambda: (case := Decode()).wrapper.run(case.q, (torch.zeros(9, 4, 2, 8, dtype=torch.uint8),) * 2)),
        ("logits_soft_cap", lambda: Decode(pos_encoding_mode="ALIBI", logits_soft_cap=1.0)),
    ],
)
def test_what_is_not_done_is_refused_by_name(name, refused):
    with pytest.raises(NotImplementedError, match=name):
        refused()


def test_unknown_words_are_refused():
    with pytest.raises(KeyError, match="kv_layout"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NDH")
    with pytest.raises(KeyError, match="pos_encoding_mode"):
        Decode(pos_encoding_mode="ROPE")


# One request


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_single_decode(kv_layout):
    q, k, v = normal(6, DIM), normal(11, 2, DIM, seed=1), normal(11, 2, DIM, seed=2)
    given = (k, v) if kv_layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    out = flashinfer.single_decode_with_kv_cache(q, *given, kv_layout)
    told, lse = flashinfer.single_decode_with_kv_cache(q, *given, kv_layout, return_lse=True)
    assert torch.equal(out, told) and out.shape == (6, DIM) and lse.shape == (6,)
    hold(out[None], lse[None], [Request(q[None], k, v)])


def test_single_decode_with_options():
    q, k, v = normal(6, DIM), normal(11, 2, DIM, seed=1), normal(11, 2, DIM, seed=2)
    given = {"q_scale": 0.5, "k_scale": 2.0, "v_scale": 3.0, "window_left": 5, "logits_soft_cap": 2.0, "sm_scale": 0.3}
    out, lse = flashinfer.single_decode_with_kv_cache(q, k, v, use_tensor_cores=True, return_lse=True, **given)
    hold(out[None], lse[None], [Request(q[None], k, v, LOGICAL)], factor=3.0)


def test_single_decode_of_nothing():
    k = normal(0, 2, DIM)
    out, lse = flashinfer.single_decode_with_kv_cache(normal(6, DIM), k, k, return_lse=True)
    assert (out == 0).all() and torch.isneginf(lse).all()
