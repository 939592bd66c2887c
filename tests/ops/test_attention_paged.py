"""paged_attention: bits that depend on nothing but the sequence, strided pages, recorded programs, mistakes named."""

import dataclasses
import itertools

import numpy as np
import pytest

from headrace.check.attention_batch import attention_batch, straightforward
from headrace.check.attention_cases import ATTENTION, heads, paged
from headrace.check.attention_expected import assert_close, computed, poisoned_like, why_not
from headrace.check.compare import poisoned
from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor
from headrace.ops import attention_paged as op
from headrace.ops import attention_request

RAGGED = paged("ragged", (1, 1, 0, 150, 90, 4), (1, 130, 0, 700, 90, 300), **heads(12, 3, 72))
CASES = {case.name: case for case in ATTENTION}
TYPES = [("float32", "float16"), ("bfloat16", "bfloat16"), ("float32", "int8"), ("float32", "uint8")]


@pytest.fixture(autouse=True, scope="module")
def poison():
    """What a kernel does not write of out and lse stays visible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_request, "empty_like", poisoned_like)
        yield


def batch_of(case, query_dtype="float32", dtype="float16", **options):
    if dtype in ("int8", "uint8"):
        case = dataclasses.replace(case, kv_format=dtype, scales="token")
    return attention_batch(case, dtype, query_dtype) | options


def assert_same(one, other):
    assert np.array_equal(one.out, other.out) and np.array_equal(one.lse, other.lse)


# Programs

KINDS = {"query": "tokens", "page_table": "requests", "sequence_lens": "requests"}


def recorded(batch, threads, spare=0):
    """The op as a program of that many threads replays it, recorded with room for `spare` more tokens and requests."""
    tokens, requests = len(batch["query"]), len(batch["sequence_lens"])
    program = native.Program(native.Pool(threads), native.Sizes(tokens + spare, requests + spare, 1))
    kept = []

    def buffer(name, array):
        more = spare if name in KINDS or name == "query_starts" else 0
        padded = np.concatenate([array, np.full((more, *array.shape[1:]), -1, array.dtype)])
        kept.append(padded)
        tensor = as_tensor(padded, name)
        return Buffer(tensor.follow(KINDS[name]) if name in KINDS else tensor, program)

    of_pages = ("sinks", "alibi_slopes", "key_scales", "value_scales", "mask")
    arrays = {
        name: buffer(name, array) if isinstance(array, np.ndarray) and name not in of_pages else array
        for name, array in batch.items()
    }
    out = poisoned((tokens + spare, batch["query"].shape[1], batch["value_pages"].shape[3]), "float32")
    op.paged_attention(**arrays, out=Buffer(as_tensor(out, "out").follow("tokens"), program))
    program.finish()
    program.run(native.Sizes(tokens, requests, 1))
    assert np.isnan(out[tokens:]).all()
    return out[:tokens]


@pytest.mark.parametrize("left", [None, 100])
def test_deterministic_bits_do_not_depend_on_threads_or_recording(left):
    batch = batch_of(RAGGED, deterministic=True, window=(left, None))
    alone = recorded(batch, 1)
    assert np.array_equal(alone, recorded(batch, 2))
    assert np.array_equal(alone, recorded(batch, 5, spare=3))
    assert np.array_equal(alone, computed(RAGGED, batch).out)


@pytest.mark.parametrize("name", ["decode_everything", "tree_of_drafts"])
def test_a_program_gives_the_bits_of_the_call(name):
    batch = batch_of(CASES[name], deterministic=True)
    assert np.array_equal(recorded(batch, 2), computed(CASES[name], batch).out)


# Bits


def alone(batch, r):
    """One request of a batch as a batch of its own."""
    begin, end = batch["query_starts"][r : r + 2]
    own = {"query": batch["query"][begin:end], "query_starts": np.array([0, end - begin], np.int32)}
    return batch | own | {name: batch[name][r : r + 1] for name in ("page_table", "sequence_lens")}


@pytest.mark.parametrize("query_dtype,dtype", TYPES)
@pytest.mark.parametrize("window,softcap", [((None, None), None), ((70, None), 20.0)])
def test_deterministic_bits_do_not_depend_on_neighbours(query_dtype, dtype, window, softcap):
    batch = batch_of(RAGGED, query_dtype, dtype, deterministic=True, window=window, softcap=softcap)
    together = op.paged_attention(**batch)
    for r, (begin, end) in enumerate(itertools.pairwise(batch["query_starts"])):
        own = op.paged_attention(**alone(batch, r))
        assert np.array_equal(own.out, together.out[begin:end]) and np.array_equal(own.lse, together.lse[begin:end])


def part_of(batch, begin, end):
    """Tokens begin .. end of a lone prompt, appended when those before are there and those after are not."""
    starts = {"query_starts": np.array([0, end - begin], np.int32), "sequence_lens": np.array([end], np.int32)}
    return batch | starts | {"query": batch["query"][begin:end]}


@pytest.mark.parametrize(
    "kernel", [kernel.name for kernel in op.kernels() if kernel.name != "cpu_float64" and "cpu" in kernel.devices]
)
@pytest.mark.parametrize("query_dtype,dtype", TYPES)
@pytest.mark.parametrize("group,window", [(1, (None, None)), (4, (None, None)), (7, (100, None))])
def test_deterministic_bits_do_not_depend_on_how_a_prompt_is_chunked(kernel, query_dtype, dtype, group, window):
    case = paged("prompt", (140,), (140,), **heads(2 * group, 2, 64), page_size=32)
    batch = batch_of(case, query_dtype, dtype, deterministic=True, window=window)
    if reasons := why_not(kernel, batch):
        pytest.skip("; ".join(map(str, reasons)))
    batch["kernel"] = kernel
    whole = op.paged_attention(**batch)
    for step in (1, 3, 37, 64):
        for begin in range(0, 140, step):
            end = min(begin + step, 140)
            part = op.paged_attention(**part_of(batch, begin, end))
            assert np.array_equal(part.out, whole.out[begin:end]), (begin, end)
            assert np.array_equal(part.lse, whole.lse[begin:end]), (begin, end)


def test_a_long_prompt_ends_in_the_same_bits_however_it_is_chunked():
    case = paged("long", (1300,), (1300,), **heads(4, 1, 32), page_size=64)
    batch = batch_of(case, deterministic=True)
    whole = op.paged_attention(**batch)
    for begin, end in [(0, 511), (511, 513), (513, 1299), (1299, 1300)]:
        assert np.array_equal(op.paged_attention(**part_of(batch, begin, end)).out, whole.out[begin:end])


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_call_gives_the_same_bits(deterministic):
    batch = batch_of(RAGGED, deterministic=deterministic)
    assert_same(computed(RAGGED, batch), computed(RAGGED, batch))


# Arrays


def test_pages_may_be_strided():
    batch = batch_of(RAGGED)
    both = np.stack([batch["key_pages"], batch["value_pages"]], axis=1)
    heads_first = np.ascontiguousarray(both.transpose(0, 1, 3, 2, 4)).transpose(0, 1, 3, 2, 4)
    for pair in (both, heads_first):
        strided = batch | {"key_pages": pair[:, 0], "value_pages": pair[:, 1]}
        assert_same(computed(RAGGED, strided), computed(RAGGED, batch))


def test_a_mask_may_have_fewer_columns_than_keys():
    batch = batch_of(RAGGED)
    mask = np.random.default_rng(0).random((len(batch["query"]), 41)) < 0.5
    batch |= {"mask": mask}
    exact = op.reference(**batch)
    assert_close(computed(RAGGED, batch), exact, straightforward(RAGGED, batch, exact))


def test_what_is_masked_is_as_if_it_were_not_there():
    case = paged("drafts", (3,), (70,), causal=False)
    batch = batch_of(case)
    batch["mask"] = np.tril(np.ones((3, 3), bool))
    assert_same(computed(case, batch), computed(case, batch | {"mask": None, "causal": True}))


# Mistakes


def changed(batch, name, index, value):
    array = batch[name].copy()
    array[index] = value
    return batch | {name: array}


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
        computed(RAGGED, changed(batch_of(RAGGED), name, index, value))
    assert text in str(caught.value)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


MISTAKES = [
    ({"query": zeros(4, 64)}, "query: expected [tokens, heads, head_dim]"),
    ({"query": zeros(246, 10, 72)}, "query: expected a multiple of 3 heads, those of key_pages"),
    ({"query": zeros(246, 12, 72, dtype=np.int32)}, "query: expected float32 or float16 or bfloat16"),
    ({"query": zeros(246, 12, 64)}, "key_pages: expected the query's head_dim 64"),
    ({"key_pages": zeros(5, 16, 3, 72)}, "value_pages: expected"),
    ({"key_pages": zeros(5, 16, 72)}, "key_pages: expected [pages, page_size, kv_heads, head_dim]"),
    ({"page_table": zeros(6, 4, dtype=np.int64)}, "page_table: expected int32"),
    ({"page_table": zeros(5, 4, dtype=np.int32)}, "page_table: expected [6, max_pages]"),
    ({"query_starts": zeros(6, dtype=np.int32)}, "query_starts: expected [7]"),
    ({"query_starts": None}, "query_starts: expected an array"),
    ({"sequence_lens": None}, "sequence_lens: expected an array"),
    ({"sequence_lens": zeros(6)}, "sequence_lens: expected int32"),
    ({"key_scales": zeros(5, 16, 3)}, "key_scales: expected None with float16"),
    ({"alibi_slopes": zeros(5, 12)}, "alibi_slopes: expected [12] or [6, 12]"),
    ({"mask": zeros(245, 9, dtype=bool)}, "mask: expected [12 or 1, 246 or 1, columns]"),
    ({"window": (-2, None)}, "window: expected whole numbers"),
    ({"scale": float("nan")}, "scale: expected a finite number > 0"),
    ({"softcap": -1.0}, "softcap: expected a finite number > 0"),
    ({"out": zeros(246, 12, 71)}, "out: expected [246, 12, 72]"),
]


@pytest.mark.parametrize("changes,text", MISTAKES)
def test_mistakes_are_named(changes, text):
    with pytest.raises(ArgumentError) as caught:
        op.paged_attention(**batch_of(RAGGED) | changes)
    assert text in str(caught.value)


def test_scales_of_pages_have_one_of_two_shapes():
    batch = attention_batch(CASES["int8_page_scales"])
    for shape in [(batch["key_pages"].shape[0], 2, 2), (1, 1, 2)]:
        with pytest.raises(ArgumentError, match="key_scales: expected"):
            op.paged_attention(**batch | {"key_scales": zeros(*shape)})
