"""MLA decode for Hopper: its own source simulated, for any lengths and any order of events; the same on the GPU."""

import numpy as np
import pytest

from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import heads, paged
from headrace.check.attention_expected import assert_close
from headrace.check.compare import ROUNDING, poisoned
from headrace.check.gluon_memory import OutOfOrder
from headrace.check.gluon_simulator import Deadlock, Simulated, Simulation
from headrace.check.guards import Guarded, as_numpy
from headrace.errors import ArgumentError
from headrace.ops.attention_latent import mla_attention
from headrace.ops.attention_options import AttentionOptions, AttentionResult

torch = pytest.importorskip("torch")
mla = pytest.importorskip("headrace.kernels.gluon.mla_attention")
boxes = mla.boxes
KERNEL = mla._mla_kernel
SHAPE = heads(16, 1, 576, 512)
CASES = (
    paged("one_key", (1,), (1,), **heads(1, 1, 576, 512), page_size=64),
    paged("block_edges", (1,) * 6, (63, 64, 65, 127, 128, 129), **SHAPE, page_size=64),
    paged("split_and_empty", (1, 1, 1), (700, 0, 70), **SHAPE, page_size=64),
    paged("verify_odd_heads", (3, 1, 2), (130, 64, 1), **heads(7, 1, 576, 512), page_size=128),
    paged("two_row_tiles", (1, 0, 2), (200, 9, 70), **heads(70, 1, 576, 512), page_size=64),
    paged("not_causal", (2, 1), (90, 300), **heads(5, 1, 576, 512), page_size=64, causal=False),
    paged("top_left", (3, 2), (2, 140), **heads(5, 1, 576, 512), page_size=64, align="top_left"),
)
SCALE = 0.05


def batches(case, dtype):
    """The arguments of mla_attention, and those of the reference."""
    batch = attention_batch(case, dtype, dtype) | {"scale": SCALE}
    as_paged = batch | {"value_pages": np.ascontiguousarray(batch["key_pages"][..., : case.value_dim])}
    latents = {name: array for name, array in batch.items() if not name.startswith(("key_", "value_"))}
    return latents | {"latent_pages": batch["key_pages"][:, :, 0], "value_dim": case.value_dim}, as_paged


def simulated(case, latents, monkeypatch, *, programs=6, seed=0, eagerness=0.5):
    """out and lse of the whole call, its other kernels in Triton's interpreter; and how often partitions took turns."""
    kernel = Simulated(KERNEL, seed, eagerness)
    monkeypatch.setattr(mla, "_mla_kernel", kernel)
    monkeypatch.setattr(mla, "num_multiprocessors", lambda tensor: programs)
    guarded = Guarded("cpu")
    out, lse = poisoned(case.out_shape, str(latents["query"].dtype)), poisoned(case.out_shape[:2], "float32")
    given = guarded.tensors({**latents, "out": out, "lse": lse})
    arrays = {**given, "key": given["latent_pages"][:, :, None], "key_lens": given["sequence_lens"]}
    options = AttentionOptions(causal=latents["causal"], align=latents["align"], scale=SCALE)
    mla.run(arrays, options.native())
    guarded.assert_untouched()
    return AttentionResult(as_numpy(given["out"]), as_numpy(given["lse"])), kernel.steps


QUICK = ("one_key", "block_edges", "not_causal")
SIMULATED = [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=case.name) for case in CASES]


@pytest.mark.parametrize("case", SIMULATED)
def test_simulated_it_is_within_budget(case, monkeypatch):
    dtype = "bfloat16" if case.name == "block_edges" else "float16"
    latents, as_paged = batches(case, dtype)
    exact = reference(case, as_paged)
    got, steps = simulated(case, latents, monkeypatch)
    assert steps > 0
    assert_close(got, exact, straightforward(case, as_paged, exact, "fp16" if dtype == "float16" else "bf16"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_events_gives_the_same_bits(seed, monkeypatch):
    case = paged("orders", (1, 1), (600, 70), **heads(3, 1, 576, 512), page_size=64)
    latents, _ = batches(case, "float16")
    usual, _ = simulated(case, latents, monkeypatch, programs=2)
    other, _ = simulated(case, latents, monkeypatch, programs=2, seed=100 + seed, eagerness=seed / 3)
    assert np.array_equal(usual.out, other.out) and np.array_equal(usual.lse, other.lse)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", range(mla.BARRIERS.value))
def test_no_barrier_is_superfluous(barrier, monkeypatch):
    """Waited for by nobody, each lets something happen too early: found whatever the order was."""
    wait = Simulation.wait

    def without(self, bar, phase, pred=True, deps=()):
        if self.barriers.order(bar) != barrier:
            wait(self, bar, phase, pred, deps)

    monkeypatch.setattr(Simulation, "wait", without)
    case = paged("long", (1, 1), (640, 300), **heads(2, 1, 576, 512), page_size=64)
    with pytest.raises((OutOfOrder, Deadlock)):
        simulated(case, batches(case, "float16")[0], monkeypatch, programs=1)


@pytest.mark.slow
def test_random_lengths_never_lock_up(monkeypatch):
    random = np.random.default_rng(7)
    for seed in range(3):
        lens = tuple(int(n) for n in random.integers(0, 300, 2))
        tokens = tuple(int(n) for n in random.integers(0, 4, 2))
        case = paged("random", tokens, lens, **heads(int(random.integers(1, 30)), 1, 576, 512), page_size=64)
        latents, as_paged = batches(case, "float16")
        if not sum(tokens):
            continue
        exact = reference(case, as_paged)
        got, _ = simulated(case, latents, monkeypatch, programs=3, seed=seed)
        assert_close(got, exact, straightforward(case, as_paged, exact, "fp16"))


def test_row_tiles_that_read_together():
    assert mla.tiles_together(8, 8, 16) == 1
    assert mla.tiles_together(8, 8, 128) == 2
    assert mla.tiles_together(8, 16, 128) == 4
    assert mla.tiles_together(1, 1000, 128) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_the_gpu_it_is_within_budget(case, dtype):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    latents, as_paged = batches(case, dtype)
    exact = reference(case, as_paged)
    guarded = Guarded("cuda")
    out = guarded.tensor(poisoned(case.out_shape, dtype), "out")
    result = mla_attention(**guarded.tensors(latents), out=out, kernel="gluon_mla")
    guarded.assert_untouched()
    got = AttentionResult(as_numpy(result.out), as_numpy(result.lse))
    plain = straightforward(case, as_paged, exact, "fp16" if dtype == "float16" else "bf16")
    assert_close(got, exact, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads,tokens,num_keys", [(16, 1, 5000), (128, 1, 9000), (128, 2, 4097)])
def test_on_the_gpu_large_batches_agree_with_the_portable_kernel(num_heads, tokens, num_keys):
    """Lengths of all sizes, many splits: too much for the reference in float64."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    random, requests = np.random.default_rng(0), 37
    lens = random.integers(0, num_keys, requests).astype(np.int32)
    most = -(-num_keys // 64)
    table = torch.from_numpy(random.permutation(requests * most).astype(np.int32).reshape(requests, most)).cuda()
    pages = torch.randn(requests * most, 64, 576, dtype=torch.bfloat16, device="cuda")
    query = torch.randn(requests * tokens, num_heads, 576, dtype=torch.bfloat16, device="cuda")
    starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * tokens
    given = {"query_starts": starts, "value_dim": 512, "scale": SCALE}
    found = [
        mla_attention(query, pages, table, torch.from_numpy(lens).cuda(), **given, kernel=name)
        for name in ("gluon_mla", "triton_mla")
    ]
    seen = torch.isfinite(found[1].lse)
    assert torch.equal(seen, torch.isfinite(found[0].lse))
    # Each sums 576 products in float32 for a score, and rounds weights and results to bfloat16, in an order of its own.
    largest, apart = found[1].lse[seen].abs().max(), (found[0].lse - found[1].lse)[seen].abs().max()
    assert apart <= 2 * 576 * ROUNDING["float32"] * largest
    apart = (found[0].out.float() - found[1].out.float()).abs().max()
    assert apart <= 2 * 2 * ROUNDING["bfloat16"] * found[1].out.abs().max()


def test_memory_that_tma_cannot_address_is_told():
    pages = torch.zeros(4, 64, 580, dtype=torch.float16)
    with pytest.raises(ArgumentError, match="latent_pages: .* strides of whole 16 bytes"):
        boxes("latent_pages", pages[..., :576], [1, 64, 64], mla.PAGED.value)
    with pytest.raises(ArgumentError, match="address"):
        boxes(
            "latent_pages", pages.flatten()[1:].as_strided((4, 64, 576), (36864, 576, 1)), [1, 64, 64], mla.PAGED.value
        )
    with pytest.raises(ArgumentError, match="contiguous rows"):
        boxes("latent_pages", pages.transpose(1, 2), [1, 64, 64], mla.PAGED.value)


def test_strides_of_dimensions_of_one_do_not_matter():
    found = boxes("key", torch.zeros(64, 8, dtype=torch.float16)[None], [1, 64, 8], mla.PAGED.value)
    assert found.strides == [512, 8, 1] and found.shape == [1, 64, 8]
    one_head = torch.zeros(8192, dtype=torch.float16).as_strided((2, 64, 1, 32), (4096, 64, 3, 1))
    assert boxes("key", one_head, [1, 64, 1, 32], mla.PAGED.value).strides == [4096, 64, 32, 1]
