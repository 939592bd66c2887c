"""merge_attention on the device: inside the budget for any number of parts, any memory, empty parts not looked at."""

import numpy as np
import pytest

from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.guards import Guarded, as_numpy
from headrace.errors import ArgumentError, KernelError
from headrace.ops import attention_merge as op
from headrace.ops.attention_options import AttentionResult

NAME = "triton_merge"


def random_parts(shape, count, dtype="float32", seed=0):
    """Of a share of the rows one or all parts are empty, and their out is NaN."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(count):
        lse = (5 * random.standard_normal(shape[:-1])).astype(np.float32)
        out = rounded(random.standard_normal(shape), dtype)
        gone = random.random(shape[:-1]) < 0.3
        lse[gone], out[gone] = -np.inf, np.nan
        parts.append((out, lse))
    return parts


def straightforward(parts, exact, sinks):
    """In float32: of each element the worst of five orders of the parts."""
    worst = [part.astype(np.float32) for part in exact]
    random = np.random.default_rng(0)
    for _ in range(5):
        other = op.reference([parts[i] for i in random.permutation(len(parts))], sinks, np.float32)
        worst = [np.where(distance(o, e) > distance(w, e), o, w) for o, w, e in zip(other, worst, exact, strict=True)]
    return worst


def distance(values, exact):
    return np.abs(np.where(np.isneginf(exact), 0, values - np.where(np.isneginf(exact), 0, exact)))


def merged(device, parts, out_dtype="float32", sinks=None):
    guarded = Guarded(device)
    tensors = [tuple(guarded.tensor(array, f"parts[{i}]") for array in part) for i, part in enumerate(parts)]
    place = [guarded.tensor(poisoned(a.shape, t)) for a, t in zip(parts[0], (out_dtype, "float32"), strict=True)]
    given = None if sinks is None else guarded.tensor(sinks, "sinks")
    got = op.merge_attention(tensors, sinks=given, out=AttentionResult(*place), kernel=NAME)
    guarded.assert_untouched()
    return AttentionResult(as_numpy(got.out), as_numpy(got.lse))


def assert_merged(got, parts, out_dtype="float32", sinks=None):
    exact = op.reference(parts, sinks)
    plain = straightforward(parts, exact, sinks)
    nothing = np.isneginf(exact[1])
    assert np.array_equal(np.isneginf(got.lse), nothing)
    assert not got.out.astype(np.float64)[nothing].any()
    assert_within_budget(got.out, exact[0], rounded(plain[0], out_dtype), out_dtype)
    lses = (np.where(nothing, 0, lse) for lse in (got.lse, exact[1], plain[1]))
    assert_within_budget(*lses, "float32", logarithms=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 15), (5, 8, 512), (2, 9, 4, 33), (0, 4, 16)])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 12])
def test_parts_are_merged_within_budget(shape, count, device):
    parts = random_parts(shape, count)
    sinks = np.linspace(-20, 20, shape[-2], dtype=np.float32)
    assert_merged(merged(device, parts), parts)
    assert_merged(merged(device, parts, sinks=sinks), parts, sinks=sinks)


@pytest.mark.parametrize("dtype,out_dtype", [("float16", "float32"), ("float32", "float16"), ("bfloat16", "bfloat16")])
def test_parts_and_outputs_have_types_of_their_own(dtype, out_dtype, device):
    parts = random_parts((9, 4, 40), 2, dtype) + random_parts((9, 4, 40), 1, seed=1)
    assert_merged(merged(device, parts, out_dtype), parts, out_dtype)


def test_parts_and_outputs_may_be_strided(device):
    parts = [tuple(np.repeat(a, 2, axis=0)[::2] for a in part) for part in random_parts((6, 4, 40), 3)]
    parts[1] = tuple(np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1) for a in parts[1])
    assert_merged(merged(device, parts), parts)


def test_dimensions_that_do_not_lie_evenly_are_merged(device):
    """Four dimensions whose first two are no one."""
    parts = [tuple(np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1) for a in random_parts((2, 5, 3, 8), 1)[0])]
    parts += random_parts((2, 5, 3, 8), 1, seed=1)
    assert_merged(merged(device, parts), parts)
    guarded = Guarded(device)
    turned = [guarded.tensor(poisoned(a.swapaxes(0, 1).shape, "float32")).transpose(0, 1) for a in parts[0]]
    given = [tuple(guarded.tensor(array) for array in part) for part in parts]
    got = op.merge_attention(given, out=AttentionResult(*turned), kernel=NAME)
    guarded.assert_untouched()
    assert_merged(AttentionResult(as_numpy(got.out), as_numpy(got.lse)), parts)


@pytest.mark.parametrize("count", [3, 6])
def test_a_part_may_become_the_whole(count, device):
    parts = random_parts((6, 4, 40), count, "float16")
    guarded = Guarded(device)
    tensors = [tuple(guarded.tensor(array) for array in part) for part in parts]
    expected = merged(device, parts, "float16")
    op.merge_attention(tensors, out=AttentionResult(*tensors[1]), kernel=NAME)
    assert np.array_equal(as_numpy(tensors[1][0]), expected.out)
    assert np.array_equal(as_numpy(tensors[1][1]), expected.lse)


def test_bad_parts_are_named():
    good = random_parts((6, 4, 40), 2)
    with pytest.raises(ArgumentError, match=r"parts\[1\].out: expected \[6, 4, 40\]"):
        merged("cpu", [good[0], random_parts((6, 4, 41), 1)[0]])
    with pytest.raises(ArgumentError, match=r"sinks: expected \[4\]"):
        merged("cpu", good, sinks=np.zeros(3, np.float32))
    with pytest.raises(KernelError, match="float64"):
        merged("cpu", [tuple(a.astype(np.float64) for a in part) for part in good], "float64")
