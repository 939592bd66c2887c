"""Attention, dense, ragged and paged: every kernel x every case x every type inside its budget; mistakes named."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.check.attention_batch import attention_batch, op_of, straightforward
from headrace.check.attention_cases import ATTENTION, AttentionCase, heads, paged
from headrace.check.attention_expected import (
    assert_close,
    assert_kernel_holds,
    computed,
    poisoned_like,
    why_not,
)
from headrace.ops import attention_dense as op
from headrace.ops import attention_request

KERNELS = [kernel.name for kernel in op.kernels() if kernel.name != "cpu_float64" and "cpu" in kernel.devices]
FLOATS = ("float32", "float16", "bfloat16")
TYPES = [("float32", "float32"), ("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
SMALL = paged("small", (1, 20, 4), (40, 20, 90), **heads(6, 2, 33, 31), window=(50, None), softcap=9.0)
CASES = {case.name: case for case in ATTENTION}


@pytest.fixture(autouse=True, scope="module")
def poison():
    """What a kernel does not write of out and lse stays visible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_request, "empty_like", poisoned_like)
        yield


def skip_unless_it_can_run(kernel, batch):
    reasons = why_not(kernel, batch)
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("query_dtype,dtype", TYPES)
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_kernel_is_within_budget(kernel, case, query_dtype, dtype):
    if case.kv_format and query_dtype != dtype:
        pytest.skip("the case has a type of its own")
    skip_unless_it_can_run(kernel, attention_batch(case, dtype, query_dtype))
    assert_kernel_holds(case, kernel, dtype, query_dtype)


@pytest.mark.parametrize("case", [case for case in ATTENTION if not case.kv_format], ids=lambda case: case.name)
@pytest.mark.costly
def test_float64_is_exact(case):
    assert_kernel_holds(case, "cpu_float64", "float64", "float64", out_dtype="float64")


def test_float64_is_for_one_kernel():
    doubles = attention_batch(CASES["dense_self"], "float64", "float64")
    assert [name for name in KERNELS if not why_not(name, doubles)] == []
    assert why_not("cpu_float64", attention_batch(CASES["dense_self"]))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", ATTENTION[::4], ids=lambda case: case.name)
def test_fast_may_use_bfloat16_products(kernel, case, dtype):
    skip_unless_it_can_run(kernel, attention_batch(case, dtype) | {"precision": "fast"})
    assert_kernel_holds(case, kernel, dtype, precision="fast")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ATTENTION[1::4], ids=lambda case: case.name)
def test_batch_invariant_schedule_is_within_budget(kernel, case):
    skip_unless_it_can_run(kernel, attention_batch(case, "bfloat16", "bfloat16"))
    assert_kernel_holds(case, kernel, "bfloat16", "bfloat16", deterministic=True)


@st.composite
def drawn_cases(draw):
    layout = draw(st.sampled_from(["paged", "ragged", "dense"]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 7, 16]))
    lens = st.tuples(st.integers(0, 300), st.integers(0, 70))
    requests = draw(st.lists(lens, min_size=1, max_size=4))
    if layout == "dense":
        requests = requests[:1] * draw(st.integers(1, 3))
    kv_format = draw(st.sampled_from(["", "", "int8", "uint8", "float8_e4m3fn"]))
    even = 2 if kv_format == "uint8" else 1
    some = st.sampled_from([None, None, 0, 7, 150])
    return AttentionCase(
        "drawn",
        layout,
        tuple(queries for _, queries in requests),
        tuple(keys for keys, _ in requests),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=even * draw(st.integers(1, 40)),
        value_dim=even * draw(st.integers(1, 40)),
        page_size=draw(st.integers(1, 70)),
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        window=(draw(some), draw(some)),
        softcap=draw(st.none() | st.floats(1, 60)),
        mask=draw(st.sampled_from(["", "", "bool", "float"])),
        mask_heads=draw(st.sampled_from([1, kv_heads * group])),
        sinks=draw(st.booleans()),
        alibi=draw(st.sampled_from(["", "heads", "requests"])),
        kv_format=kv_format,
        scales="token" if kv_format in ("int8", "uint8") else "",
    )


@settings(max_examples=150, deadline=None)
@given(
    case=drawn_cases(),
    dtypes=st.sampled_from(TYPES),
    kernel=st.sampled_from(KERNELS),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_anything_drawn_is_within_budget(case, dtypes, kernel, deterministic, seed):
    query_dtype, dtype = dtypes
    if not why_not(kernel, attention_batch(case, dtype, query_dtype, seed)):
        assert_kernel_holds(case, kernel, dtype, query_dtype, seed=seed, deterministic=deterministic)


# Arrays of other libraries, and types of results


def as_torch(batch):
    return {name: tensor_of(array) if isinstance(array, np.ndarray) else array for name, array in batch.items()}


def tensor_of(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


@pytest.mark.parametrize(
    "name",
    ["mixture", "decode_float8", "int8_page_scales", "ragged_everything", "dense_heads_first", "dense_mask_documents"],
)
def test_torch_tensors_give_the_same_bits(name):
    batch = attention_batch(CASES[name], "bfloat16", "bfloat16")
    function = op_of(CASES[name])
    ours, theirs = function(**batch), function(**as_torch(batch))
    assert isinstance(theirs.out, torch.Tensor) and theirs.out.dtype == torch.bfloat16
    assert np.array_equal(theirs.out.float().numpy(), ours.out.astype(np.float32))
    assert np.array_equal(theirs.lse.numpy(), ours.lse)


def test_results_are_of_the_querys_type_unless_said():
    batch = attention_batch(CASES["dense_self"], "float16", "float16")
    assert op.attention(**batch).out.dtype == np.float16
    wide = op.attention(**batch, out_dtype="float32")
    assert wide.out.dtype == np.float32 and wide.lse.dtype == np.float32
    assert op.attention(**attention_batch(CASES["dense_self"], "float64", "float64")).lse.dtype == np.float64


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("query_dtype,dtype,out_dtype", list(itertools.product(FLOATS, repeat=3)))
def test_queries_keys_and_outputs_have_types_of_their_own(kernel, query_dtype, dtype, out_dtype):
    skip_unless_it_can_run(kernel, attention_batch(SMALL, dtype, query_dtype))
    assert_kernel_holds(SMALL, kernel, dtype, query_dtype, out_dtype=out_dtype)


@pytest.mark.parametrize("name", ["mixture", "ragged_cross", "dense_cross"])
def test_a_nan_that_is_seen_stays_visible(name):
    batch = attention_batch(CASES[name])
    rows = batch["query"].reshape(-1, *batch["query"].shape[-2:])
    rows[0, 0, 0] = rows[-1, 1, 3] = np.nan
    got = computed(CASES[name], batch)
    out, lse = got.out.reshape(-1, *got.out.shape[-2:]), got.lse.reshape(-1, got.lse.shape[-1])
    assert np.isnan(out[0, 0]).all() and np.isnan(out[-1, 1]).all()
    assert np.isnan(out).sum() == 2 * out.shape[2]
    assert list(zip(*np.nonzero(np.isnan(lse)), strict=True)) == [(0, 0), (len(lse) - 1, 1)]


def test_key_ranges_may_overlap_and_leave_keys_out():
    batch = attention_batch(CASES["ragged_self"])
    batch |= {"key_starts": np.array([5, 0, 30, 5], np.int32), "key_lens": np.array([60, 0, 7, 90], np.int32)}
    exact = op.reference(**batch)
    got = op.attention(**batch)
    assert_close(got, exact, straightforward(CASES["ragged_self"], batch, exact))


def test_keys_lie_where_queries_do_unless_said():
    batch = attention_batch(CASES["ragged_self"])
    said, unsaid = op.attention(**batch), op.attention(**{k: v for k, v in batch.items() if k != "key_starts"})
    assert np.array_equal(said.out, unsaid.out)


# Bits


def parts_of(batch, rows):
    """A dense batch's elements, as calls of their own."""
    per_element = [
        name for name in ("query", "key", "value", "key_scales", "value_scales", "key_lens") if name in batch
    ]
    for b in rows:
        yield b, batch | {name: batch[name][b : b + 1] for name in per_element}


@pytest.mark.parametrize("name", ["mixture", "prefill", "ragged_cross", "dense_cross", "dense_decode", "decode_long"])
def test_the_same_call_gives_the_same_bits(name):
    batch = attention_batch(CASES[name], "bfloat16", "bfloat16")
    first, second = computed(CASES[name], batch), computed(CASES[name], batch)
    assert np.array_equal(first.out, second.out) and np.array_equal(first.lse, second.lse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dense_cross", "dense_key_lens_causal", "dense_heads_first_decode", "dense_int4"])
def test_deterministic_bits_do_not_depend_on_the_batch(name, dtype):
    batch = attention_batch(CASES[name], dtype, "float32") | {"deterministic": True}
    together = op.attention(**batch)
    for b, alone in parts_of(batch, range(len(batch["query"]))):
        assert np.array_equal(op.attention(**alone).out[0], together.out[b])


def test_deterministic_bits_do_not_depend_on_the_layout():
    batch = attention_batch(CASES["ragged_self"], "bfloat16") | {"deterministic": True}
    together, starts = op.attention(**batch), batch["query_starts"]
    for begin, end in itertools.pairwise(starts):
        own = {name: batch[name][None, begin:end] for name in ("query", "key", "value")}
        alone = op.attention(**own, causal=True, deterministic=True)
        assert np.array_equal(alone.out[0], together.out[begin:end])
        assert np.array_equal(alone.lse[0], together.lse[begin:end])


# Masks that are something else

AS_RANGES = ("dense_mask_prefix", "dense_mask_padded", "dense_mask_padded_decode")


@pytest.mark.parametrize(
    "name,text,kept",
    [
        ("dense_mask_all", "no mask", {}),
        ("dense_mask_causal", "causal", {"causal": True}),
        ("dense_mask_window", "a window", {"window": (9, 4)}),
        ("dense_mask_prefix", "a prefix", {}),
        ("dense_mask_documents", "documents", {}),
        ("dense_mask_padded", "causal", {}),
        ("dense_mask_padded_decode", "one range", {}),
        ("dense_mask_tree", "a tree", {}),
        ("dense_bool_mask", "no structure", {}),
    ],
)
def test_a_dense_mask_is_recognised(name, text, kept):
    batch = attention_batch(CASES[name])
    call = op.prepared(**batch)
    found = op.parts(call, attention_request.outputs(call, None, None))
    for part, place in found:
        assert text in part.mask_text and place.out.shape[:-1] == part.arrays["query"].shape[:-1]
        assert {option: getattr(part.options, option) for option in kept} == kept
        assert ("mask" in part.arrays) == (name in ("dense_mask_tree", "dense_bool_mask"))
        assert ("first_keys" in part.arrays) == (name in AS_RANGES)
        assert text in str(part.request().options["mask"])
    assert len(found) == (2 if name == "dense_mask_documents" else 1)


def test_documents_cost_what_they_see():
    batch = attention_batch(CASES["dense_mask_documents"])
    call = op.prepared(**batch)
    flops = sum(part.request().traffic.flops for part, _ in op.parts(call, attention_request.outputs(call, None, None)))
    assert flops < 0.5 * op.prepared(**batch | {"mask": None}).request().traffic.flops


def test_a_mask_that_holds_for_all_is_broadcast():
    batch = attention_batch(CASES["dense_bool_mask"])
    row = np.arange(50) % 3 > 0
    whole = op.attention(**batch | {"mask": np.broadcast_to(row, (2, 6, 33, 50))})
    for mask in (row[None], row[None, None], row[None, None, None], np.broadcast_to(row, (6, 33, 50))):
        assert np.array_equal(op.attention(**batch | {"mask": mask}).out, whole.out)
