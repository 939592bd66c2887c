"""append_pages: rotation inside the budget, codes and scales the reference's, and nothing written anywhere else.

What is neither normalized nor rotated is held to the reference bit for bit. What is comes from float32 arithmetic, with
an error inside the budget of compare.py: its code must be one that a number that near to the exact one may have.
"""

import itertools

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.appended import (
    STORES,
    assert_codes_may_be,
    assert_same,
    codes_of,
    make_pages,
    rotated_in_float32,
    untouched_value,
    written,
)
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.config import RopeConfig
from headrace.errors import ArgumentError
from headrace.kernels.arrays import Buffer
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import program_input
from headrace.ops import norm, rope
from headrace.ops import page_append as op
from headrace.ops.kv_formats import FORMATS, dequantize, quantize
from headrace.ops.page_append import append_pages, head_reference, spread_reference

KERNELS = [kernel for kernel in op.kernels() if "cpu" in kernel.devices]
STYLES = list(itertools.product([True, False], [True, False]))
EPS = 1e-5

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
every_case = pytest.mark.parametrize("case", cases.APPEND, ids=lambda case: case.name)
every_store = pytest.mark.parametrize("store", STORES, ids="-".join)


def skip_unless_able(kernel):
    reasons = kernel.why_not(op.request({}, {}))
    if reasons:
        pytest.skip("; ".join(str(reason) for reason in reasons))


def call_arrays(case, store=("float16", ""), dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    num_pages = case.tokens // case.page_size + 2
    shape = (num_pages, case.page_size, case.kv_heads)

    def values(heads, dim):
        spread = np.exp(random.uniform(-6, 2, (case.tokens, heads, 1)))
        return rounded(spread * random.standard_normal((case.tokens, heads, dim)), dtype)

    positions = random.integers(0, 5000, case.tokens).astype(np.int32)
    frequencies = rope.inverse_frequencies(RopeConfig(rotary_dim=case.rotary_dim))
    key_pages, key_scales = make_pages(shape, case.head_dim, store)
    value_pages, value_scales = make_pages(shape, case.value_dim, store)
    return {
        "query": values(case.heads, case.head_dim),
        "key": values(case.kv_heads, case.head_dim),
        "value": values(case.kv_heads, case.value_dim),
        "key_pages": key_pages,
        "value_pages": value_pages,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "slots": random.permutation(num_pages * case.page_size)[: case.tokens].astype(np.int32),
        "table": rope.table_reference(positions, frequencies).astype(np.float32),
    }


def before(arrays):
    """The same arrays, and copies of all that is written to."""
    return {name: None if array is None else array.copy() for name, array in arrays.items()}


def written_keys(arrays):
    """Codes, scales, and whether those are of pages."""
    return written(arrays["key_pages"], arrays["key_scales"], arrays["slots"])


def assert_untouched(arrays, copies):
    """Pages, their padding, and scales are what they were wherever no slot is."""
    for which in ("key", "value"):
        pages = arrays[f"{which}_pages"]
        mask = np.ones(pages.shape[0] * pages.shape[1], bool)
        mask[arrays["slots"]] = False
        mask = mask.reshape(pages.shape[:2])
        assert_same(pages[mask], copies[f"{which}_pages"][mask])
        wide = pages.base
        inside = np.zeros(wide.shape, bool)
        inside[..., 1 : pages.shape[3] + 1] = True
        kept = untouched_value(str(wide.dtype))
        outside = wide[~inside].astype(np.float64)
        assert np.array_equal(outside, np.full(outside.shape, kept, np.float64), equal_nan=True)
        scales = arrays[f"{which}_scales"]
        if scales is not None and scales.shape[1] == pages.shape[1]:
            assert np.isnan(scales[mask]).all()
        elif scales is not None:
            assert_same(scales, copies[f"{which}_scales"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@every_store
@every_case
@every_kernel
def test_what_is_not_rotated_is_the_reference_bit_for_bit(kernel, case, store, dtype):
    skip_unless_able(kernel)
    arrays = call_arrays(case, store, dtype)
    del arrays["query"], arrays["table"]
    copies = before(arrays)
    assert append_pages(**arrays, kernel=kernel.name) is None
    for which in ("key", "value"):
        rows = arrays[which].astype(np.float32)
        pages, scales = op.reference(rows, copies[f"{which}_pages"], arrays["slots"], copies[f"{which}_scales"])
        assert_same(arrays[f"{which}_pages"], pages)
        assert_same(arrays[f"{which}_scales"], scales)
    assert_untouched(arrays, copies)


@pytest.mark.parametrize("interleaved,normed", STYLES, ids=lambda flag: str(flag))
@every_store
@every_case
@every_kernel
def test_rotated_rows_are_within_budget(kernel, case, store, interleaved, normed):
    skip_unless_able(kernel)
    arrays = call_arrays(case, store)
    copies = before(arrays)
    weights = np.random.default_rng(1).standard_normal((2, case.head_dim)).astype(np.float32)
    query_norm, key_norm = weights if normed else (None, None)
    options = {"query_norm": query_norm, "key_norm": key_norm, "interleaved": interleaved, "eps": EPS}
    out = poisoned(arrays["query"].shape, "float32")
    assert append_pages(**arrays, **options, out=out, kernel=kernel.name) is out
    style = (arrays["table"], interleaved)
    exact = head_reference(arrays["query"], *style, query_norm, EPS)
    assert_within_budget(out, exact, rotated_in_float32(arrays["query"], *style, query_norm, EPS), "float32")
    exact = head_reference(arrays["key"], *style, key_norm, EPS)
    plain = rotated_in_float32(arrays["key"], *style, key_norm, EPS)
    stored = written_keys(arrays)
    if FORMATS[store[0]].largest:
        assert_codes_may_be(stored, store[0], exact, plain)
    else:
        assert_within_budget(stored[0], exact, rounded(plain, store[0]), store[0])
    assert_untouched(arrays, copies)


@pytest.mark.parametrize("store", [("float32", ""), ("float8_e4m3fn", ""), ("int8", "token")], ids="-".join)
@every_case
@every_kernel
def test_queries_and_keys_are_spread_and_values_are_not(kernel, case, store):
    skip_unless_able(kernel)
    arrays = call_arrays(case, store)
    copies = before(arrays)
    append_pages(**arrays, spread=True, kernel=kernel.name)
    style = (arrays["table"], True)
    exact = head_reference(copies["query"], *style, spread=True)
    plain = spread_reference(rotated_in_float32(copies["query"], *style, None, EPS))
    assert plain.dtype == np.float32
    assert_within_budget(arrays["query"], exact, plain, "float32")
    exact = head_reference(arrays["key"], *style, spread=True)
    plain = spread_reference(rotated_in_float32(arrays["key"], *style, None, EPS))
    if FORMATS[store[0]].largest:
        assert_codes_may_be(written_keys(arrays), store[0], exact, plain)
    else:
        assert_within_budget(written_keys(arrays)[0], exact, plain, "float32")
    pages, _ = op.reference(arrays["value"], copies["value_pages"], arrays["slots"], copies["value_scales"])
    assert_same(arrays["value_pages"], pages)
    assert_untouched(arrays, copies)


@pytest.mark.parametrize("dim", [1, 6, 12, 15, 64, 96, 128])
def test_spreading_leaves_scores_and_takes_outliers_apart(dim):
    query, key = np.random.default_rng(dim).standard_normal((2, 5, dim))
    np.testing.assert_allclose(
        (spread_reference(query) * spread_reference(key)).sum(-1), (query * key).sum(-1), rtol=0, atol=1e-14 * dim
    )
    np.testing.assert_allclose(spread_reference(spread_reference(key)), key, rtol=0, atol=1e-15 * dim)
    outlier, block = np.eye(dim)[0], dim & -dim
    assert np.array_equal(np.abs(spread_reference(outlier)[:block]), np.full(block, 1 / block**0.5))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_queries_are_rotated_in_place_without_out(dtype):
    arrays = call_arrays(cases.APPEND[2], dtype=dtype)
    query = arrays["query"].copy()
    expected = append_pages(**(arrays | {"query": query}), out=np.empty_like(query))
    assert append_pages(**arrays) is arrays["query"]
    assert_same(arrays["query"], expected)
    assert not np.array_equal(query.astype(np.float32), expected.astype(np.float32))


def test_rows_may_be_strided_and_keys_may_come_alone():
    case = cases.APPEND[4]
    arrays = call_arrays(case, ("int8", "token"))
    expected = before(arrays)
    append_pages(**expected)
    width = case.heads * case.head_dim
    fused = np.full((case.tokens, width + 7 + case.kv_heads * (case.head_dim + 5)), np.nan, np.float32)
    strided = fused[:, width + 7 :].reshape(case.tokens, case.kv_heads, -1)[..., : case.head_dim]
    strided[...] = arrays["key"]
    query = fused[:, :width].reshape(case.tokens, case.heads, -1)
    query[...] = arrays["query"]
    keys_alone = arrays | {"key": strided, "query": query, "value": None, "value_pages": None, "value_scales": None}
    assert_same(append_pages(**keys_alone), expected["query"])
    assert_same(arrays["key_pages"], expected["key_pages"])
    assert_same(arrays["key_scales"], expected["key_scales"])
    assert np.isnan(fused[:, width : width + 7]).all()


def test_norm_comes_before_rotation():
    case = cases.APPEND[1]
    arrays = call_arrays(case)
    weight = np.linspace(0.5, 2, case.head_dim, dtype=np.float32)
    normed = norm.rms_norm(arrays["query"].reshape(-1, case.head_dim), weight).reshape(arrays["query"].shape)
    expected = append_pages(**(arrays | {"query": normed}), out=np.empty_like(normed))
    assert np.array_equal(append_pages(**arrays, query_norm=weight, out=np.empty_like(normed)), expected)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "int4"])
@every_kernel
def test_rows_of_zeros_and_rows_that_are_not_finite(kernel, name):
    skip_unless_able(kernel)
    arrays = call_arrays(cases.APPEND[5], (name, "token"))
    del arrays["query"], arrays["table"]
    key, slots = arrays["key"], arrays["slots"]
    key[0] = 0
    key[1, 3, 17], key[2, 0, -1] = np.nan, -np.inf
    key[3] *= 1e-44  # as small as numbers are: some rows' scales are 0
    key[4, 1] = key[4, 1] / np.max(np.abs(key[4, 1])) * np.float32(3e38)
    before_call = before(arrays)
    append_pages(**arrays, kernel=kernel.name)
    pages, scales = op.reference(key, before_call["key_pages"], slots, before_call["key_scales"])
    assert_same(arrays["key_pages"], pages)
    assert_same(arrays["key_scales"], scales)
    codes, own, _ = written_keys(arrays)
    read = dequantize(codes, own, name)
    assert (read[0] == 0).all() and (own[0] == 0).all()
    assert np.isnan(read[1, 3]).all() and np.isnan(read[2, 0]).all()
    assert np.isnan(own).sum() == 2
    assert np.isfinite(read[4]).all() and np.max(np.abs(read[4, 1])) > 2e38


@every_kernel
def test_with_a_given_scale_infinity_saturates_and_nan_needs_a_code(kernel):
    skip_unless_able(kernel)
    for name, largest in (("float8_e4m3fn", [448, -448]), ("int8", [127, -128]), ("int4", [7, -8])):
        arrays = call_arrays(cases.APPEND[5], (name, "page"))
        del arrays["query"], arrays["table"]
        arrays["key"][0, 0, :2] = np.inf, -np.inf
        append_pages(**arrays, kernel=kernel.name)
        codes, _, _ = written_keys(arrays)
        assert codes_of(codes, name, 128)[0, 0, :2].tolist() == largest
        arrays["key"][3, 2, 1] = np.nan
        if name == "float8_e4m3fn":
            append_pages(**arrays, kernel=kernel.name)
            codes, _, _ = written_keys(arrays)
            assert np.argwhere(np.isnan(codes.astype(np.float32))).tolist() == [[3, 2, 1]]
        else:
            with pytest.raises(
                ArgumentError, match=f"key: expected numbers, which {name} can hold, got NaN for token 3"
            ):
                append_pages(**arrays, kernel=kernel.name)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_given_scale_that_is_none_is_an_error(scale):
    arrays = call_arrays(cases.APPEND[2], ("int8", "page"))
    arrays["value_scales"][arrays["slots"][5] // 64, 0, 1] = scale
    with pytest.raises(ArgumentError, match="value_scales: expected finite numbers above 0, got"):
        append_pages(**arrays)


@pytest.mark.parametrize("slot", [-1, 3 * 64, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_slot_outside_the_pages_is_an_error_and_never_written(slot, dtype):
    arrays = call_arrays(cases.APPEND[2], ("int4", "token") if dtype == "uint8" else ("float16", ""))
    guarded = np.full((5, *arrays["key_pages"].shape[1:]), 7, dtype)
    arrays["key_pages"] = guarded[1:4]
    arrays["slots"][-1] = slot
    with pytest.raises(ArgumentError, match="slots: expected 0 to 191"):
        append_pages(**arrays)
    assert (guarded[[0, 4]] == 7).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_recorded_program_writes_what_a_call_writes(threads):
    case = cases.APPEND[2]
    arrays = call_arrays(case, ("float8_e4m3fn", "token"))
    expected = before(arrays)
    append_pages(**expected)
    program = native.Program(native.Pool(threads), native.Sizes(tokens=case.tokens, requests=1, outputs=1))
    buffers = {name: program_input(arrays[name], program, "tokens") for name in ("key", "value", "slots", "table")}
    query = program_input(arrays["query"], program, "tokens")
    rotated = append_pages(**buffers, **{name: arrays[name] for name in arrays if "_" in name}, query=query, out=None)
    assert isinstance(rotated, Buffer)
    program.finish()
    half = case.tokens // 2
    program.run(native.Sizes(tokens=half, requests=1, outputs=1))
    codes, own, _ = written_keys(arrays | {"slots": arrays["slots"][half:]})
    assert np.isnan(codes.astype(np.float32)).all() and np.isnan(own).all()
    arrays["query"][:half] = call_arrays(case)["query"][:half]
    program.run(native.Sizes(tokens=case.tokens, requests=1, outputs=1))
    for name in ("query", "key_pages", "value_pages", "key_scales", "value_scales"):
        assert_same(arrays[name], expected[name])


def test_torch_arrays_of_every_format_are_written_in_place():
    torch = pytest.importorskip("torch")
    case = cases.APPEND[3]
    key = torch.randn(case.tokens, case.kv_heads, case.head_dim, dtype=torch.bfloat16)
    slots = torch.arange(case.tokens, dtype=torch.int32)
    shape = (2, case.page_size, case.kv_heads)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        pages = torch.zeros((*shape, case.head_dim), dtype=dtype)
        scales = torch.zeros(shape) if dtype == torch.int8 else None
        append_pages(key, None, pages, None, slots=slots, key_scales=scales)
        name = str(dtype).removeprefix("torch.")
        codes, own = quantize(key.float().numpy(), name, scaled=scales is not None)
        got = pages.float().numpy()[0, : case.tokens]
        assert np.array_equal(got, codes.astype(np.float32))
        if scales is not None:
            assert np.array_equal(scales.numpy()[0, : case.tokens], own)


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"query": np.zeros((70, 576), np.float32)}, "query: expected [tokens, heads, dim]"),
        ({"query": np.zeros((70, 9, 64), np.float64)}, "query: expected float32 or float16 or bfloat16"),
        ({"query": np.zeros((70, 9, 64, 2), np.float32)[..., 0]}, "query: expected a contiguous last dimension"),
        ({"query": np.zeros((70, 9, 32), np.float32)}, "table: expected [tokens, rotary_dim]"),
        ({"key": np.zeros((69, 3, 64), np.float32)}, "slots: expected [69]"),
        ({"key": np.zeros((70, 3, 32), np.float32)}, "table: expected [tokens, rotary_dim]"),
        ({"key": None}, "key: expected an array"),
        ({"value": np.zeros((69, 3, 64), np.float32)}, "value: expected [70, 3, any]"),
        ({"value": None}, "value, value_pages: expected both or neither"),
        ({"slots": np.zeros(70, np.int64)}, "slots: expected int32"),
        ({"slots": np.zeros(69, np.int32)}, "slots: expected [70]"),
        ({"table": np.zeros((70, 66), np.float32)}, "table: expected [tokens, rotary_dim]"),
        ({"table": np.zeros((70, 64), np.float64)}, "table: expected float32"),
        ({"key_pages": np.zeros((3, 64, 2, 64), np.float16)}, "key_pages: expected [any, any, 3, 64]"),
        ({"key_pages": np.zeros((3, 64, 3, 64), np.float64)}, "key_pages: expected float32"),
        ({"key_pages": np.zeros((3, 64, 3, 64, 2), np.float16)[..., 0]}, "key_pages: expected a contiguous last"),
        ({"key_pages": np.broadcast_to(np.float16(0), (3, 64, 3, 64))}, "key_pages: expected an array that can be"),
        ({"key_pages": np.zeros((3, 64, 3, 64), np.uint8)}, "key_pages: expected [any, any, 3, 32]"),
        ({"key_pages": np.zeros((3, 64, 3, 32), np.uint8)}, "key_scales: expected an array for pages of int4"),
        ({"key_pages": np.zeros((3, 64, 3, 64), np.int8)}, "key_scales: expected an array for pages of int8"),
        ({"key_scales": np.zeros((3, 64, 3), np.float32)}, "key_scales: expected none for pages of float16"),
        ({"value_pages": np.zeros((2, 64, 3, 64), np.float16)}, "value_pages: expected [3, 64, any, any]"),
        ({"key_norm": np.zeros(63, np.float32)}, "key_norm: expected [64]"),
        ({"query_norm": np.zeros(64, np.float64)}, "query_norm: expected float32"),
        ({"query": None, "out": np.zeros(1)}, "out, query_norm: expected none without query"),
        ({"eps": -1.0}, "eps: expected a finite number"),
        ({"out": np.zeros((70, 9, 63), np.float32)}, "out: expected [70, 9, 64]"),
    ],
)
def test_bad_arguments_are_named(changes, text):
    with pytest.raises(ArgumentError) as caught:
        append_pages(**(call_arrays(cases.APPEND[2]) | changes))
    assert text in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 64), (3, 64, 2), (3, 32, 3), (2, 64, 3), (3, 1, 1)])
def test_scales_that_do_not_fit_are_named(shape):
    arrays = call_arrays(cases.APPEND[2], ("int8", "token"))
    with pytest.raises(ArgumentError, match="key_scales: expected"):
        append_pages(**(arrays | {"key_scales": np.zeros(shape, np.float32)}))
