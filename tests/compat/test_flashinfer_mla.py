"""FlashInfer's latent attention: caches apart and side by side, both bases, float8 with scales, a wrapper's life."""

import pytest
import torch
from paged_oracle import LN_2, Request, hold, indptr, normal, starts

import headrace.compat.flashinfer as flashinfer
from headrace.compat.flashinfer.mla import joined

Q_LENS, K_LENS = [1, 3, 0, 2], [9, 5, 3, 0]
HEADS, LATENT, ROPE, SCALE = 5, 32, 8, 0.17


class Latent:
    """A batch over pages of latents and rotated keys; NaN where no token lies."""

    def __init__(self, dtype=torch.float32, apart=True, rope=ROPE, page_size=4, kv_dtype=None):
        self.q_nope = normal(sum(Q_LENS), HEADS, LATENT, dtype=dtype, seed=1)
        self.q_pe = normal(sum(Q_LENS), HEADS, rope, dtype=dtype, seed=2)
        counts = [-(-n // page_size) for n in K_LENS]
        whole = torch.full((sum(counts) + 2, page_size, LATENT + rope), torch.nan)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(3)).to(torch.int32)
        self.indptr, self.indices = indptr(counts), order
        for r, n in enumerate(K_LENS):
            for i in range(n):
                page = order[starts(counts)[r] + i // page_size].long()
                whole[page, i % page_size] = normal(LATENT + rope, seed=100 * r + i)
        whole = whole.to(kv_dtype or dtype)
        parts = whole.view(torch.uint8) if kv_dtype else whole
        self.ckv, self.kpe = parts[..., :LATENT], parts[..., LATENT:]
        if apart:
            self.ckv, self.kpe = self.ckv.contiguous(), self.kpe.contiguous()
        if kv_dtype:
            self.ckv, self.kpe = self.ckv.view(kv_dtype), self.kpe.view(kv_dtype)
        self.lens, self.page_size = torch.tensor(K_LENS, dtype=torch.int32), page_size
        self.wrapper = flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(8, dtype=torch.int8), backend="fa2")

    def plan(self, causal=False, wrapper=None):
        places = (indptr(Q_LENS), self.indptr, self.indices, self.lens)
        sizes = (HEADS, LATENT, self.kpe.shape[-1], self.page_size, causal, SCALE, self.q_nope.dtype, self.ckv.dtype)
        (wrapper or self.wrapper).plan(*places, *sizes)
        return self

    def run(self, **options):
        return self.wrapper.run(self.q_nope, self.q_pe, self.ckv, self.kpe, **options)

    def requests(self, ckv=None, kpe=None, **options):
        ckv, kpe = self.ckv if ckv is None else ckv, self.kpe if kpe is None else kpe
        found = []
        for r, n in enumerate(K_LENS):
            pages = self.indices[self.indptr[r] : self.indptr[r + 1]].long()
            latents, ropes = (part[pages].flatten(0, 1)[:n] for part in (ckv, kpe))
            own = slice(starts(Q_LENS)[r], starts(Q_LENS)[r + 1])
            q = torch.cat([self.q_nope[own], self.q_pe[own]], -1)
            keys = torch.cat([latents, ropes], -1)[:, None]
            found.append(Request(q, keys, latents[:, None], {"scale": SCALE, **options}))
        return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latent_attention(dtype, apart, causal):
    case = Latent(dtype, apart).plan(causal)
    out, lse = case.run(return_lse=True)
    assert out.shape == case.q_nope.shape and out.dtype == dtype and lse.shape == case.q_nope.shape[:2]
    hold(out, lse, case.requests(causal=causal))
    assert (out[-2:] == 0).all() and torch.isneginf(lse[-2:]).all()
    assert torch.equal(case.run(), out)


@pytest.mark.parametrize("page_size", [1, 7])
def test_pages_of_any_size(page_size):
    case = Latent(page_size=page_size).plan(True)
    hold(*case.run(return_lse=True), case.requests(causal=True))


def test_parts_of_one_tensor_are_read_where_they_lie():
    case = Latent(apart=False)
    whole = joined(case.ckv, case.kpe)
    assert whole is not None and whole.data_ptr() == case.ckv.data_ptr() and whole.shape[-1] == LATENT + ROPE
    assert torch.equal(whole[..., LATENT:], case.kpe) or whole[..., LATENT:].data_ptr() == case.kpe.data_ptr()
    assert joined(case.ckv.contiguous(), case.kpe.contiguous()) is None


def test_lists_of_pages_are_read_from_their_starts():
    case = Latent().plan()
    expected, case.indptr = case.run(), case.indptr[:-1]
    assert torch.equal(case.plan().run(), expected)


def test_no_rotated_keys():
    case = Latent(rope=0).plan()
    hold(*case.run(return_lse=True), case.requests())


def test_the_log_sum_exp_may_be_natural():
    case = Latent().plan()
    two, natural = case.run(return_lse=True)[1], case.run(return_lse=True, return_lse_base_on_e=True)[1]
    seeing = torch.isfinite(two)
    hold(case.run(), natural, case.requests(), base_2=False)
    assert torch.allclose(two[seeing] * LN_2, natural[seeing])


def test_results_go_into_buffers():
    case = Latent(torch.bfloat16).plan()
    out, lse = torch.full_like(case.q_nope, torch.nan), torch.full(case.q_nope.shape[:2], torch.nan)
    told = case.run(out=out, lse=lse, return_lse=True)
    assert told[0] is out and told[1] is lse
    hold(out, lse, case.requests())


@pytest.mark.parametrize("by_tile", [False, True])
def test_float8_with_scales(by_tile):
    case = Latent(torch.bfloat16, kv_dtype=torch.float8_e4m3fn).plan(True)
    tiles = normal(*case.ckv.shape[:2], 4, seed=9).abs() + 0.5
    scale = {"ckv_scale_arr": tiles} if by_tile else {"ckv_scale": 1.5}
    factor = tiles.repeat_interleave(LATENT // 4, -1) if by_tile else 1.5
    out, lse = case.run(return_lse=True, kpe_scale=0.25, **scale)
    hold(out, lse, case.requests(case.ckv.float() * factor, case.kpe.float() * 0.25, causal=True))


def test_cutlass_takes_a_table():
    case = Latent()
    table = torch.full((len(K_LENS), 5), 2147480000, dtype=torch.int32)
    for r, (begin, end) in enumerate(zip(case.indptr[:-1], case.indptr[1:], strict=True)):
        table[r, : end - begin] = case.indices[begin:end]
    wrapper = flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(8, dtype=torch.int8), backend="cutlass")
    q_nope, q_pe = case.q_nope[:4], case.q_pe[:4]
    out = wrapper.run(q_nope, q_pe, case.ckv, case.kpe, kv_len=case.lens, page_table=table)
    requests = case.requests(scale=(128 + 64) ** -0.5)
    for i, request in enumerate(requests):
        request.q = torch.cat([q_nope[i], q_pe[i]], -1)[None]
    hold(out, None, requests)


def test_a_wrappers_life():
    case = Latent()
    with pytest.raises(RuntimeError, match="plan"):
        case.run()
    out = case.plan(True).run()
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (5, 5, 30, 4)]
    graph = flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(8), True, *buffers)
    case.plan(True, graph)
    assert graph.is_cuda_graph_enabled and torch.equal(graph.run(case.q_nope, case.q_pe, case.ckv, case.kpe), out)
    assert torch.equal(buffers[0], indptr(Q_LENS)) and torch.equal(buffers[2][: len(case.indices)], case.indices)
    graph.reset_workspace_buffer(torch.empty(4), torch.empty(4))
    assert torch.equal(graph.run_return_lse(case.q_nope, case.q_pe, case.ckv, case.kpe)[0], out)


def test_what_is_not_done_is_refused_by_name():
    case = Latent().plan()
    for name in ("profiler_buffer", "o_scale"):
        with pytest.raises(NotImplementedError, match=name):
            case.run(**{name: torch.ones(1)})


def test_scales_belong_to_float8():
    narrow, plain = Latent(torch.bfloat16, kv_dtype=torch.float8_e4m3fn).plan(), Latent().plan()
    tiles = torch.ones(*narrow.ckv.shape[:2], 4)
    for given in ({}, {"ckv_scale": 1.0}, {"ckv_scale": 1.0, "ckv_scale_arr": tiles, "kpe_scale": 1.0}):
        with pytest.raises(ValueError, match="ckv_scale"):
            narrow.run(**given)
    with pytest.raises(ValueError, match="ckv_scale_arr"):
        narrow.run(ckv_scale_arr=tiles[..., :3], kpe_scale=1.0)
    for name in ("ckv_scale", "kpe_scale"):
        with pytest.raises(ValueError, match=name):
            plain.run(**{name: 1.0})
