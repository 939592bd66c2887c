"""Triton's gradients of attention: within their budget, in one order, zeros where nobody sees anything."""

from __future__ import annotations

import numpy as np
import pytest

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
from headrace.ops.attention_dense import attention

KERNEL = "triton_attention_backward"
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


@pytest.mark.parametrize("name,dtype", QUICK)
def test_within_budget(name, dtype):
    assert_gradients_hold(CASES[name], KERNEL, dtype, dtype, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name,dtype", SLOW)
def test_every_option_is_within_budget(name, dtype):
    assert_gradients_hold(CASES[name], KERNEL, dtype, dtype, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_within_budget_on_the_gpu(name, dtype):
    assert_gradients_hold(CASES[name], KERNEL, dtype, dtype, device="cuda")


def test_bfloat16_is_within_budget(device):
    assert_gradients_hold(CASES["dense_mask_all"], KERNEL, "bfloat16", "bfloat16", device=device)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_precision_is_what_was_asked_for(precision, device):
    assert_gradients_hold(CASES["dense_scale"], KERNEL, "float16", "float16", precision=precision, device=device)


def given_to(batch):
    """What the forward of these arguments takes."""
    return {name: array for name, array in batch.items() if name not in ("d_out", "d_lse", "out", "lse")}


def forwarded(batch):
    """The same call with what the forward gives for it."""
    found = attention(**given_to(batch))
    return batch | {"out": found.out, "lse": found.lse}


def test_keys_that_several_requests_share_gather_from_all(device):
    batch = gradient_batch(FOUR)
    shared = {"key_starts": np.array([5, 0, 30, 5], np.int32), "key_lens": np.array([50, 0, 7, 60], np.int32)}
    batch = forwarded(batch | shared)
    exact = reference(batch)
    got = computed_on(device, **batch, kernel=KERNEL)
    assert_gradients_close(got, exact, straightforward(batch, exact))


def test_what_nobody_sees_has_no_gradient_even_where_it_is_nan(device):
    batch = gradient_batch(FOUR) | {"causal": False}
    batch |= {"key_starts": np.array([3, 70, 50, 55], np.int32), "key_lens": np.array([20, 5, 0, 22], np.int32)}
    batch = forwarded(batch)
    used = np.zeros(len(batch["key"]), bool)
    used[3:23] = used[55:77] = True  # the second request has no queries
    for name in ("key", "value"):
        batch[name] = np.where(used[:, None, None], batch[name], np.nan)
    got = computed_on(device, **batch, kernel=KERNEL)
    assert not got.key[~used].any() and not got.value[~used].any()
    assert np.abs(got.key[used]).max(axis=(1, 2)).all()
    clean = {name: np.where(used[:, None, None], batch[name], 0) for name in ("key", "value")}
    exact = reference(batch | clean)
    assert_gradients_close(got, exact, straightforward(batch | clean, exact))


def test_rows_that_see_nothing_have_no_gradient(device):
    batch = gradient_batch(CASES["dense_key_lens"])
    got = computed_on(device, **batch, kernel=KERNEL)
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


def test_a_mask_holds_for_gradients_too(device):
    case = dense("masked", 1, 40, 90, causal=False, mask="bool", mask_heads=2, **heads(2, 1, 16))
    assert_gradients_hold(case, KERNEL, "float16", "float16", device=device)
