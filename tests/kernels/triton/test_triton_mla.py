"""Latent attention in Triton: every named case inside the budget, however its work is divided."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from headrace.check.attention_batch import latent_batch, reference, straightforward  # noqa: E402
from headrace.check.attention_cases import LATENT, heads, paged  # noqa: E402
from headrace.check.attention_expected import assert_close  # noqa: E402
from headrace.check.compare import poisoned  # noqa: E402
from headrace.check.guards import Guarded, as_numpy  # noqa: E402
from headrace.kernels import mla_tiles  # noqa: E402
from headrace.kernels.triton import mla_launch  # noqa: E402
from headrace.kernels.triton.mla_attention import mla_kernel, mla_merge_kernel, run  # noqa: E402
from headrace.ops import attention_latent as op  # noqa: E402
from headrace.ops.attention_options import AttentionResult  # noqa: E402

ARITHMETIC = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
BY_NAME = {case.name: case for case in LATENT}
SMALL = heads(6, 1, 40, 32)
DIVIDED = paged("divided", (1, 1, 2), (700, 40, 300), **SMALL, page_size=64)
OTHERS = (
    DIVIDED,
    paged("page_of_two_tiles", (1, 3), (200, 130), **SMALL, page_size=128),
    paged("keys_beside_pages", (1,), (200,), **heads(33, 1, 40, 33), page_size=96),
    paged("odd_dims", (2, 1), (70, 5), **heads(7, 1, 40, 33), page_size=5),
    paged("top_left", (30, 5), (20, 40), **SMALL, align="top_left"),
    paged("both_sides", (20, 3), (90, 70), **SMALL, causal=False, window=(20, 5)),
    paged("mask_per_head", (3, 2), (90, 70), **SMALL, mask="bool", mask_heads=6),
    paged("float_mask", (3, 2), (90, 70), **SMALL, mask="float", causal=False),
    paged("alibi_sinks", (1, 3, 2), (160, 70, 0), **SMALL, alibi="requests", sinks=True),
    paged("many_heads", (1, 2), (70, 90), **heads(130, 1, 40, 32), page_size=64),
)


def prepared(device, case, dtype, query_dtype, **options):
    """A case's tensors in guarded memory, the arrays and options of the kernel, and the guards."""
    batch, as_paged = latent_batch(case, dtype, query_dtype)
    guarded = Guarded(device)
    call = op.prepared(**guarded.tensors(batch | options))
    out = guarded.tensor(poisoned(case.out_shape, query_dtype), "out")
    lse = guarded.tensor(poisoned(case.out_shape[:-1], "float32"), "lse")
    arrays = {**call.arrays, "out": out, "lse": lse}
    return arrays, call.options.native() | {"precision": call.options.precision}, guarded, as_paged


def assert_holds(device, case, dtype="float16", query_dtype="float16", **options):
    arrays, native, guarded, as_paged = prepared(device, case, dtype, query_dtype, **options)
    run(arrays, native)
    guarded.assert_untouched()
    exact = reference(case, as_paged)
    plain = straightforward(case, as_paged, exact, ARITHMETIC[query_dtype])
    assert_close(AttentionResult(as_numpy(arrays["out"]), as_numpy(arrays["lse"])), exact, plain)


@pytest.mark.parametrize("name", ["small_verify", "int4", "one"])
def test_small_cases_hold(device, name):
    assert_holds(device, BY_NAME[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", LATENT, ids=lambda case: case.name)
def test_named_cases_hold(device, case, dtype):
    assert_holds(device, case, dtype, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_other_cases_hold(device, case):
    assert_holds(device, case)


@pytest.mark.parametrize("name", ["small_verify", "float8_scales"])
def test_bfloat16_holds(device, name):
    assert_holds(device, BY_NAME[name], "bfloat16", "bfloat16")


@pytest.mark.slow
def test_types_that_differ_are_multiplied_in_float32(device):
    assert_holds(device, BY_NAME["small_verify"], "float16", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "gfx942"])
@pytest.mark.parametrize("name", ["float8", "prefill"])
def test_tiles_of_other_chips_hold(device, name, chip, monkeypatch):
    monkeypatch.setattr(mla_launch, "chip_of", lambda tensor: chip)
    assert_holds(device, BY_NAME[name])


# How work is divided


def division_of(device, case, **options):
    arrays, native, *_ = prepared(device, case, "float16", "float16", **options)
    launch = mla_launch.launch_of(arrays, native)
    mla_kernel[launch.division.grid](**launch.arguments, num_warps=4)
    if launch.merged:
        mla_merge_kernel[launch.merge_grid](**launch.merged)
    return launch.division, as_numpy(launch.arguments["parts"]).reshape(-1, 2)[:, 1]


def test_a_long_request_is_divided_among_workers(device):
    division, parts = division_of(device, DIVIDED)
    assert division.workers == mla_launch.num_multiprocessors(prepared(device, DIVIDED, "float16", "float16")[0]["out"])
    assert parts[0] > 1


@pytest.mark.slow
def test_many_items_are_not_divided(device, monkeypatch):
    monkeypatch.setattr(mla_launch, "num_multiprocessors", lambda tensor: 1)
    division, parts = division_of(device, BY_NAME["prefill"])
    assert (division.workers, division.units) == (0, 1)
    assert_holds(device, BY_NAME["prefill"])


def test_batch_invariant_bits_do_not_depend_on_neighbours(device, monkeypatch):
    monkeypatch.setattr(mla_tiles, "INVARIANT_KEYS", 128)
    assert max(division_of(device, DIVIDED, deterministic=True)[1][:2]) == 6
    assert_holds(device, DIVIDED, deterministic=True)
    arrays, native, *_ = prepared(device, DIVIDED, "float16", "float16", deterministic=True)
    run(arrays, native)
    together = as_numpy(arrays["out"])
    for r, own in enumerate((slice(0, 1), slice(1, 2), slice(2, 4))):
        alone = {name: arrays[name][own].clone() for name in ("query", "out", "lse")}
        starts = torch.tensor([0, own.stop - own.start], dtype=torch.int32, device=device)
        tables = {name: arrays[name][r : r + 1] for name in ("page_table", "key_lens")}
        run({**arrays, **alone, **tables, "query_starts": starts}, native)
        assert np.array_equal(as_numpy(alone["out"]), together[own]), r


def test_bad_tables_read_and_write_nothing_else(device):
    arrays, native, guarded, _ = prepared(device, BY_NAME["small_verify"], "float16", "float16")
    arrays["page_table"].fill_(10**6)
    arrays["key_lens"].fill_(10**6)
    arrays["query_starts"].fill_(-5)
    arrays["query_starts"][-1] = 10**6
    run(arrays, native)
    guarded.assert_untouched()


def test_nothing_to_do(device):
    arrays, native, *_ = prepared(device, BY_NAME["one"], "float16", "float16")
    nobody = {name: arrays[name][:0] for name in ("query", "out", "lse")}
    run({**arrays, **nobody}, native)


@pytest.mark.slow
def test_listed_keys_are_gathered(device):
    batch, _ = latent_batch(BY_NAME["small_verify"], "float16", "float16")
    indices = np.array([[3, 80, 5, -1], [0, 88, 1, 2], [-1, -1, -1, -1], [19, 7, -1, 0]], np.int32)
    exact, plain = (
        op.mla_attention(**{**batch, **_as(batch, dtype)}, indices=indices) for dtype in ("float64", "float32")
    )
    guarded = Guarded(device)
    found = op.mla_attention(**guarded.tensors(batch | {"indices": indices}), kernel="triton_mla")
    guarded.assert_untouched()
    assert_close(AttentionResult(as_numpy(found.out), as_numpy(found.lse)), exact, plain)
    assert not as_numpy(found.out)[2].any()


def _as(batch, dtype):
    return {name: batch[name].astype(dtype) for name in ("query", "latent_pages")}
