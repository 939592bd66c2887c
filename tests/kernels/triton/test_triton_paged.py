"""Paged attention on the device: all named cases inside the error budget, any memory, the same bits in any company."""

import itertools

import numpy as np
import pytest
import torch

from headrace.check.attention_batch import attention_batch, reference, straightforward
from headrace.check.attention_cases import PAGED, heads, paged
from headrace.check.attention_expected import assert_close, assert_kernel_holds, computed_on
from headrace.check.compare import poisoned
from headrace.check.guards import Guarded, as_numpy
from headrace.errors import ArgumentError, KernelError
from headrace.gpu_machine import gpu_of
from headrace.kernels.triton import paged_attention, paged_launch
from headrace.ops import gpu_paged
from headrace.ops.attention_options import AttentionResult, checked_options
from headrace.ops.attention_paged import prepared
from headrace.ops.attention_request import Extent, attention_request

NAME = "triton_paged"
CASES = {case.name: case for case in PAGED}
# In every `make quick`: decode, a tree, all options, codes.
QUICK = ("one", "tree_per_head", "decode_everything", "int4_page_scales")
# On the GPU alone: what they test, shorter cases test in the interpreter.
LONGER = ("prefill_window", "decode_long", "prefill_int4", "decode_default_model")
BOTH = ("decode_window", "decode_int8", "decode_float8_scales", "not_causal", "decode_sinks", "int8_page_scales")


def tiers(dtype, names=None):
    return [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=[] if case.name in QUICK else pytest.mark.slow)
        for case in PAGED
        if case.name in (names or CASES) and case.name not in LONGER
    ]


@pytest.mark.parametrize("case,dtype", tiers("float32") + tiers("float16", BOTH) + tiers("bfloat16", ("verify_four",)))
def test_kernel_is_within_budget(case, dtype, device):
    assert_kernel_holds(case, NAME, dtype, dtype, device=device, out_dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_kernel_is_within_budget_on_the_gpu(case, dtype):
    assert_kernel_holds(case, NAME, dtype, dtype, device="cuda", out_dtype=dtype)


@pytest.mark.parametrize(
    "key,query,precision",
    [("float16", "bfloat16", "auto"), ("float32", "float16", "auto"), ("float16", "float16", "exact")],
)
def test_types_may_be_mixed(key, query, precision, device):
    case = paged("mixed", (1, 3), (70, 33), **heads(4, 2, 32))
    assert_kernel_holds(case, NAME, key, query, precision=precision, device=device)


def test_scales_of_values_may_be_beyond_float16(device):
    """What a weight of float16 times its scale could not hold; bfloat16, which could, has the wider budget."""
    case = paged("scales", (1, 2), (70, 33), kv_format="int8", scales="token", **heads(4, 2, 32))
    batch = attention_batch(case, query_dtype="float16")
    random = np.random.default_rng(0)
    batch["value_scales"] = np.exp2(random.uniform(-30, 24, batch["value_scales"].shape)).astype(np.float32)
    exact = reference(case, batch)
    got = computed_on(device, case, batch, kernel=NAME)
    assert_close(got, exact, straightforward(case, batch, exact, "bf16"))


# Work divided


def launched(device, case, batch, **options):
    """The result, the counters after it, and how many slots were written to."""
    seen = {}
    made = paged_launch.launch_of

    def watched(arrays, given):
        seen["launch"] = launch = made(arrays, given)
        launch.arguments["partial_sums"].fill_(float("nan"))
        launch.arguments["partial_out"].fill_(float("nan"))
        return launch

    paged_attention.launch_of = watched
    try:
        got = computed_on(device, case, batch, kernel=NAME, **options)
    finally:
        paged_attention.launch_of = made
    launch = seen["launch"]
    used = launch.arguments["partial_sums"].view(launch.slots, -1).isnan().logical_not().all(1)
    return got, launch.arguments["counters"], int(used.sum())


LONG = paged("long", (1, 2), (900, 40), **heads(4, 2, 16))


@pytest.mark.parametrize("deterministic", [False, True])
def test_long_requests_are_cut_and_counters_left_as_they_were(device, deterministic):
    batch = attention_batch(LONG, "float16", "float16")
    got, counters, slots = launched(device, LONG, batch, deterministic=deterministic)
    assert slots > 2
    assert not counters.any()
    exact = reference(LONG, batch)
    assert_close(got, exact, straightforward(LONG, batch, exact, "fp16"))


@pytest.mark.slow
def test_calls_of_other_lengths_may_follow_each_other(device):
    for lens in ((900, 40), (3, 800), (0, 0)):
        assert_kernel_holds(paged("again", (1, 2), lens, **heads(4, 2, 16)), NAME, "float16", "float16", device=device)


@pytest.mark.slow
def test_the_same_call_gives_the_same_bits(device):
    batch = attention_batch(LONG, "float16", "float16")
    first, second = (computed_on(device, LONG, batch, kernel=NAME) for _ in range(2))
    assert np.array_equal(first.out, second.out) and np.array_equal(first.lse, second.lse)


COMPANY = paged("company", (1, 12, 1, 3), (600, 640, 30, 700), **heads(4, 2, 16))


@pytest.mark.slow
def test_alone_and_in_company_the_bits_are_the_same(device):
    batch = attention_batch(COMPANY, "float16", "float16") | {"deterministic": True, "kernel": NAME}
    together = computed_on(device, COMPANY, batch)
    starts = np.cumsum([0, *COMPANY.query_lens])
    for r, (begin, end) in enumerate(itertools.pairwise(starts)):
        one = paged("one", COMPANY.query_lens[r : r + 1], COMPANY.key_lens[r : r + 1], **heads(4, 2, 16))
        alone = computed_on(device, one, alone_of(batch, r, begin, end))
        assert np.array_equal(alone.out, together.out[begin:end])
        assert np.array_equal(alone.lse, together.lse[begin:end])


def alone_of(batch, r, begin, end):
    part = {"query": batch["query"][begin:end], "query_starts": np.array([0, end - begin], np.int32)}
    return batch | part | {n: np.ascontiguousarray(batch[n][r : r + 1]) for n in ("page_table", "sequence_lens")}


@pytest.mark.slow
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(device):
    case = paged("prompt", (40,), (600,), **heads(4, 2, 16))
    batch = attention_batch(case, "float16", "float16") | {"deterministic": True, "kernel": NAME}
    whole = computed_on(device, case, batch)
    for begin, end in ((0, 1), (1, 30), (30, 40)):
        part = alone_of(batch, 0, begin, end) | {"sequence_lens": np.array([600 - 40 + end], np.int32)}
        got = computed_on(device, paged("part", (end - begin,), (600 - 40 + end,), **heads(4, 2, 16)), part)
        assert np.array_equal(got.out, whole.out[begin:end])
        assert np.array_equal(got.lse, whole.lse[begin:end])


# Memory


@pytest.mark.slow
def test_pages_may_be_strided(device):
    batch = attention_batch(CASES["verify_four"])
    plain = computed_on(device, CASES["verify_four"], batch, kernel=NAME)
    both = np.stack([batch["key_pages"], batch["value_pages"]], axis=1)
    turned = np.ascontiguousarray(both.transpose(0, 1, 3, 2, 4)).transpose(0, 1, 3, 2, 4)
    strided = batch | {"key_pages": turned[:, 0], "value_pages": turned[:, 1]}
    got = computed_on(device, CASES["verify_four"], strided, kernel=NAME)
    assert np.array_equal(got.out, plain.out) and np.array_equal(got.lse, plain.lse)


def test_small_arrays_may_be_strided_and_pages_not_along_a_head(device):
    case = CASES["decode_everything"]
    batch = attention_batch(case)
    guarded = Guarded(device)
    call, arrays = tensors_of(batch, guarded)
    for name in ("query", "query_starts", "key_lens", "page_table", "sinks", "alibi_slopes"):
        twice = torch.stack([arrays[name], torch.zeros_like(arrays[name])], dim=-1)
        arrays[name] = twice[..., 0]
        assert arrays[name].stride(-1) == 2
    paged_attention.run(arrays, call.options.native())
    exact = reference(case, batch)
    got = AttentionResult(as_numpy(arrays["out"]), as_numpy(arrays["lse"]))
    assert_close(got, exact, straightforward(case, batch, exact))
    arrays["value"] = arrays["value"].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ArgumentError, match="value_pages: expected a contiguous last dimension"):
        paged_attention.run(arrays, call.options.native())


def tensors_of(batch, guarded):
    """The call, and its arrays and results in guarded memory."""
    call = prepared(**guarded.tensors(batch))
    shape = (*call.arrays["query"].shape[:2], call.extent.value_dim)
    out, lse = (guarded.tensor(poisoned(size, "float32"), "out") for size in (shape, shape[:2]))
    return call, {**call.arrays, "out": out, "lse": lse}


WRONG = [
    ("page_table", 2**31 - 1),
    ("page_table", -(2**31)),
    ("key_lens", 2**31 - 1),
    ("key_lens", -9),
    ("query_starts", [0, 2**31 - 1, 5, -7]),
    ("query_starts", [11, 4, 2, 0]),
]


@pytest.mark.slow
@pytest.mark.parametrize("name,value", WRONG)
def test_wrong_pages_lengths_and_starts_stay_within_the_arrays(name, value, device):
    """Results mean nothing then, but those of the next call do."""
    batch = attention_batch(CASES["verify_four"])
    guarded = Guarded(device)
    call, arrays = tensors_of(batch, guarded)
    right = arrays[name].clone()
    arrays[name].copy_(torch.as_tensor(value, dtype=torch.int32).expand(right.shape))
    paged_attention.run(arrays, call.options.native())
    arrays[name].copy_(right)
    paged_attention.run(arrays, call.options.native())
    guarded.assert_untouched()
    exact = reference(CASES["verify_four"], batch)
    got = AttentionResult(as_numpy(arrays["out"]), as_numpy(arrays["lse"]))
    assert_close(got, exact, straightforward(CASES["verify_four"], batch, exact))


@pytest.mark.slow
def test_keys_left_of_the_window_are_not_read(device):
    """An engine may have given their pages away: they hold what is no number."""
    case = paged("window", (1,), (200,), window=(20, None), **heads(2, 1, 16))
    batch = attention_batch(case)
    expected = computed_on(device, case, batch, kernel=NAME)
    gone = batch["page_table"][0, : (200 - 1 - 20) // 16]
    for name in ("key_pages", "value_pages"):
        batch[name][gone] = np.nan
    got = computed_on(device, case, batch, kernel=NAME)
    assert np.array_equal(got.out, expected.out)


# What is said of it


def request_of(dtype="bfloat16", key="bfloat16", requests=4, max_pages=512, **changes):
    options = {"device": "cuda"} | changes
    shapes = {"query": (requests, 32, 128), "key": (4096, 16, 8, 128), "value": (4096, 16, 8, 128)}
    shapes |= {"page_table": (requests, max_pages), "key_lens": (requests,), "query_starts": (requests + 1,)}
    extent = Extent(requests, requests, requests * max_pages * 16, 32, 8, 128, 128)
    dtypes = {"query": dtype, "key": key, "value": key, "out": dtype}
    checked = checked_options(128, causal=True, deterministic=options.pop("deterministic", False))
    return attention_request(
        "paged_attention", extent, checked, shapes=shapes, dtypes=dtypes, place=(options["device"], "sm_90")
    )


def test_the_plan_is_what_is_launched():
    plan = gpu_paged.plan(request_of(), gpu_of("sm_90"))
    assert plan.workers == 264 and plan.splits > 1 and plan.deterministic and not plan.batch_invariant
    assert plan.workspace_bytes == 4 * (2 * 264 - 2) * 16 * (128 + 2)
    assert gpu_paged.plan(request_of(deterministic=True), gpu_of("sm_90")).batch_invariant


def test_the_workspace_of_a_launch_is_the_plans():
    batch = attention_batch(LONG, "float16", "float16")
    for deterministic in (False, True):
        call, arrays = tensors_of(batch | {"deterministic": deterministic}, Guarded("cpu"))
        launch = paged_launch.launch_of(arrays, call.options.native())
        made = sum(launch.arguments[name].nbytes for name in ("partial_out", "partial_sums"))
        gpu = gpu_of("sm_90")
        plan = gpu_paged.plan(call.request(), type(gpu)(gpu.name, gpu.arch, gpu.roofs, 6))
        assert (plan.workspace_bytes, plan.workers) == (made, launch.workers)


def test_float64_has_a_reason():
    batch = attention_batch(CASES["one"], "float64", "float64")
    with pytest.raises(KernelError, match="dtype of query: needs float32"):
        computed_on("cpu", CASES["one"], batch, "float64", kernel=NAME)
