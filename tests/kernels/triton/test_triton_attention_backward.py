"""Triton's gradients of attention: within their budget, in one order, zeros where nobody sees anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.check.attention_cases import dense, heads, ragged
from headrace.check.attention_gradients import (
    GRADIENTS,
    NAMES,
    assert_gradients_close,
    assert_gradients_hold,
    computed_on,
    gradient_batch,
    reference,
    straightforward,
)
from headrace.errors import KernelError
from headrace.ops import explain
from headrace.ops.attention_dense import attention

KERNEL = "triton_attention_backward"
ATOMIC = "triton_attention_backward_atomic"
KERNELS = (KERNEL, ATOMIC)
CASES = {case.name: case for case in GRADIENTS}
QUICK = (
    ("dense_one", "float32"),
    ("dense_scale", "float16"),
    ("dense_mask_all", "float32"),
    ("dense_softcap", "float16"),
    ("dense_no_keys", "float32"),
    ("dense_no_queries", "float32"),
    ("ragged_one", "float16"),
    ("ragged_no_requests", "float32"),
    ("backward_key_edges", "float16"),
)
# The others take minutes here, and run on a GPU: of these every option once, in both layouts.
SLOW = (
    ("ragged_top_left", "float32"),
    ("ragged_float_mask_per_head", "float16"),
    ("ragged_everything", "float32"),
    ("dense_mask_tree", "float16"),
    ("dense_mask_documents", "float32"),
    ("dense_key_lens", "float16"),
    ("dense_bool_mask", "float32"),
    ("dense_sinks", "float16"),
    ("dense_alibi_top_left", "float32"),
    ("backward_tile_edges", "float16"),
    ("backward_window", "float32"),
)
FOUR = ragged("four", (40, 0, 7, 33), (40, 0, 7, 33), sinks=True, **heads(2, 1, 16))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name,dtype", QUICK)
def test_within_budget(name, dtype, kernel):
    assert_gradients_hold(CASES[name], kernel, dtype, dtype, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name,dtype", SLOW)
def test_every_option_is_within_budget(name, dtype, kernel):
    assert_gradients_hold(CASES[name], kernel, dtype, dtype, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_within_budget_on_the_gpu(name, dtype, kernel):
    assert_gradients_hold(CASES[name], kernel, dtype, dtype, device="cuda")


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_within_budget(kernel, device):
    assert_gradients_hold(CASES["dense_mask_all"], kernel, "bfloat16", "bfloat16", device=device)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_precision_is_what_was_asked_for(precision, kernel, device):
    assert_gradients_hold(CASES["dense_scale"], kernel, "float16", "float16", precision=precision, device=device)


def given_to(batch):
    """What the forward of these arguments takes."""
    return {name: array for name, array in batch.items() if name not in ("d_out", "d_lse", "out", "lse")}


def forwarded(batch):
    """The same call with what the forward gives for it."""
    found = attention(**given_to(batch))
    return batch | {"out": found.out, "lse": found.lse}


@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_that_several_requests_share_gather_from_all(kernel, device):
    batch = gradient_batch(FOUR)
    shared = {"key_starts": np.array([5, 0, 30, 5], np.int32), "key_lens": np.array([50, 0, 7, 60], np.int32)}
    batch = forwarded(batch | shared)
    exact = reference(batch)
    got = computed_on(device, **batch, kernel=kernel)
    assert_gradients_close(got, exact, straightforward(batch, exact))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_nobody_sees_has_no_gradient_even_where_it_is_nan(kernel, device):
    batch = gradient_batch(FOUR) | {"causal": False}
    batch |= {"key_starts": np.array([3, 70, 50, 55], np.int32), "key_lens": np.array([20, 5, 0, 22], np.int32)}
    batch = forwarded(batch)
    used = np.zeros(len(batch["key"]), bool)
    used[3:23] = used[55:77] = True  # the second request has no queries
    for name in ("key", "value"):
        batch[name] = np.where(used[:, None, None], batch[name], np.nan)
    got = computed_on(device, **batch, kernel=kernel)
    assert not got.key[~used].any() and not got.value[~used].any()
    assert np.abs(got.key[used]).max(axis=(1, 2)).all()
    clean = {name: np.where(used[:, None, None], batch[name], 0) for name in ("key", "value")}
    exact = reference(batch | clean)
    assert_gradients_close(got, exact, straightforward(batch | clean, exact))


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_see_nothing_have_no_gradient(kernel, device):
    batch = gradient_batch(CASES["dense_key_lens"])
    got = computed_on(device, **batch, kernel=kernel)
    assert not got.query[batch["key_lens"] == 0].any()
    for b, length in enumerate(batch["key_lens"]):
        assert not got.key[b, length:].any() and not got.value[b, length:].any()


def test_bits_do_not_depend_on_neighbours(device):
    batch = gradient_batch(FOUR, "float16", "float16")
    together = computed_on(device, **batch, kernel=KERNEL)
    starts = batch["query_starts"]
    for r in (0, 2, 3):
        rows = slice(starts[r], starts[r + 1])
        names = ("d_out", "query", "key", "value", "out", "lse", "d_lse")
        own = {name: np.ascontiguousarray(batch[name][rows]) for name in names} | {"sinks": batch["sinks"]}
        own |= {name: np.array([0, starts[r + 1] - starts[r]], np.int32) for name in ("query_starts", "key_starts")}
        alone = computed_on(device, **own, causal=True, kernel=KERNEL)
        for name in ("query", "key", "value"):
            assert np.array_equal(getattr(alone, name), getattr(together, name)[rows]), name


def test_the_same_call_gives_the_same_bits(device):
    batch = gradient_batch(FOUR)
    first, second = (computed_on(device, **batch, kernel=KERNEL) for _ in range(2))
    for name in NAMES:
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_no_gradient_of_lse_is_one_of_zeros(device):
    batch = gradient_batch(FOUR)
    zeros = computed_on(device, **batch | {"d_lse": np.zeros_like(batch["d_lse"])}, kernel=KERNEL)
    none = computed_on(device, **batch | {"d_lse": None}, kernel=KERNEL)
    for name in NAMES:
        assert np.array_equal(getattr(none, name), getattr(zeros, name)), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_holds_for_gradients_too(kernel, device):
    case = dense("masked", 1, 40, 90, causal=False, mask="bool", mask_heads=2, **heads(2, 1, 16))
    assert_gradients_hold(case, kernel, "float16", "float16", device=device)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_request_that_is_nan_leaves_the_queries_of_its_neighbours_alone(kernel, device):
    batch = gradient_batch(FOUR)
    own = slice(0, 40)  # of keys too: the first tile has some of the next request
    spoiled = {name: batch[name].copy() for name in ("d_out", "query", "key", "value")}
    for array in spoiled.values():
        array[own] = np.nan
    got, clean = (computed_on(device, **batch | change, kernel=kernel).query for change in (spoiled, {}))
    assert np.isnan(got[own]).all()
    assert np.array_equal(got[40:], clean[40:])


def test_sums_in_memory_are_not_taken_where_one_order_is_asked_for(device):
    given = {"kernel": ATOMIC, "deterministic": True}
    with pytest.raises(KernelError, match="deterministic: needs False, got True"):
        computed_on(device, **gradient_batch(FOUR), **given)


def told_of(tokens, *, dim=128, arch="sm_90", **options):
    """What explain says of gradients of 16 heads on a GPU."""
    query = (2, tokens, 16, dim)
    dtypes = dict.fromkeys(("d_out", "query", "key", "value", "out"), "bfloat16")
    arrays = [query] * 5
    given = {"lse": query[:3], "dtype": dtypes, "causal": True, "device": "cuda", "arch": arch}
    return explain("attention_backward", *arrays, **given | options)


def test_sums_in_memory_are_chosen_for_long_prompts():
    assert told_of(8192).chosen.kernel == ATOMIC
    assert not told_of(8192).chosen.deterministic
    assert told_of(8192).able[0].kernel == KERNEL


@pytest.mark.parametrize("given", [{"deterministic": True}, {"require": ("deterministic",)}, {"arch": "sm_80"}])
def test_sums_in_one_order_are_chosen_where_others_cannot_be(given):
    told = told_of(8192, **given)
    assert told.chosen.kernel == KERNEL and told.chosen.batch_invariant
    assert [each.kernel for each in told.rejected].count(ATOMIC) == 1


def test_wide_heads_are_refused_by_their_size():
    [reason] = [each for each in told_of(64, dim=320).rejected if each.kernel == ATOMIC]
    assert str(reason.reason) == "head_dim: needs up to 256, got 320 (triton_attention_backward takes them)"


def test_what_torch_says_of_determinism_holds(device):
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(KernelError, match="deterministic"):
            computed_on(device, **gradient_batch(FOUR), kernel=ATOMIC)
    finally:
        torch.use_deterministic_algorithms(False)
