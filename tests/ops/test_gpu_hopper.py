"""Kernels for Hopper: what they take, what they turn down and why, and where they stand in the choice."""

from dataclasses import replace

import pytest

from headrace.check.attention_batch import attention_batch
from headrace.check.attention_cases import dense, heads, paged, ragged
from headrace.check.attention_expected import prepared
from headrace.ops.attention_request import kernels_of
from headrace.ops.gpu_hopper import kernels, latent_kernels

[ATTENTION], [MLA] = kernels(), latent_kernels()
LATENT = heads(16, 1, 576, 512)


def request_of(case, dtype="bfloat16", op=None, **options):
    """The request of a case on a Hopper GPU."""
    batch = attention_batch(case, dtype, dtype) | options
    asked = prepared(batch).request()
    return replace(asked, device="cuda", arch="sm_90", op=op or asked.op)


def reasons(kernel, case, dtype="bfloat16", op=None, **options):
    return [reason.predicate for reason in kernel.why_not(request_of(case, dtype, op, **options))]


def test_attention_takes_calls_in_16_bits():
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256)):
        for dtype in ("float16", "bfloat16"):
            assert not reasons(ATTENTION, dense("plain", 2, 9, 9, **heads(4, 2, *dims)), dtype)
            assert not reasons(ATTENTION, ragged("ragged", (3, 9), (3, 9), **heads(4, 2, *dims)), dtype)
    assert not reasons(ATTENTION, dense("cut", 2, 9, 9, key_lens=(9, 5)), deterministic=True)


def test_attention_takes_every_option_but_masks():
    options = {"window": (3, 2), "softcap": 9.0, "sinks": True, "alibi": "heads", "align": "top_left", "causal": False}
    assert not reasons(ATTENTION, dense("all", 1, 5, 5, **options))
    assert not reasons(ATTENTION, ragged("all", (5,), (5,), **options))


def test_a_list_of_kernels_has_none_that_never_runs_there():
    assert "gluon_mla" not in {kernel.name for kernel in kernels_of("attention")}
    assert [kernel.name for kernel in kernels_of("mla_attention")[:2]] == ["gluon_mla", "triton_mla"]


def test_memory_that_is_not_for_boxes_is_left_to_others():
    torch = pytest.importorskip("torch")
    wide = torch.zeros(1, 5, 2, 65, dtype=torch.bfloat16)
    batch = {"query": wide[..., :64].clone(), "key": wide[..., :64], "value": wide[..., :64].clone()}
    call = prepared(batch)
    assert call.unaligned == ""  # on a CPU it does not matter
    asked = replace(call, stands_for=("cuda", "sm_90")).request()
    assert [reason.predicate for reason in ATTENTION.why_not(asked)] == ["memory of key"]
    aligned = prepared(batch | {"key": batch["query"]})
    assert not ATTENTION.why_not(replace(aligned, stands_for=("cuda", "sm_90")).request())
    shifted = torch.zeros(5 * 2 * 64 + 4, dtype=torch.bfloat16)[4:].view(1, 5, 2, 64)
    assert replace(prepared(batch | {"key": shifted}), stands_for=("cuda", "sm_90")).unaligned == "key"


def test_few_tokens_fill_tiles_with_the_heads_that_read_the_same_keys():
    from headrace.gpu_machine import gpu_of

    few = request_of(ragged("few", (16,) * 4, (900,) * 4, **heads(32, 4, 128, 128)))
    assert ATTENTION.planned(few, gpu_of("sm_90")).padding == 1
    odd = request_of(ragged("few", (16,) * 4, (900,) * 4, **heads(21, 3, 128, 128)))
    assert ATTENTION.planned(odd, gpu_of("sm_90")).padding == 8


@pytest.mark.parametrize(
    "predicate,case,options",
    [
        ("layout", paged("paged", (1,), (5,)), {}),
        ("head_dim and value_dim", dense("narrow", 1, 5, 5, **heads(2, 1, 80, 80)), {}),
        ("mask", dense("mask", 1, 5, 5, mask="float", causal=False), {}),
        ("precision", dense("exact", 1, 5, 5), {"precision": "exact"}),
    ],
)
def test_attention_says_what_it_does_not_take(predicate, case, options):
    assert reasons(ATTENTION, case, **options) == [predicate]


def test_attention_in_float32_is_not_for_it():
    assert reasons(ATTENTION, dense("wide", 1, 5, 5), "float32") == ["dtype of query"]


def test_mla_leaves_long_prompts_to_others():
    case = paged("prompt", (3,), (5,), **heads(128, 1, 576, 512), page_size=64)
    asked = request_of(case, op="mla_attention")
    assert not MLA.why_not(asked)
    longer = replace(asked, shapes={**asked.shapes, "query": (10000, 128, 576)})
    assert [reason.predicate for reason in MLA.why_not(longer)] == ["query tokens x heads"]


def test_mla_takes_whole_blocks_of_latents():
    for page_size in (64, 256):
        assert not reasons(MLA, paged("plain", (1, 2), (70, 9), **LATENT, page_size=page_size), op="mla_attention")


@pytest.mark.parametrize(
    "predicate,case,op,options",
    [
        ("op", paged("paged", (1,), (5,), **LATENT, page_size=64), "paged_attention", {}),
        ("latent and value_dim", paged("small", (1,), (5,), **heads(4, 1, 72, 64), page_size=64), "mla_attention", {}),
        ("page_size", paged("page", (1,), (5,), **LATENT, page_size=16), "mla_attention", {}),
        (
            "deterministic",
            paged("page", (1,), (5,), **LATENT, page_size=64),
            "mla_attention",
            {"deterministic": True},
        ),
        ("softcap", paged("softcap", (1,), (5,), **LATENT, page_size=64, softcap=3.0), "mla_attention", {}),
    ],
)
def test_mla_says_what_it_does_not_take(predicate, case, op, options):
    assert reasons(MLA, case, op=op, **options) == [predicate]


def test_they_are_for_hopper_alone():
    asked = request_of(dense("plain", 1, 9, 9))
    assert [reason.predicate for reason in ATTENTION.why_not(replace(asked, arch="sm_100"))] == ["GPU generation"]
    assert [reason.predicate for reason in ATTENTION.why_not(replace(asked, device="cpu", arch=""))] == ["device"]


def test_the_plan_of_mla_tells_its_workspace_and_who_reads_together():
    asked = request_of(
        paged("plain", (1,) * 4, (70, 9, 5, 300), **heads(128, 1, 576, 512), page_size=64), op="mla_attention"
    )
    from headrace.gpu_machine import gpu_of

    plan = MLA.planned(asked, gpu_of("sm_90"))
    assert plan.workers == 132 and plan.notes == ("2 row tiles read the same keys together",)
    assert plan.workspace_bytes == 2 * 132 * 64 * 513 * 4 and plan.splits == 17
    assert plan.padding == 1
    few = request_of(paged("few", (1,), (70,), **LATENT, page_size=64), op="mla_attention")
    assert MLA.planned(few, gpu_of("sm_90")).padding == 4
