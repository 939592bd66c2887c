"""merge_attention: every kernel inside the budget, associative, equal to attention over all keys, bad parts named."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.check.compare import assert_within_budget, rounded
from headrace.errors import ArgumentError, KernelError
from headrace.kernels import cpu
from headrace.kernels.arrays import Buffer
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor
from headrace.ops import attention_merge as op
from headrace.ops.attention_options import AttentionResult

KERNELS = [kernel.name for kernel in op.kernels() if "cpu" in kernel.devices]
SHAPES = [(1, 1, 1), (7, 3, 15), (40, 5, 17), (3, 128, 512), (2, 9, 4, 33), (0, 4, 16)]


def random_parts(shape, count, dtype="float32", empty=0.3, seed=0):
    """Parts as attention leaves them; of a share of the rows one or all parts are empty, and their out is NaN."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(count):
        lse = (5 * random.standard_normal(shape[:-1])).astype(np.float32)
        out = rounded(random.standard_normal(shape), dtype)
        gone = random.random(shape[:-1]) < empty
        lse[gone], out[gone] = -np.inf, np.nan
        parts.append((out, lse))
    return parts


def straightforward(parts, exact, sinks=None, grouped=False):
    """In float32: of each element the worst of five orders of the parts; grouped: in two groups first."""
    worst = [part.astype(np.float32) for part in exact]
    random = np.random.default_rng(0)
    for _ in range(5):
        order = [parts[i] for i in random.permutation(len(parts))]
        cut = random.integers(1, len(parts)) if grouped else 0
        other = grouping(order, cut, lambda group: op.reference(group, sinks, np.float32))
        worst = [np.where(_distance(o, e) > _distance(w, e), o, w) for o, w, e in zip(other, worst, exact, strict=True)]
    return worst


def grouping(parts, cut, merge):
    """The first `cut` merged, the others merged, and then these two."""
    groups = [group for group in (parts[:cut], parts[cut:]) if group]
    return merge([merge(group) for group in groups]) if len(groups) > 1 else merge(parts)


def _distance(values, exact):
    return np.abs(np.where(np.isneginf(exact), 0, values - np.where(np.isneginf(exact), 0, exact)))


def assert_merged(merged, parts, out_dtype="float32", sinks=None):
    exact = op.reference(parts, sinks)
    plain = straightforward(parts, exact, sinks)
    nothing = np.isneginf(exact[1])
    assert np.array_equal(np.isneginf(merged.lse), nothing)
    assert not np.asarray(merged.out, np.float64)[nothing].any()
    assert_within_budget(merged.out, exact[0], rounded(plain[0], out_dtype), out_dtype)
    assert_within_budget(
        *(np.where(nothing, 0, lse) for lse in (merged.lse, exact[1], plain[1])), "float32", logarithms=True
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_kernel_is_within_budget(kernel, shape, count):
    found = next(k for k in op.kernels() if k.name == kernel)
    if reasons := found.why_not(op.request([shape], ["float32"], "float32")):
        pytest.skip("; ".join(map(str, reasons)))
    parts = random_parts(shape, count)
    sinks = np.linspace(-20, 20, shape[-2], dtype=np.float32)
    assert_merged(op.merge_attention(parts, kernel=kernel), parts)
    assert_merged(op.merge_attention(parts, kernel=kernel, sinks=sinks), parts, sinks=sinks)


@pytest.mark.parametrize("dtype,out_dtype", list(itertools.product(op.DTYPES[:3], repeat=2)))
def test_parts_and_outputs_have_types_of_their_own(dtype, out_dtype):
    parts = random_parts((30, 4, 40), 3, dtype) + random_parts((30, 4, 40), 1, seed=1)
    assert_merged(op.merge_attention(parts, out_dtype=out_dtype), parts, out_dtype)
    assert op.merge_attention(parts).out.dtype == np.float32
    assert op.merge_attention(parts[:1]).out.dtype == parts[0][0].dtype


def test_float64_stays_float64():
    parts = [(out, lse.astype(np.float64) / 3) for out, lse in random_parts((30, 4, 40), 4, "float64")]
    sinks = np.zeros(4, np.float32)
    merged, exact = op.merge_attention(parts, sinks=sinks), op.reference(parts, sinks, np.longdouble)
    assert merged.out.dtype == merged.lse.dtype == np.float64
    random = np.random.default_rng(0)
    others = [op.reference([parts[i] for i in random.permutation(4)], sinks) for _ in range(3)]
    nothing = np.isneginf(exact[1])
    assert np.array_equal(np.isneginf(merged.lse), nothing)
    for got, want, plain in zip((merged.out, merged.lse), exact, zip(*others, strict=True), strict=True):
        want = np.where(np.isneginf(want), 0, want)
        largest = max(np.max(np.abs(np.where(np.isneginf(other), 0, other) - want)) for other in plain)
        assert np.max(np.abs(np.where(np.isneginf(got), 0, got) - want)) <= 2 * (
            largest + 2.0**-53 * np.max(np.abs(want))
        )


def test_what_is_given_is_written():
    parts = random_parts((6, 4, 40), 3, "float16")
    out = AttentionResult(np.full((8, 4, 40), np.nan, np.float16), np.full((8, 4), np.nan, np.float32))
    place = AttentionResult(out.out[1:7], out.lse[1:7])
    assert op.merge_attention(parts, out=place) is place
    assert_merged(place, parts, "float16")
    assert np.isnan(out.out[[0, 7]]).all() and np.isnan(out.lse[[0, 7]]).all()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_part_may_become_the_whole(dtype):
    parts = [
        (out, lse.astype("float64" if dtype == "float64" else "float32"))
        for out, lse in random_parts((6, 4, 40), 3, dtype)
    ]
    expected = op.merge_attention(parts)
    op.merge_attention(parts, out=AttentionResult(*parts[1]))
    assert np.array_equal(parts[1][0], expected.out) and np.array_equal(parts[1][1], expected.lse)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 9), cut=st.integers(1, 8), seed=st.integers(0, 2**31), empty=st.sampled_from([0.0, 0.4, 1.0])
)
def test_any_grouping_gives_the_same(count, cut, seed, empty):
    parts = random_parts((11, 3, 20), count, empty=empty, seed=seed)
    exact = op.reference(parts)
    nothing = np.isneginf(exact[1])
    plain = straightforward(parts, exact, grouped=True)
    merged = grouping(parts, cut, lambda group: op.merge_attention(group))
    assert np.array_equal(np.isneginf(merged.lse), nothing)
    assert_within_budget(merged.out, exact[0], plain[0], "float32")
    assert_within_budget(
        *(np.where(nothing, 0, lse) for lse in (merged.lse, exact[1], plain[1])), "float32", logarithms=True
    )


def test_what_is_merged_is_the_attention_over_all_keys():
    random = np.random.default_rng(0)
    scores, values = 4 * random.standard_normal((6, 3, 50)), random.standard_normal((50, 16))
    parts = []
    for begin, end in [(0, 1), (1, 30), (30, 30), (30, 50)]:
        weights = np.exp(scores[..., begin:end])
        total = weights.sum(axis=-1)
        out = np.divide(
            weights @ values[begin:end], total[..., None], where=total[..., None] > 0, out=np.zeros((6, 3, 16))
        )
        with np.errstate(divide="ignore"):
            parts.append((out.astype(np.float32), np.log(total).astype(np.float32)))
    weights = np.exp(scores)
    exact = weights @ values / weights.sum(axis=-1, keepdims=True)
    merged = op.merge_attention(parts)
    # What each part has lost already, and then the merge.
    assert_within_budget(merged.out, exact, straightforward(parts, op.reference(parts))[0], "float32")


def test_a_nan_that_is_seen_stays_visible():
    parts = random_parts((5, 2, 8), 3, empty=0.0)
    parts[1][0][2, 1, 4] = np.nan
    parts[2][1][4, 0] = np.nan
    merged = op.merge_attention(parts)
    assert np.isnan(merged.out).sum() == 1 + 8 and np.isnan(merged.out[2, 1, 4]) and np.isnan(merged.out[4, 0]).all()
    assert np.isnan(merged.lse).sum() == 1


def test_rows_may_be_strided_and_bits_do_not_depend_on_threads():
    wide = random_parts((64, 6, 32), 3)
    strided = [(out[::2, 1:5], lse[::2, 1:5]) for out, lse in wide]
    packed = [(out.copy(), lse.copy()) for out, lse in strided]
    first = op.merge_attention(strided)
    assert np.array_equal(first.out, op.merge_attention(packed).out)
    assert np.array_equal(first.out[:1], op.merge_attention([(out[:1], lse[:1]) for out, lse in packed]).out)


def test_it_is_recorded():
    parts = random_parts((9, 4, 16), 3, empty=0.2)
    program = native.Program(native.Pool(2), native.Sizes(9, 1, 1))
    buffers = [tuple(Buffer(as_tensor(array, "part").follow("tokens"), program) for array in part) for part in parts]
    merged = op.merge_attention(buffers)
    program.keep(merged.out.tensor)
    program.finish()
    program.run(native.Sizes(5, 1, 1))
    alone = op.merge_attention([(out[:5], lse[:5]) for out, lse in parts])
    assert np.array_equal(merged.out.tensor.numpy()[:5], alone.out)


def test_torch_parts_come_back_as_torch():
    torch = pytest.importorskip("torch")
    parts = [(torch.randn(3, 2, 8).to(torch.bfloat16), torch.randn(3, 2)) for _ in range(2)]
    merged = op.merge_attention(parts)
    assert merged.out.dtype == torch.bfloat16 and merged.lse.dtype == torch.float32


GOOD = (np.ones((2, 3, 8), np.float32), np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    "parts,options,text",
    [
        ([], {}, "parts: expected one at least"),
        ([GOOD, 3], {}, r"parts\[1\]: expected an AttentionResult or \(out, lse\), got int"),
        ([GOOD, (GOOD[0], None)], {}, r"parts\[1\].lse: expected an array"),
        ([(GOOD[0], GOOD[1][:, :2])], {}, r"parts\[0\]: expected out \[..., heads, value_dim\]"),
        ([(GOOD[0][0], GOOD[1][0])], {}, r"parts\[0\]: expected out"),
        ([GOOD, (GOOD[0][:1], GOOD[1][:1])], {}, r"parts\[1\].out: expected float32 \[2, 3, 8\]"),
        ([GOOD, (GOOD[0], GOOD[1].astype(np.float64))], {}, r"parts\[1\].lse: expected float32"),
        ([GOOD, (GOOD[0].astype(np.int32), GOOD[1])], {}, r"parts\[1\].out: expected float32 or float16 or bfloat16"),
        ([GOOD, (GOOD[0].astype(np.float64), GOOD[1])], {}, r"parts\[0\].out: expected float64"),
        ([GOOD], {"out_dtype": "int8"}, "out_dtype: expected one of"),
        ([GOOD], {"out": GOOD}, "out: expected an AttentionResult, got tuple"),
        (
            [GOOD],
            {"out": AttentionResult(GOOD[0], np.broadcast_to(GOOD[1], (2, 3)))},
            "out.lse: expected an array that",
        ),
        ([GOOD], {"out": AttentionResult(GOOD[0][:1], GOOD[1])}, r"out: expected \[..., heads, value_dim\] beside"),
        ([GOOD], {"sinks": np.zeros(4, np.float32)}, r"sinks: expected \[3\]"),
        ([GOOD], {"sinks": np.zeros(3)}, "sinks: expected float32"),
        ([(np.ones((2, 3, 16), np.float32)[..., ::2], GOOD[1])], {}, "contiguous inner dimensions"),
    ],
)
def test_bad_parts_are_named(parts, options, text):
    with pytest.raises(ArgumentError, match=text):
        op.merge_attention(parts, **options)


def test_a_named_kernel_never_falls_back():
    with cpu.limit_isa("portable"), pytest.raises(KernelError, match="avx2"):
        op.merge_attention([GOOD], kernel="cpu_avx2")
