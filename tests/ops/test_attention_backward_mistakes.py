"""attention_backward: each mistake is named by its argument, and what is asked for is given, refused or explained."""

import ml_dtypes
import numpy as np
import pytest
import torch

from headrace.check.attention_gradients import GRADIENTS, gradient_batch
from headrace.errors import ArgumentError, KernelError
from headrace.ops import attention_gradients as op
from headrace.ops import explain
from headrace.ops.select import choices, reset_choices

CASES = {case.name: case for case in GRADIENTS}
DENSE_SELF, RAGGED_SELF = gradient_batch(CASES["dense_self"]), gradient_batch(CASES["ragged_self"])
ROWS = (2, 65, 6, 64)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


MISTAKES = [
    (DENSE_SELF, {"d_out": None}, "d_out: expected an array, got NoneType"),
    (DENSE_SELF, {"d_out": zeros(2, 65, 6, 63)}, "d_out: expected [2, 65, 6, 64], got [2, 65, 6, 63]"),
    (DENSE_SELF, {"d_out": zeros(*ROWS, dtype=np.float64)}, "d_out: expected float32 or float16 or bfloat16"),
    (DENSE_SELF, {"out": zeros(2, 64, 6, 64)}, "out: expected [2, 65, 6, 64]"),
    (DENSE_SELF, {"out": zeros(*ROWS, dtype=np.int8)}, "out: expected float32 or"),
    (DENSE_SELF, {"out": zeros(2, 65, 6, 128)[..., ::2]}, "out: expected a contiguous last dimension"),
    (DENSE_SELF, {"lse": None}, "lse: expected an array, got NoneType"),
    (DENSE_SELF, {"lse": zeros(2, 65, 5)}, "lse: expected [2, 65, 6], got [2, 65, 5]"),
    (DENSE_SELF, {"lse": zeros(2, 65, 6, dtype=np.float16)}, "lse: expected float32, got float16"),
    (DENSE_SELF, {"d_lse": zeros(2, 65)}, "d_lse: expected [2, 65, 6]"),
    (DENSE_SELF, {"d_lse": zeros(2, 65, 6, dtype=np.float64)}, "d_lse: expected float32"),
    (DENSE_SELF, {"key": zeros(2, 65, 2, 32)}, "key: expected the query's head_dim 64, got 32"),
    (DENSE_SELF, {"value": zeros(2, 65, 2, 63)}, "d_out: expected [2, 65, 6, 63]"),
    (DENSE_SELF, {"query": zeros(2, 65, 6, 128)[..., ::2]}, "query: expected"),
    (DENSE_SELF, {"sinks": zeros(5)}, "sinks: expected [6]"),
    (DENSE_SELF, {"key_lens": np.array([5, 66], np.int32)}, "key_lens: expected 0 to 65, got 66"),
    (DENSE_SELF, {"mask": zeros(65, 66)}, "mask: expected up to 65 columns"),
    (DENSE_SELF, {"window": (-1, None)}, "window: expected whole numbers"),
    (DENSE_SELF, {"precision": "bf16"}, "precision: expected one of auto, exact, fast"),
    (DENSE_SELF, {"d_out": torch.zeros(ROWS, device="meta")}, "d_out: expected an array on the CPU"),
    (RAGGED_SELF, {"query_starts": None}, "query_starts: ragged arrays need them"),
    (RAGGED_SELF, {"query_starts": np.array([0, 40, 30, 47, 137], np.int32)}, "query_starts: expected whole numbers"),
    (RAGGED_SELF, {"key_starts": np.array([0, 40, 40, 47, 138], np.int32)}, "key_starts: expected numbers from 0 to"),
]


@pytest.mark.parametrize("batch,changes,text", MISTAKES, ids=[text[:40] for _, _, text in MISTAKES])
def test_mistakes_are_named(batch, changes, text):
    with pytest.raises(ArgumentError) as caught:
        op.attention_backward(**batch | changes)
    assert text in str(caught.value)


def test_quantized_keys_have_no_gradients():
    codes = {"key": zeros(2, 65, 2, 64, dtype=np.int8), "value": zeros(2, 65, 2, 64, dtype=np.int8)}
    with pytest.raises(ArgumentError, match="key_scales: int8 needs them"):
        op.attention_backward(**DENSE_SELF | codes)
    eighths = {name: codes[name].astype(ml_dtypes.float8_e4m3fn) for name in codes}
    with pytest.raises(ArgumentError, match="quantized keys and values have no gradients"):
        op.attention_backward(**DENSE_SELF | eighths)


def test_a_kernel_asked_for_runs_or_says_why_not():
    with pytest.raises(KernelError, match="dtype of query"):
        op.attention_backward(**DENSE_SELF, kernel="cpu_float64")
    with pytest.raises(KernelError, match="none named"):
        op.attention_backward(**DENSE_SELF, kernel="gpu")
    op.attention_backward(**DENSE_SELF, require=("batch_invariant", "deterministic", "exact"), precision="exact")


def test_what_is_chosen_is_counted_and_explained():
    reset_choices()
    op.attention_backward(**DENSE_SELF, kernel="cpu_portable")
    assert choices() == {("attention_backward", "cpu_portable"): 1}
    told = explain("attention_backward", **DENSE_SELF)
    assert told.chosen and told.chosen.batch_invariant and told.request.traffic.flops == 5 * 2 * 64 * 6 * 2 * 65 * 33
    shapes = {name: DENSE_SELF[name].shape for name in ("d_out", "query", "key", "value", "out", "lse")}
    of_shapes = explain("attention_backward", **shapes, causal=True).request
    given = {name: DENSE_SELF[name] for name in shapes}
    assert of_shapes == explain("attention_backward", **given, causal=True).request
