"""What the GPU's latent kernel says of itself: what it takes, how it divides the work, what memory that needs."""

import numpy as np
import pytest

from headrace import ops
from headrace.check.attention_batch import latent_batch
from headrace.check.attention_cases import LATENT
from headrace.gpu_machine import gpu_of
from headrace.kernels.mla_tiles import division, kind_of, tile_for
from headrace.ops import attention_latent, gpu_latent
from headrace.ops.call_request import requests_of


def request(batch=64, heads=16, keys=4096, *, tokens=None, dim=576, value_dim=512, dtype="bfloat16", **options):
    pages = keys // 64
    shapes = ((tokens or batch, heads, dim), (batch * pages, 64, dim), (batch, pages), (batch,))
    sizes = {"query_starts": (batch + 1,), "value_dim": value_dim, "scale": 0.1, "device": "cuda", "arch": "sm_90"}
    [asked] = requests_of("mla_attention", *shapes, dtype=dtype, **{**sizes, **options})
    return asked


def reasons(**options):
    return [reason.predicate for reason in gpu_latent.why_not_mla(request(**options))]


def test_latent_attention_has_kernels_of_its_own_in_front():
    own, others = attention_latent.kernels(), ops.attention_dense.kernels()
    assert [kernel.name for kernel in own[:2]] == ["gluon_mla", "triton_mla"] and own[2:] == others
    assert not {"gluon_mla", "triton_mla"} & {kernel.name for kernel in others}


def test_what_it_does_not_take_is_said():
    assert reasons() == []
    assert reasons(dtype="float64") == ["dtype of query"]
    assert reasons(dim=1088, value_dim=1024) == ["value_dim + rest of the latent"]
    assert reasons(dim=577, value_dim=512) == reasons(dim=1024, value_dim=512) == ["value_dim + rest of the latent"]
    assert reasons(dim=512, value_dim=256) == []
    assert reasons(heads=128, keys=1 << 20, deterministic=True) == ["workspace"]
    assert reasons(heads=128, keys=1 << 20) == []
    assert reasons(dtype="float32", arch="sm_89") == ["latent + rope in float32"]
    assert reasons(dtype="float32", arch="sm_90") == reasons(arch="sm_89") == []


@pytest.mark.parametrize("batch,heads,splits", [(64, 16, 3), (64, 128, 2), (1, 16, 16), (264, 128, 1)])
def test_the_plan_tells_how_work_is_divided(batch, heads, splits):
    plan = gpu_latent.mla_plan(request(batch, heads), gpu_of("sm_90"))
    assert (plan.splits, plan.arithmetic, plan.batch_invariant) == (splits, "bf16", False)
    assert plan.workspace_bytes < 40 << 20


def test_float32_is_exact_unless_it_may_be_fast():
    for precision, arithmetic in (("auto", "tf32x3"), ("exact", "tf32x3"), ("fast", "tf32")):
        asked = request(dtype="float32", precision=precision)
        assert gpu_latent.mla_plan(asked, gpu_of("sm_90")).arithmetic == arithmetic


def test_batch_invariant_parts_do_not_follow_from_the_batch():
    plans = [gpu_latent.mla_plan(request(batch, 16, 16384, deterministic=True), gpu_of("sm_90")) for batch in (1, 64)]
    assert [(plan.splits, plan.batch_invariant) for plan in plans] == [(4, True), (4, True)]


def test_tiles_have_room_for_the_rows_there_are():
    assert [tile_for("sm_90", "plain", rows).rows for rows in (1, 16, 17, 33, 500)] == [16, 16, 32, 64, 64]
    options = {"chip": "sm_90", "kind": "plain", "multiprocessors": 132, "invariant": False}
    cut = division(64 * 4, 64, 96, 4096, **options)
    assert cut.members * cut.tile.rows >= 96 and cut.workers == 132 // cut.members


def test_every_chip_has_tiles_for_every_kind():
    for chip in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"):
        for kind in ("plain", "codes", "wide"):
            assert tile_for(chip, kind, 16).rows == 16


@pytest.mark.parametrize(
    "query,key,precision,expected",
    [
        ("bfloat16", "bfloat16", "auto", ("plain", "bfloat16")),
        ("bfloat16", "bfloat16", "exact", ("wide", "float32")),
        ("float16", "int8", "auto", ("codes", "float16")),
        ("float32", "bfloat16", "auto", ("wide", "float32")),
        ("float16", "bfloat16", "auto", ("wide", "float32")),
        ("float32", "float16", "fast", ("plain", "bfloat16")),
        ("float32", "uint8", "fast", ("codes", "bfloat16")),
        ("float32", "float32", "fast", ("wide", "float32")),
    ],
)
def test_the_arithmetic_follows_from_types_and_precision(query, key, precision, expected):
    assert kind_of(query, key, precision) == expected


def test_it_runs_by_name_in_the_interpreter():
    pytest.importorskip("triton")
    batch, _ = latent_batch(LATENT[1], "float16", "float16")
    ops.reset_choices()
    found = ops.mla_attention(**batch, kernel="triton_mla")
    assert dict(ops.choices()) == {("mla_attention", "triton_mla"): 1}
    assert np.isfinite(found.out).all() and np.isfinite(found.lse).all()


def test_long_requests_are_divided_beside_a_prompt():
    def workers(tokens, capacity):
        options = {"chip": "sm_90", "kind": "plain", "multiprocessors": 132, "invariant": False}
        return division(tokens, 8, 128, capacity, **options).workers

    assert [workers(2048, 1 << 17), workers(2048, 1 << 13), workers(8192, 1 << 17)] == [66, 0, 0]
