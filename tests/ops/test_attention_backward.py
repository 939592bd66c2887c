"""attention_backward: every kernel x every case x every type inside its budget, the same bits however it is divided."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.check.attention_cases import AttentionCase, dense, heads, ragged
from headrace.check.attention_expected import poisoned_like
from headrace.check.attention_gradients import (
    GRADIENTS,
    NAMES,
    assert_gradients_close,
    assert_gradients_hold,
    gradient_batch,
    reference,
    straightforward,
    why_not,
)
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu import attention_backward as backward_cpu
from headrace.ops import attention
from headrace.ops import attention_gradients as op
from headrace.ops.attention_formula import position_bias

KERNELS = [kernel.name for kernel in op.kernels() if kernel.name != "cpu_float64" and "cpu" in kernel.devices]
CASES = {case.name: case for case in GRADIENTS}
SMALL = ragged("small", (20, 1, 70), (20, 90, 70), softcap=9.0, sinks=True, **heads(6, 2, 33, 31))
LONG = ragged("long", (400, 3, 90), (400, 40, 300), **heads(4, 2, 33))
EACH_CASE = pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)


@pytest.fixture(autouse=True, scope="module")
def poison():
    """What a kernel does not write of the gradients stays visible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "empty_like", poisoned_like)
        yield


def skip_unless_it_can_run(kernel, batch):
    if reasons := why_not(kernel, batch):
        pytest.skip("; ".join(map(str, reasons)))


def assert_same_bits(one, other):
    for name in NAMES:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None) and (a is None or np.array_equal(a, b)), name


# Budgets


@pytest.mark.parametrize(
    "kernel,dtype", [*((k, "float32") for k in KERNELS[-3:]), *((k, "bfloat16") for k in KERNELS[:3])]
)
@EACH_CASE
@pytest.mark.costly
def test_kernel_is_within_budget(kernel, case, dtype):
    skip_unless_it_can_run(kernel, gradient_batch(case, dtype, dtype))
    assert_gradients_hold(case, kernel, dtype, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "query_dtype,dtype",
    [("bfloat16", "bfloat16"), ("float32", "float16"), ("float16", "float16"), ("bfloat16", "float32")],
)
@EACH_CASE
def test_kernel_is_within_budget_in_other_types(kernel, case, query_dtype, dtype):
    skip_unless_it_can_run(kernel, gradient_batch(case, dtype, query_dtype))
    assert_gradients_hold(case, kernel, dtype, query_dtype)


@EACH_CASE
@pytest.mark.costly
def test_float64_is_exact_within_budget(case):
    assert_gradients_hold(case, "cpu_float64", "float64", "float64")


@pytest.mark.parametrize("kernel", KERNELS[:2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", GRADIENTS[::5], ids=lambda case: case.name)
def test_fast_may_use_bfloat16_products_within_budget(kernel, case, dtype):
    skip_unless_it_can_run(kernel, gradient_batch(case, dtype, dtype) | {"precision": "fast"})
    assert_gradients_hold(case, kernel, dtype, dtype, precision="fast")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*GRADIENTS[::6], CASES["backward_everything"]], ids=lambda case: case.name)
def test_emulated_tiles_are_within_budget(case, dtype):
    batch = gradient_batch(case, dtype, dtype)
    exact = reference(batch)
    got = computed(native.Pool(2), batch, "amx_emulated", "bf16")
    assert_gradients_close(got, exact, straightforward(batch, exact, "bf16"))


@st.composite
def drawn_cases(draw):
    layout = draw(st.sampled_from(["ragged", "dense"]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 16]))
    lens = st.tuples(st.integers(0, 280), st.integers(0, 90))
    requests = draw(st.lists(lens, min_size=1, max_size=4))
    if layout == "dense":
        requests = requests[:1] * draw(st.integers(1, 3))
    some = st.sampled_from([None, None, 0, 7, 150])
    return AttentionCase(
        "drawn",
        layout,
        tuple(queries for _, queries in requests),
        tuple(keys for keys, _ in requests),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 70)),
        value_dim=draw(st.integers(1, 70)),
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        window=(draw(some), draw(some)),
        softcap=draw(st.none() | st.floats(1, 60)),
        mask=draw(st.sampled_from(["", "", "bool", "float"])),
        mask_heads=draw(st.sampled_from([1, kv_heads * group])),
        sinks=draw(st.booleans()),
        alibi=draw(st.sampled_from(["", "heads", "requests"])),
    )


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    drawn_cases(), st.sampled_from(["float32", "float16", "bfloat16"]), st.sampled_from(KERNELS), st.integers(0, 2**31)
)
def test_anything_drawn_is_within_budget(case, dtype, kernel, seed):
    if not why_not(kernel, gradient_batch(case, dtype, dtype, seed)):
        assert_gradients_hold(case, kernel, dtype, dtype, seed=seed)


def test_keys_that_several_requests_share_gather_from_all():
    batch = gradient_batch(CASES["ragged_self"])
    batch |= {"key_starts": np.array([5, 0, 30, 5], np.int32), "key_lens": np.array([60, 0, 7, 90], np.int32)}
    forward = {name: batch[name] for name in batch if name not in ("d_out", "d_lse", "out", "lse")}
    found = attention(**forward)
    batch |= {"out": found.out, "lse": found.lse}
    exact = reference(batch)
    for kernel in KERNELS:
        if not why_not(kernel, batch):
            got = op.attention_backward(**batch, kernel=kernel)
            assert_gradients_close(got, exact, straightforward(batch, exact))


def test_the_forwards_own_results_serve():
    batch = gradient_batch(SMALL)
    forward = {name: batch[name] for name in batch if name not in ("d_out", "d_lse", "out", "lse")}
    found = attention(**forward)
    exact = reference(batch)
    got = op.attention_backward(**batch | {"out": found.out, "lse": found.lse})
    assert_gradients_close(got, exact, straightforward(batch, exact))


# Zeros


def test_what_nobody_sees_has_no_gradient():
    batch = gradient_batch(CASES["dense_key_lens"])
    got = op.attention_backward(**batch)
    for b, length in enumerate(batch["key_lens"]):
        assert not got.key[b, length:].any() and not got.value[b, length:].any()
    assert not got.query[batch["key_lens"] == 0].any()
    gaps = gradient_batch(CASES["ragged_self"]) | {"causal": False}
    gaps |= {"key_starts": np.array([3, 90, 50, 60], np.int32), "key_lens": np.array([20, 5, 0, 25], np.int32)}
    gaps |= {name: getattr(attention(**without_gradients(gaps)), name) for name in ("out", "lse")}
    got = op.attention_backward(**gaps)
    used = np.zeros(len(got.key), bool)
    used[3:23] = used[60:85] = True  # the second request has no queries
    assert not got.key[~used].any() and not got.value[~used].any()
    assert np.abs(got.key[used]).max(axis=(1, 2)).all()


def without_gradients(batch):
    return {name: array for name, array in batch.items() if name not in ("d_out", "d_lse", "out", "lse")}


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (1, 0, 2, 8)])
def test_nothing_to_compute_is_no_mistake(shape):
    array, lse = np.zeros(shape, np.float32), np.zeros(shape[:-1], np.float32)
    got = op.attention_backward(array, array, array, array, array, lse=lse, sinks=np.zeros(2, np.float32))
    assert got.query.shape == got.key.shape == got.value.shape == shape and not got.sinks.any()


def test_no_gradient_of_lse_is_one_of_zeros():
    batch = gradient_batch(SMALL)
    zeros = op.attention_backward(**batch | {"d_lse": np.zeros_like(batch["d_lse"])})
    assert_same_bits(op.attention_backward(**batch | {"d_lse": None}), zeros)


# Bits


def computed(pool, batch, level, arithmetic):
    """The native op on a pool of its own."""
    call = op.prepared(**batch)
    found = op.outputs(call)
    places = {"d_query": found.query, "d_key": found.key, "d_value": found.value, "d_sinks": found.sinks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_cpu, "runner_of", lambda *_: pool)
        backward_cpu.run(level, {**call.arrays, **places}, call.options.native(), arithmetic=arithmetic)
    return found


def ways():
    levels = cpu.ISAS[: cpu.ISAS.index(cpu.best_isa()) + 1]
    return [(level, "fp32" if level in cpu.ISAS[:3] else "bf16") for level in levels] + [("portable", "fp64")]


@pytest.mark.parametrize("way", ways(), ids="-".join)
@pytest.mark.parametrize("name", ["long", "one_head", "ragged_everything", "dense_mask_documents"])
def test_bits_do_not_depend_on_threads(name, way):
    one_head = dense("one_head", 1, 333, 400, sinks=True, **heads(3, 1, 40))
    dtype = "float64" if way[1] == "fp64" else "float32"
    batch = gradient_batch({"long": LONG, "one_head": one_head}.get(name) or CASES[name], dtype, dtype)
    first = computed(native.Pool(1), batch, *way)
    for threads in (1, 2, 3, 7):
        assert_same_bits(computed(native.Pool(threads), batch, *way), first)


def test_bits_do_not_depend_on_neighbours():
    batch = gradient_batch(LONG, "bfloat16", "bfloat16")
    together = op.attention_backward(**batch)
    starts, keys = batch["query_starts"], batch["key_starts"]
    for r in range(3):
        rows, theirs = slice(starts[r], starts[r + 1]), slice(keys[r], keys[r + 1])
        own = {name: batch[name][None, rows] for name in ("d_out", "query", "out", "lse", "d_lse")}
        own |= {name: batch[name][None, theirs] for name in ("key", "value")}
        alone = op.attention_backward(**own, causal=True)
        assert np.array_equal(alone.query[0], together.query[rows])
        assert np.array_equal(alone.key[0], together.key[theirs])
        assert np.array_equal(alone.value[0], together.value[theirs])


@pytest.mark.parametrize(
    "name", ["dense_mask_causal", "dense_mask_window", "dense_mask_prefix", "dense_mask_documents"]
)
def test_a_mask_that_is_recognised_costs_what_is_seen(name):
    batch = gradient_batch(CASES[name])
    call = op.simplified(op.prepared(**batch))
    assert "mask" not in call.arrays and call.mask_text
    assert ("first_keys" in call.arrays) == (name in ("dense_mask_prefix", "dense_mask_documents"))


# Arrays of other libraries and other places


def as_torch(batch):
    def tensor_of(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return {name: tensor_of(array) if isinstance(array, np.ndarray) else array for name, array in batch.items()}


@pytest.mark.parametrize("name", ["ragged_everything", "dense_heads_first", "dense_mask_documents", "dense_sinks"])
def test_torch_tensors_give_the_same_bits(name):
    batch = gradient_batch(CASES[name], "bfloat16", "bfloat16")
    ours, theirs = op.attention_backward(**batch), op.attention_backward(**as_torch(batch))
    for part in NAMES:
        one, other = getattr(ours, part), getattr(theirs, part)
        if one is not None:
            assert isinstance(other, torch.Tensor) and other.dtype == as_torch({"x": one})["x"].dtype
            assert np.array_equal(other.float().numpy(), one.astype(np.float32))


def test_the_gradient_of_a_sum_is_one_number_seen_from_everywhere():
    batch = as_torch(gradient_batch(CASES["dense_self"]))
    spread, whole = torch.ones(()).expand(batch["out"].shape), torch.ones(batch["out"].shape)
    assert_same_bits(
        op.attention_backward(**batch | {"d_out": spread}), op.attention_backward(**batch | {"d_out": whole})
    )
    ours = gradient_batch(CASES["dense_self"])
    ours |= {"d_out": np.broadcast_to(np.float32(1), ours["out"].shape)}
    assert_same_bits(
        op.attention_backward(**ours), op.attention_backward(**ours | {"d_out": np.ones_like(ours["out"])})
    )


def amid_nan(array):
    """The same numbers, NaN around every one of its rows, its last dimension contiguous."""
    if array.dtype.kind not in "fV" or array.ndim < 2:
        return array
    whole = np.full([n + 3 for n in array.shape], np.nan, array.dtype)
    inner = whole[tuple(slice(1, n + 1) for n in array.shape)]
    inner[...] = array
    return inner


@pytest.mark.parametrize("way", ways(), ids="-".join)
@pytest.mark.parametrize("name", ["ragged_everything", "backward_everything", "dense_heads_first", "dense_key_lens"])
def test_nothing_beside_the_arrays_is_read_or_written(name, way):
    dtype = "float64" if way[1] == "fp64" else "bfloat16" if way[1] == "bf16" else "float32"
    batch = gradient_batch(CASES[name], dtype, dtype)
    plain = computed(native.Pool(1), batch, *way)
    strided = {k: amid_nan(v) if isinstance(v, np.ndarray) and k != "alibi_slopes" else v for k, v in batch.items()}
    call = op.prepared(**strided)
    guarded = {f"d_{part}": amid_nan(getattr(plain, part)) for part in NAMES[:3]}
    for array in guarded.values():
        array[...] = np.nan
    guarded |= {} if plain.sinks is None else {"d_sinks": np.empty_like(plain.sinks)}
    backward_cpu.run(way[0], {**call.arrays, **guarded}, call.options.native(), arithmetic=way[1])
    for part in NAMES:
        if getattr(plain, part) is not None:
            assert np.array_equal(guarded[f"d_{part}"], getattr(plain, part)), part
    for part in NAMES[:3]:
        whole = guarded[f"d_{part}"].base
        assert np.isnan(whole.astype(np.float64)).sum() == whole.size - getattr(plain, part).size, part


# Memory


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_memory_grows_with_the_tokens_alone(precision):
    tokens, options = 16384, {"causal": True, "precision": precision}
    arrays = [np.random.default_rng(i).standard_normal((1, tokens, 1, 16), np.float32) for i in range(4)]
    found = attention(*arrays[1:], **options)
    op.attention_backward(*(array[:, :64] for array in arrays), found.out[:, :64], lse=found.lse[:, :64], **options)
    try:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # from here on the peak counts anew
    except OSError:
        pytest.skip("this system does not count peaks of memory anew")
    before = resident("VmRSS")
    op.attention_backward(*arrays, found.out, lse=found.lse, **options)
    assert resident("VmHWM") - before < tokens * tokens * 4 / 16  # one matrix of scores would be 16 times that


def test_positions_are_those_of_the_forward():
    """A query's gradient flows from the keys it sees and no others."""
    batch = gradient_batch(CASES["dense_both_sides"])
    checked = op.prepared(**batch).options
    bias = position_bias(65, 65, checked)[0]
    for row in (0, 30, 64):
        d_out = np.zeros_like(batch["d_out"])
        d_out[:, row] = 1
        got = op.attention_backward(**batch | {"d_out": d_out, "d_lse": None})
        touched = np.abs(got.value).max(axis=(0, 2, 3)) > 0
        assert np.array_equal(touched, ~np.isneginf(bias[row]))
