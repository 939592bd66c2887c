"""paged_attention: every kernel x every case x every cache type, inside the error budget; and ragged batches drawn."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.check import cases
from headrace.check.cases import PagedAttentionCase
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.pages import paged_batch
from headrace.errors import ArgumentError, UnsupportedError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import Buffer, as_tensor
from headrace.ops import paged_attention as op

KERNELS = [kernel.name for kernel in op.kernels()]
RAGGED = PagedAttentionCase("ragged", (1, 130, 0, 700, 90, 300), (1, 1, 0, 150, 90, 4), 12, 3, 72, page_size=16)


def options_of(case):
    return {"window": (case.window_left, None), "softcap": case.softcap}


def out_shape(case):
    return (sum(case.query_lens), case.heads, case.value_dim or case.head_dim)


def skip_unless_it_can_run(name):
    kernel = next(kernel for kernel in op.kernels() if kernel.name == name)
    reasons = kernel.why_not(None)
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))


def computed(case, batch, out_dtype="float32", **options):
    out = poisoned(out_shape(case), out_dtype)
    assert op.paged_attention(**batch, **options_of(case), out=out, **options) is out
    return out


def straightforward(batch, exact, **options):
    """A plain loop in float32: of each element the worst of five orders of summation, the keys' own among them.

    One order alone may be right by luck where a batch has few outputs, and no kernel sums in just that order.
    """
    worst = exact.astype(np.float32)
    random = np.random.default_rng(0)
    for shuffle in (np.arange, *[random.permutation] * 4):
        other = in_some_order(batch, shuffle, **options)
        worst = np.where(np.abs(other - exact) > np.abs(worst - exact), other, worst)
    return worst


def in_some_order(batch, shuffle, *, window=(None, None), softcap=None, scale=None):
    """The formula in float32, with keys, and the elements of queries and keys, in the order `shuffle(n)` gives."""
    query, group = batch["query"].astype(np.float32), batch["query"].shape[1] // batch["key_pages"].shape[2]
    elements = shuffle(query.shape[2])
    scale, cap = np.float32(query.shape[2] ** -0.5 if scale is None else scale), np.float32(softcap or 0)
    outs = [np.zeros((0, query.shape[1], batch["value_pages"].shape[3]), np.float32)]
    for pages, num_keys, (begin, end) in zip(
        batch["page_table"], batch["sequence_lens"], itertools.pairwise(batch["query_starts"]), strict=True
    ):
        order = shuffle(num_keys)
        keys, values = (op.gather(batch[name], pages, num_keys)[order] for name in ("key_pages", "value_pages"))
        keys, values = (np.repeat(array.astype(np.float32), group, axis=1) for array in (keys, values))
        scores = np.einsum("qhd,khd->hqk", query[begin:end, :, elements], keys[..., elements], optimize=True) * scale
        scores = cap * np.tanh(scores / cap) if softcap else scores
        seen = op.visible(end - begin, num_keys, window[0])[:, order]
        weights = np.stack([op.softmax(head, seen) for head in scores])
        total = np.zeros((end - begin, *values.shape[1:]), np.float32)
        for weight, value in zip(np.ascontiguousarray(weights.T), values, strict=True):
            total += weight[..., None] * value
        outs.append(total)
    return np.concatenate(outs)


@functools.lru_cache(maxsize=8)
def expected(case, dtype, query_dtype="float32", seed=0):
    """A batch, what is exact for it, and what a straightforward computation makes of it."""
    batch = paged_batch(case, dtype, query_dtype, seed)
    exact = op.reference(**batch, **options_of(case))
    return batch, exact, straightforward(batch, exact, **options_of(case))


def check(kernel, out_dtype, *batch_arguments):
    batch, exact, plain = expected(*batch_arguments)
    out = computed(batch_arguments[0], batch, out_dtype, kernel=kernel)
    assert_within_budget(out, exact, rounded(plain, out_dtype), out_dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", op.DTYPES)
@pytest.mark.parametrize("case", cases.PAGED_ATTENTION, ids=lambda case: case.name)
def test_kernel_is_within_budget(kernel, case, dtype):
    skip_unless_it_can_run(kernel)
    check(kernel, "float32", case, dtype)


@pytest.mark.parametrize("query_dtype,out_dtype", list(itertools.product(op.DTYPES, op.DTYPES)))
def test_queries_and_outputs_have_types_of_their_own(query_dtype, out_dtype):
    check(None, out_dtype, RAGGED, "float16", query_dtype)


@st.composite
def ragged_cases(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 7, 16]))
    requests = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 70)), min_size=1, max_size=5))
    return PagedAttentionCase(
        "drawn",
        tuple(keys for keys, _ in requests),
        tuple(queries for _, queries in requests),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
        page_size=draw(st.integers(1, 70)),
        window_left=draw(st.none() | st.integers(0, 200)),
        softcap=draw(st.none() | st.floats(1, 60)),
    )


@settings(max_examples=40, deadline=None)
@given(
    case=ragged_cases(), dtype=st.sampled_from(op.DTYPES), seed=st.integers(0, 2**31), kernel=st.sampled_from(KERNELS)
)
def test_any_ragged_batch_is_within_budget(case, dtype, seed, kernel):
    if cpu.ISAS.index(kernel.removeprefix("cpu_")) > cpu.ISAS.index(cpu.isa()):
        return
    check(kernel, "float32", case, dtype, "float32", seed)


def recorded(case, batch, threads, spare=0):
    """The op as a program of that many threads replays it, recorded with room for `spare` more tokens and requests."""
    requests, tokens = len(case.sequence_lens), sum(case.query_lens)
    sizes = native.Sizes(tokens + spare, requests + spare, 1)
    program = native.Program(native.Pool(threads), sizes)
    kinds = {"query": "tokens", "page_table": "requests", "sequence_lens": "requests"}

    def buffer(name, array):
        rows = requests + 1 if name == "query_starts" else len(array)
        padded = np.full((rows + spare * (name in kinds or name == "query_starts"), *array.shape[1:]), -1, array.dtype)
        padded[:rows] = array
        kept.append(padded)
        tensor = as_tensor(padded, name)
        return Buffer(tensor.follow(kinds[name]) if name in kinds else tensor, program)

    kept = []
    arrays = {name: buffer(name, array) for name, array in batch.items()}
    out = poisoned((tokens + spare, *out_shape(case)[1:]), "float32")
    op.paged_attention(**arrays, **options_of(case), out=Buffer(as_tensor(out, "out").follow("tokens"), program))
    program.finish()
    program.run(native.Sizes(tokens, requests, 1))
    assert np.isnan(out[tokens:]).all()
    return out[:tokens]


@pytest.mark.parametrize("window_left", [None, 100])
def test_bits_do_not_depend_on_threads_or_recording(window_left):
    case = dataclasses.replace(RAGGED, window_left=window_left)
    batch = paged_batch(case, "float16")
    alone = recorded(case, batch, 1)
    assert np.array_equal(alone, recorded(case, batch, 2))
    assert np.array_equal(alone, recorded(case, batch, 5, spare=3))
    assert np.array_equal(alone, computed(case, batch))


def test_bits_do_not_depend_on_neighbours():
    batch = paged_batch(RAGGED, "bfloat16")
    together = computed(RAGGED, batch)
    starts = batch["query_starts"]
    for r, (begin, end) in enumerate(itertools.pairwise(starts)):
        alone = dict(batch, query=batch["query"][begin:end], query_starts=np.array([0, end - begin], np.int32))
        alone |= {name: batch[name][r : r + 1] for name in ("page_table", "sequence_lens")}
        assert np.array_equal(op.paged_attention(**alone), together[begin:end])


def test_bits_do_not_depend_on_how_a_prompt_is_chunked():
    case = PagedAttentionCase("prompt", (300,), (300,), 8, 2, 64, page_size=32)
    batch = paged_batch(case, "float16")
    whole = computed(case, batch)
    for begin, end in [(0, 100), (100, 137), (137, 300)]:
        part = dict(batch, query=batch["query"][begin:end], sequence_lens=np.array([end], np.int32))
        part["query_starts"] = np.array([0, end - begin], np.int32)
        assert np.array_equal(op.paged_attention(**part), whole[begin:end])


def test_pages_may_be_strided():
    case = PagedAttentionCase("strided", (100, 40), (1, 40), page_size=8)
    batch = paged_batch(case, "float16")
    both = np.stack([batch["key_pages"], batch["value_pages"]], axis=1)
    strided = dict(batch, key_pages=both[:, 0], value_pages=both[:, 1])
    assert np.array_equal(computed(case, strided), computed(case, batch))


def test_a_nan_that_is_seen_stays_visible():
    batch = paged_batch(RAGGED, "float32")
    batch["query"][0, 0, 0] = batch["query"][-1, 1, 3] = np.nan
    out = computed(RAGGED, batch)
    assert np.isnan(out[0, 0]).all() and np.isnan(out[-1, 1]).all()
    assert np.isnan(out).sum() == 2 * out.shape[2]


def test_a_scale_is_taken():
    batch = paged_batch(RAGGED, "float32")
    exact = op.reference(**batch, scale=0.7)
    out = op.paged_attention(**batch, scale=0.7)
    assert_within_budget(out, exact, straightforward(batch, exact, scale=0.7), "float32")


def changed(batch, name, index, value):
    array = batch[name].copy()
    array[index] = value
    return dict(batch, **{name: array})


@pytest.mark.parametrize(
    "name,index,value,text",
    [
        ("page_table", (3, 20), 10**6, "page_table: expected 0 to"),
        ("page_table", (3, 20), -1, "at [3, 20]"),
        ("sequence_lens", 1, -1, "sequence_lens: expected 0 to"),
        ("sequence_lens", 1, 2**31 - 1, "for request 1"),
        ("query_starts", 0, 1, "query_starts: expected to begin with 0"),
        ("query_starts", 6, 200, "query_starts"),
        ("query_starts", 2, -5, "query_starts: expected whole numbers that never fall"),
        ("query_starts", 3, 2**31 - 1, "query_starts: expected whole numbers that never fall"),
    ],
)
def test_contents_out_of_range_are_named(name, index, value, text):
    with pytest.raises(ArgumentError) as caught:
        computed(RAGGED, changed(paged_batch(RAGGED, "float16"), name, index, value))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "arrays,options,text",
    [
        ({"query": np.zeros((4, 64), np.float32)}, {}, "query: expected [tokens, heads, head_dim]"),
        ({"query": np.zeros((246, 10, 72), np.float32)}, {}, "query: expected a multiple of 3 heads"),
        ({"query": np.zeros((246, 12, 72))}, {}, "query: expected float32 or float16 or bfloat16"),
        ({"query": np.zeros((246, 12, 64), np.float32)}, {}, "key_pages: expected [any, any, any, 64]"),
        ({"key_pages": np.zeros((5, 16, 3, 72), np.float32)}, {}, "value_pages: expected [5, 16, 3, any]"),
        ({"page_table": np.zeros((6, 4), np.int64)}, {}, "page_table: expected int32"),
        ({"page_table": np.zeros((5, 4), np.int32)}, {}, "page_table: expected [6, any]"),
        ({"query_starts": np.zeros(6, np.int32)}, {}, "query_starts: expected [7]"),
        ({"sequence_lens": None}, {}, "sequence_lens: expected an array"),
        ({}, {"window": (5, 1)}, "window: expected (left, None)"),
        ({}, {"window": (-2, None)}, "window: expected (left, None)"),
        ({}, {"window": 7}, "window: expected (left, None)"),
        ({}, {"scale": float("nan")}, "scale: expected a finite number > 0"),
        ({}, {"softcap": -1.0}, "softcap: expected a finite number > 0"),
        ({}, {"out": np.zeros((246, 12, 71), np.float32)}, "out: expected [246, 12, 72]"),
    ],
)
def test_bad_arguments_are_named(arrays, options, text):
    with pytest.raises(ArgumentError) as caught:
        op.paged_attention(**(paged_batch(RAGGED, "float16") | arrays), **options)
    assert text in str(caught.value)


def test_what_is_not_done_is_said():
    with pytest.raises(UnsupportedError, match="only causal"):
        op.paged_attention(**paged_batch(RAGGED, "float16"), causal=False)
