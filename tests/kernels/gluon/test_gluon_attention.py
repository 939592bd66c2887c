"""Attention forward for Hopper: its own source simulated, in any order of events; the same on the GPU."""

import numpy as np
import pytest

from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import dense, heads, ragged
from headrace.check.attention_expected import assert_close, assert_kernel_holds, prepared
from headrace.check.compare import ROUNDING, poisoned
from headrace.check.gluon_memory import OutOfOrder
from headrace.check.gluon_simulator import Deadlock, Simulated, Simulation
from headrace.check.guards import Guarded, as_numpy
from headrace.ops.attention_options import AttentionOptions, AttentionResult

torch = pytest.importorskip("torch")
gluon = pytest.importorskip("headrace.kernels.gluon.attention")
gluon_form = pytest.importorskip("headrace.kernels.gluon.attention_form")
KERNEL = gluon._attention_kernel
CASES = (
    dense("one", 1, 1, 1, **heads(1, 1)),
    dense("tile_edges", 1, 129, 129, **heads(2, 1)),
    dense("diagonal_off_the_tiles", 1, 130, 333, **heads(3, 3)),
    dense("wide_heads", 2, 200, 260, **heads(2, 1, 128, 128)),
    dense("not_causal", 1, 65, 300, **heads(2, 2), causal=False),
    dense("top_left", 1, 150, 280, **heads(1, 1), align="top_left"),
    dense("fewer_keys_than_queries", 1, 300, 100, **heads(1, 1)),
    dense("cut_lengths", 3, 70, 300, **heads(2, 1), key_lens=(300, 131, 0)),
    dense("cut_lengths_wide", 2, 70, 200, **heads(1, 1, 128, 128), key_lens=(129, 5), causal=False),
    dense("heads_first", 2, 130, 150, **heads(2, 1), layout="heads_first"),
    dense("packed", 2, 40, 150, **heads(8, 2), key_lens=(150, 21)),
    dense("packed_of_six", 1, 70, 140, **heads(6, 1)),
    dense("window", 1, 200, 460, **heads(1, 1), window=(140, None)),
    dense("window_of_one", 1, 130, 260, **heads(1, 1), window=(0, None)),
    dense("both_sides", 2, 150, 400, **heads(2, 2), causal=False, window=(129, 60)),
    dense("window_before_all_keys", 1, 140, 20, **heads(1, 1), causal=False, window=(None, 9), align="top_left"),
    dense("window_past_the_keys", 1, 300, 130, **heads(1, 1), causal=False, window=(20, 5), align="top_left"),
    dense("window_cut", 2, 70, 300, **heads(1, 1), window=(100, None), key_lens=(150, 290)),
    dense("capped", 1, 100, 200, **heads(2, 2), softcap=2.0),
    dense("capped_high", 1, 20, 140, **heads(1, 1), softcap=50.0, causal=False),
    dense("sloped", 2, 70, 200, **heads(4, 2), alibi="requests"),
    dense("sunk", 2, 40, 70, **heads(4, 2), sinks=True, key_lens=(70, 0)),
    dense("latent_prompt", 2, 100, 200, **heads(2, 2, 192, 128), key_lens=(200, 77)),
    dense("wide", 1, 100, 140, **heads(2, 1, 256, 256)),
    dense("wide_cut", 2, 70, 140, **heads(1, 1, 256, 256), key_lens=(140, 37), window=(50, None)),
    ragged("ragged_self", (40, 0, 7, 190), (40, 0, 7, 190), **heads(2, 2)),
    ragged("ragged_cross", (40, 3, 0, 1, 130), (7, 140, 20, 260, 0), **heads(4, 2), causal=False),
    ragged("ragged_packed", (5, 33, 0, 70, 1), (300, 33, 0, 129, 128), **heads(8, 1)),
    ragged("ragged_window", (150, 70), (150, 260), **heads(2, 1), window=(100, None)),
    ragged("ragged_top_left", (30, 150), (150, 30), **heads(1, 1), align="top_left"),
    ragged("ragged_everything", (33, 2, 60), (90, 170, 60), **heads(8, 2), softcap=30.0, sinks=True, alibi="requests"),
    ragged("ragged_latent_prompt", (20, 60), (20, 150), **heads(2, 2, 192, 128)),
    ragged("ragged_nothing", (0, 0), (5, 0), **heads(1, 1)),
)


def simulated(case, batch, monkeypatch, *, programs=3, seed=0, eagerness=0.5):
    """out and lse, and how often partitions took turns."""
    kernel = Simulated(KERNEL, seed, eagerness)
    monkeypatch.setattr(gluon, "_attention_kernel", kernel)
    monkeypatch.setattr(gluon, "num_multiprocessors", lambda tensor: programs)
    guarded = Guarded("cpu")
    out, lse = poisoned(case.out_shape, str(batch["query"].dtype)), poisoned(case.out_shape[:-1], "float32")
    given = guarded.tensors({**batch, "out": out, "lse": lse})
    names = ("causal", "align", "window", "softcap")
    options = AttentionOptions(scale=case.head_dim**-0.5, **{name: batch[name] for name in names})
    call = prepared({name: given.get(name, value) for name, value in batch.items()})
    gluon.run(call.arrays | {"out": given["out"], "lse": given["lse"]}, options.native())
    guarded.assert_untouched()
    return AttentionResult(as_numpy(given["out"]), as_numpy(given["lse"])), kernel.steps


# Of each way through the kernel one; the others are slow.
QUICK = ("one", "tile_edges", "diagonal_off_the_tiles", "not_causal", "top_left", "cut_lengths_wide", "packed_of_six")
QUICK += ("window_of_one", "capped_high", "ragged_top_left", "ragged_everything", "ragged_nothing")
SIMULATED = [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow, id=case.name) for case in CASES]


@pytest.mark.parametrize("case", SIMULATED)
def test_simulated_it_is_within_budget(case, monkeypatch):
    dtype = "bfloat16" if case.name == "tile_edges" else "float16"
    batch = attention_batch(case, dtype, dtype)
    exact = reference(case, batch)
    got, _ = simulated(case, batch, monkeypatch)
    assert_close(got, exact, straightforward(case, batch, exact, "fp16" if dtype == "float16" else "bf16"))


ORDERS = (
    dense("orders", 2, 200, 400, **heads(1, 1), key_lens=(390, 400)),
    ragged("orders_ragged", (140, 30), (390, 140), **heads(2, 1), window=(130, None)),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", ORDERS, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_events_gives_the_same_bits(case, seed, monkeypatch):
    batch = attention_batch(case, "float16", "float16")
    usual, _ = simulated(case, batch, monkeypatch, programs=1)
    other, steps = simulated(case, batch, monkeypatch, programs=2, seed=100 + seed, eagerness=seed / 2)
    assert steps > 0
    assert np.array_equal(usual.out, other.out) and np.array_equal(usual.lse, other.lse)


# Those in use, two of a kind; not the turns, which are for speed, nor the second ones of kinds with one.
USED = [2 * kind.value for kind in (gluon.QUERY_FULL, gluon.QUERY_FREE, gluon.CLEANED)]
USED += [
    2 * kind.value + stage
    for kind in (gluon.KEY_FULL, gluon.KEY_FREE, gluon.VALUE_FULL, gluon.VALUE_FREE)
    for stage in range(2)
]


@pytest.mark.parametrize("barrier", USED)
def test_no_barrier_is_superfluous(barrier, monkeypatch):
    """Waited for by nobody, each lets something happen too early: found whatever the order was."""
    wait = Simulation.wait

    def without(self, bar, phase, pred=True, deps=()):
        if self.barriers.order(bar) != barrier:
            wait(self, bar, phase, pred, deps)

    monkeypatch.setattr(Simulation, "wait", without)
    case = dense("long", 2, 200, 700, **heads(1, 1), key_lens=(690, 700), causal=False)
    with pytest.raises((OutOfOrder, Deadlock)):
        simulated(case, attention_batch(case, "float16", "float16"), monkeypatch, programs=1)


@pytest.mark.slow
def test_bits_do_not_depend_on_whether_heads_are_packed(monkeypatch):
    whole = dense("whole", 1, 256, 300, **heads(2, 1), window=(150, None))
    batch = attention_batch(whole, "float16", "float16")
    apart, _ = simulated(whole, batch, monkeypatch)
    few = batch | {"query": batch["query"][:, -40:]}
    shapes = [{name: torch.empty(given[name].shape) for name in ("query", "key")} for given in (batch, few)]
    assert [gluon_form.packed_heads(each) for each in shapes] == [1, 2]
    packed, _ = simulated(dense("few", 1, 40, 300, **heads(2, 1), window=(150, None)), few, monkeypatch)
    assert np.array_equal(apart.out[:, -40:], packed.out) and np.array_equal(apart.lse[:, -40:], packed.lse)


def test_bits_do_not_depend_on_the_chunk_a_row_is_in(monkeypatch):
    """What deterministic=True promises: the last rows alone are as the last rows of all."""
    case = dense("whole", 1, 200, 300, **heads(1, 1))
    batch = attention_batch(case, "float16", "float16")
    whole, _ = simulated(case, batch, monkeypatch)
    part = dense("part", 1, 90, 300, **heads(1, 1))
    alone, _ = simulated(part, batch | {"query": batch["query"][:, -90:]}, monkeypatch)
    assert np.array_equal(whole.out[:, -90:], alone.out) and np.array_equal(whole.lse[:, -90:], alone.lse)


@pytest.mark.parametrize(
    "name,wrong", [("query_starts", (-9, 999, 3)), ("key_starts", (90, -7)), ("key_lens", (999, -1))]
)
def test_wrong_numbers_on_the_device_lead_nowhere_outside(name, wrong, monkeypatch):
    """Whatever is written, no pointer leaves its array (an error of the simulator) and no partition waits for ever."""
    case = ragged("wrong", (20, 9), (20, 40), **heads(2, 1), window=(11, None))
    batch = attention_batch(case, "float16", "float16")
    guarded = Guarded("cpu")
    out, lse = np.zeros(case.out_shape, np.float16), np.zeros(case.out_shape[:-1], np.float32)
    given = guarded.tensors({**prepared(batch).arrays, "out": out, "lse": lse})
    given[name].copy_(torch.tensor(wrong[: len(given[name])], dtype=torch.int32))
    monkeypatch.setattr(gluon, "_attention_kernel", Simulated(KERNEL))
    gluon.run(given, AttentionOptions(causal=True, window=(11, None), scale=0.125).native())
    guarded.assert_untouched()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_the_gpu_it_is_within_budget(case, dtype):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    assert_kernel_holds(case, "gluon_attention", dtype, dtype, out_dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_on_the_gpu_a_long_prompt_agrees_with_sdpa(dim):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    from headrace.ops import attention

    query, key, value = (torch.randn(2, 4096, 8, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    got = attention(query, key, value, causal=True, kernel="gluon_attention").out
    turned = (each.transpose(1, 2) for each in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True).transpose(1, 2)
    # Both round weights and results to bfloat16, at other places.
    assert (got.float() - expected.float()).abs().max() <= 2 * 2 * ROUNDING["bfloat16"] * expected.abs().max()
