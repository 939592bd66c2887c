"""Attention, dense and ragged: each mistake is named by its argument, and what is asked for is given or refused."""

import numpy as np
import pytest
import torch

from headrace.check.attention_batch import attention_batch
from headrace.check.attention_cases import ATTENTION
from headrace.errors import ArgumentError, KernelError
from headrace.ops import attention_dense as op
from headrace.ops import select

CASES = {case.name: case for case in ATTENTION}


DENSE_SELF = attention_batch(CASES["dense_self"])
RAGGED_SELF = attention_batch(CASES["ragged_self"])
INT8 = attention_batch(CASES["ragged_int8"])


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def read_only(array):
    array.flags.writeable = False
    return array


def starts(*numbers):
    return np.array(numbers, np.int32)


MISTAKES = [
    (DENSE_SELF, {"query": zeros(4, 64)}, "query: expected [batch, queries, heads, head_dim] or [tokens, heads"),
    (DENSE_SELF, {"query": None}, "query: expected an array, got NoneType"),
    (DENSE_SELF, {"query": zeros(2, 65, 6, 64, dtype=np.int8)}, "query: expected float32 or float16"),
    (DENSE_SELF, {"query": zeros(2, 65, 5, 64)}, "query: expected a multiple of 2 heads"),
    (DENSE_SELF, {"query": zeros(2, 65, 6, 64, dtype=np.float64)}, "expected float64 for all or none"),
    (DENSE_SELF, {"query": zeros(2, 65, 6, 0)}, "query: expected"),
    (DENSE_SELF, {"key": zeros(65, 2, 64)}, "key: expected [batch, keys, kv_heads, head_dim]"),
    (DENSE_SELF, {"key": zeros(3, 65, 2, 64), "value": zeros(3, 65, 2, 64)}, "key: expected a batch of 2"),
    (DENSE_SELF, {"key": zeros(2, 65, 2, 32)}, "key: expected the query's head_dim 64, got 32"),
    (DENSE_SELF, {"key": zeros(2, 65, 2, 64, dtype=np.int32)}, "key: expected"),
    (DENSE_SELF, {"value": zeros(2, 64, 2, 64)}, "value: expected [2, 65, 2, value_dim]"),
    (DENSE_SELF, {"value": zeros(2, 65, 2, 64, dtype=np.float16)}, "value: expected float32, the type of key"),
    (DENSE_SELF, {"query": zeros(2, 65, 6, 128)[..., ::2]}, "query: expected"),
    (DENSE_SELF, {"query_starts": starts(0, 65, 130)}, "query_starts: expected None"),
    (DENSE_SELF, {"key_lens": starts(0, 65, 130)}, "key_lens: expected [2]"),
    (DENSE_SELF, {"key_lens": starts(5, 66)}, "key_lens: expected 0 to 65, got 66"),
    (DENSE_SELF, {"key_lens": starts(-1, 6)}, "key_lens: expected 0 to 65, got -1"),
    (DENSE_SELF, {"key_lens": np.array([5, 6])}, "key_lens: expected int32, got int64"),
    (DENSE_SELF, {"key_scales": zeros(2, 65, 2)}, "key_scales: expected None with float32"),
    (DENSE_SELF, {"sinks": zeros(5)}, "sinks: expected [6]"),
    (DENSE_SELF, {"sinks": zeros(6, dtype=np.float16)}, "sinks: expected float32"),
    (DENSE_SELF, {"alibi_slopes": zeros(3, 6)}, "alibi_slopes: expected [6] or [2, 6]"),
    (DENSE_SELF, {"mask": zeros(65, 65, dtype=np.uint8)}, "mask: expected bool or float32"),
    (DENSE_SELF, {"mask": zeros(3, 1, 65, 65)}, "mask: expected [2 or 1, 6 or 1, 65 or 1, columns]"),
    (DENSE_SELF, {"mask": zeros(65)}, "mask: expected"),
    (DENSE_SELF, {"mask": zeros(65, 66)}, "mask: expected up to 65 columns"),
    (DENSE_SELF, {"causal": 1}, "causal: expected True or False"),
    (DENSE_SELF, {"align": "left"}, "align: expected one of bottom_right, top_left"),
    (DENSE_SELF, {"window": 7}, "window: expected (left, right)"),
    (DENSE_SELF, {"window": (-1, None)}, "window: expected whole numbers >= 0 or None"),
    (DENSE_SELF, {"window": (1.5, None)}, "window: expected whole numbers >= 0 or None"),
    (DENSE_SELF, {"window": (None, True)}, "window: expected whole numbers >= 0 or None"),
    (DENSE_SELF, {"scale": float("nan")}, "scale: expected a finite number > 0"),
    (DENSE_SELF, {"scale": "1"}, "scale: expected a finite number > 0"),
    (DENSE_SELF, {"softcap": 0.0}, "softcap: expected a finite number > 0"),
    (DENSE_SELF, {"softcap": float("inf")}, "softcap: expected a finite number > 0"),
    (DENSE_SELF, {"precision": "bf16"}, "precision: expected one of auto, exact, fast"),
    (DENSE_SELF, {"deterministic": None}, "deterministic: expected True or False"),
    (DENSE_SELF, {"out_dtype": "float64"}, "out_dtype: expected float32 or float16 or bfloat16"),
    (DENSE_SELF, {"out": zeros(2, 65, 6, 63)}, "out: expected [2, 65, 6, 64]"),
    (DENSE_SELF, {"out": zeros(2, 65, 6, 64), "out_dtype": "float16"}, "out: expected float16"),
    (DENSE_SELF, {"out": read_only(zeros(2, 65, 6, 64))}, "out: expected an array that can be written"),
    (DENSE_SELF, {"query": torch.zeros(2, 65, 6, 64, device="meta")}, "query: expected an array on the CPU"),
    (DENSE_SELF, {"key": zeros(2, 65, 2, 64).astype(">f4")}, "key: expected float32 or"),
    (DENSE_SELF, {"sinks": zeros(12)[::2]}, "sinks: expected contiguous numbers"),
    (DENSE_SELF, {"require": ("speed",)}, "require: expected names among"),
    (RAGGED_SELF, {"query_starts": None}, "query_starts: ragged arrays need them"),
    (RAGGED_SELF, {"query_starts": zeros(0, dtype=np.int32)}, "query_starts: expected at least [0]"),
    (RAGGED_SELF, {"query_starts": starts(0, 40, 30, 47, 137)}, "query_starts: expected whole numbers that never fall"),
    (RAGGED_SELF, {"query_starts": starts(0, 40, 40, 47, 136)}, "query_starts: expected to begin with 0 and end with"),
    (RAGGED_SELF, {"query_starts": starts(0, 40, 47, 137)}, "key_starts: expected [4]"),
    (RAGGED_SELF, {"query_starts": np.array([0, 40, 40, 47, 137])}, "query_starts: expected int32, got int64"),
    (
        RAGGED_SELF,
        {"key_starts": starts(0, 40, 30, 47, 137)},
        "key_starts: expected numbers from 0 to 137 that never fall",
    ),
    (RAGGED_SELF, {"key_starts": starts(0, 40, 40, 47, 138)}, "key_starts: expected numbers from 0 to 137"),
    (
        RAGGED_SELF,
        {"key_starts": starts(-(2**31), 2**31 - 1, 40, 47, 137)},
        "key_starts: expected numbers from 0 to 137",
    ),
    (RAGGED_SELF, {"key_starts": starts(0, 40, 40, 47)}, "key_starts: expected [5]"),
    (RAGGED_SELF, {"key_starts": starts(0, 40, 138, 5), "key_lens": starts(1, 1, 1, 1)}, "key_starts: expected"),
    (RAGGED_SELF, {"key_lens": starts(0, 40, 40)}, "key_lens: expected [4]"),
    (RAGGED_SELF, {"mask": zeros(4, 136, 5)}, "mask: expected [6 or 1, 137 or 1, columns]"),
    (INT8, {"key_scales": None}, "key_scales: int8 needs them"),
    (INT8, {"value_scales": zeros(160, 1)}, "value_scales: expected [160, 2]"),
    (INT8, {"value_scales": zeros(160, 2, dtype=np.float16)}, "value_scales: expected float32"),
]


@pytest.mark.parametrize("batch,changes,text", MISTAKES, ids=[text[:40] for _, _, text in MISTAKES])
def test_mistakes_are_named(batch, changes, text):
    with pytest.raises(ArgumentError) as caught:
        op.attention(**batch | changes)
    assert text in str(caught.value)


def test_a_kernel_asked_for_runs_or_says_why_not():
    with pytest.raises(KernelError, match="dtype of query"):
        op.attention(**DENSE_SELF, kernel="cpu_float64")
    with pytest.raises(KernelError, match="none named"):
        op.attention(**DENSE_SELF, kernel="gpu")
    with pytest.raises(KernelError, match="batch_invariant"):
        op.attention(**DENSE_SELF, require=("batch_invariant",))
    op.attention(**DENSE_SELF, require=("batch_invariant", "exact"), deterministic=True, precision="exact")


def test_what_is_chosen_is_counted():
    select.reset_choices()
    op.attention(**DENSE_SELF, kernel="cpu_portable")
    assert select.choices() == {("attention", "cpu_portable"): 1}


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (1, 0, 2, 8)])
def test_nothing_to_compute_is_no_mistake(shape):
    array = zeros(*shape)
    for mask in (None, np.ones((shape[1], shape[1]), bool)):
        assert op.attention(array, array, array, mask=mask).out.shape == shape
