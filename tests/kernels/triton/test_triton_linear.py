"""linear on a GPU: every weight format at few and more rows, what is fused, split sums, and torch's candidate."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from headrace.check.blocks import random_matrix  # noqa: E402
from headrace.check.compare import assert_within_budget, poisoned, rounded  # noqa: E402
from headrace.check.guards import Guarded, as_numpy  # noqa: E402
from headrace.kernels.triton import linear as triton_linear  # noqa: E402
from headrace.kernels.triton.weight import dequantize as dequantize_weight  # noqa: E402
from headrace.ops import linear as op  # noqa: E402
from headrace.ops.embedding import embedding  # noqa: E402
from headrace.ops.formats import FORMATS, dequantize  # noqa: E402
from headrace.ops.norm import reference as norm_reference  # noqa: E402

TABLES = ("IQ4_NL", "IQ4_XS")  # codes that are no integers
EACH_FORMAT = pytest.mark.parametrize("name", FORMATS)
KERNEL, INVARIANT, TORCH = "triton_linear", "triton_linear_invariant", "torch_linear"
MORE_ROWS = 64  # of a straightforward product, which may by luck be nearly exact where a case has few outputs


def cols_of(name, cols):
    block = FORMATS[name].block_len
    return -(-cols // block) * block


def guarded(weight, guards):
    """The weight with its tensors in guarded memory."""
    from dataclasses import replace

    names = ("codes", "high", "scales", "minimums", "groups", "groups_high")
    found = {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}
    return replace(weight, **{name: guards.tensor(as_numpy(tensor), name) for name, tensor in found.items()})


def packed(name, rows, cols, device, seed=0, guards=None):
    """Numbers of a random matrix, and the weight."""
    raw = random_matrix(name, rows, cols, np.random.default_rng(seed))
    weight = op.pack(raw, name, (rows, cols), device=device)
    return dequantize(raw, name), weight if guards is None else guarded(weight, guards)


def operands(x, numbers, name, precision, few):
    """What a straightforward product of this precision multiplies."""
    x_type = str(x.dtype)
    if few and precision != "exact" and name not in (*op.FLOAT_FORMATS, *TABLES):
        return op.integer_activations(x.astype(np.float32), "auto"), numbers
    if few or precision == "exact" or (x_type == "float32" and precision == "auto") or name == "F32":
        return x.astype(np.float32), numbers
    operand = "bfloat16" if x_type == "float32" else x_type
    return rounded(x, operand).astype(np.float32), rounded(numbers, operand).astype(np.float32)


def straightforward(x, numbers):
    """float32 products added one after the other, and those of more rows of its first columns turned about."""
    out = np.empty((len(x), len(numbers)), np.float32)
    for token, row in enumerate(x):
        out[token] = np.add.accumulate(numbers * row, axis=1)[:, -1]
    return out


def more_rows(numbers, random):
    """Rows like these."""
    return numbers[random.integers(0, len(numbers), MORE_ROWS)] * random.choice([-1, 1], (MORE_ROWS, numbers.shape[1]))


def check(got, x, numbers, name, precision="auto", few=True, after=lambda y: y, normed=None):
    """The budget of linear: of a product with more rows than a case may have, so that no luck makes it small."""
    more = more_rows(numbers, np.random.default_rng(99))
    wide = (x if normed is None else normed).astype(np.float64)
    low_x = x if normed is None else rounded(normed, str(x.dtype))
    exact = after(wide @ numbers.astype(np.float64).T)
    others = wide @ more.astype(np.float64).T
    low = straightforward(*operands(low_x, more.astype(np.float32), name, precision, few))
    scale = max(1.0, np.abs(exact).max(initial=0) / np.abs(others).max(initial=1))
    whole = np.concatenate([exact, others * scale], axis=1)
    own = after(straightforward(*operands(low_x, numbers, name, precision, few)).astype(np.float64))
    assert_within_budget(
        np.concatenate([got, others * scale], axis=1), whole, np.concatenate([own, low * scale], axis=1), "float32"
    )


def make_x(tokens, cols, dtype="float32", seed=1):
    return rounded(np.random.default_rng(seed).standard_normal((tokens, cols)), dtype)


# Weights


@EACH_FORMAT
@pytest.mark.parametrize("rows,cols", [(3, 512), (5, 256), (2, 32), (3, 96)])
def test_packing_keeps_every_bit(name, rows, cols, device):
    cols = cols_of(name, cols)
    numbers, weight = packed(name, rows, cols, device)
    assert np.array_equal(as_numpy(dequantize_weight(weight)).view(np.uint32), numbers.view(np.uint32))
    chosen = torch.tensor([1, 0, 1], device=device)
    assert np.array_equal(as_numpy(dequantize_weight(weight, chosen)), numbers[[1, 0, 1]])


@EACH_FORMAT
def test_nothing_is_widened(name):
    """A weight takes the bits of its format, where rows are whole spans."""
    _, weight = packed(name, 4, 512, "cpu")
    assert weight.num_bytes * 8 == 4 * 512 * FORMATS[name].bits_per_value


def fp8_weight(device, rows=9, cols=48, scale=0.25, block=(1, 0)):
    values = torch.from_numpy(np.random.default_rng(3).standard_normal((rows, cols)).astype(np.float32))
    values = values.to(torch.float8_e4m3fn).to(device)
    return values, op.pack_tensor(values, torch.as_tensor(scale, device=device), block=block)


def codes_weight(device, bits, group_len, with_zero=False, rows=9, groups=3):
    random = np.random.default_rng(4)
    cols = groups * (group_len or 32)
    scale = torch.from_numpy(0.1 * random.standard_normal((rows, groups) if group_len else rows).astype(np.float32))
    if bits == 8:
        codes = torch.from_numpy(random.integers(-128, 128, (rows, cols), dtype=np.int8)).to(device)
        return codes, scale, None, op.pack_tensor(codes, scale.to(device), group_len=group_len)
    codes = torch.from_numpy(random.integers(0, 16, (rows, cols), dtype=np.uint8)).to(device)
    zero = torch.from_numpy(random.integers(0, 16, (rows, groups), dtype=np.uint8)) if with_zero else None
    weight = op.pack_tensor(codes, scale.to(device), None if zero is None else zero.to(device), group_len=group_len)
    return codes, scale, zero, weight


@pytest.mark.parametrize("shape,block", [((), (1, 0)), ((9,), (1, 0)), ((2, 3), (8, 16))])
def test_fp8_weights_keep_every_bit(shape, block, device):
    scale = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    values, weight = fp8_weight(device, scale=scale, block=block)
    factors = scale.reshape(-1, 1) if len(shape) < 2 else np.repeat(np.repeat(scale, 8, 0)[:9], 16, 1)
    expected = as_numpy(values).astype(np.float32) * factors
    assert np.array_equal(as_numpy(dequantize_weight(weight)), expected)


def test_all_fp8_codes_are_what_they_stand_for(device):
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    values = torch.from_numpy(np.resize(codes, (2, 128))).to(device).view(torch.float8_e4m3fn)
    out = op.linear(torch.eye(128, device=device), op.pack_tensor(values), kernel=INVARIANT, precision="exact")
    few = op.linear(torch.eye(128, device=device)[:2], op.pack_tensor(values), kernel=KERNEL)
    assert np.array_equal(as_numpy(out).T, as_numpy(values.to(torch.float32)))
    assert np.array_equal(as_numpy(few).T, as_numpy(values.to(torch.float32))[:, :2])


@pytest.mark.parametrize("bits,group_len,with_zero", [(8, 0, 0), (8, 32, 0), (4, 32, 0), (4, 64, 1), (4, 128, 1)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_integers_in_groups(bits, group_len, with_zero, tokens, device):
    codes, scale, zero, weight = codes_weight(device, bits, group_len, bool(with_zero))
    offset = (0 if bits == 8 else 8) if zero is None else as_numpy(zero).astype(np.float32).repeat(group_len, 1)
    factors = as_numpy(scale)[:, None] if not group_len else as_numpy(scale).repeat(group_len, 1)
    numbers = factors * (as_numpy(codes).astype(np.float32) - offset)
    assert np.array_equal(as_numpy(dequantize_weight(weight)), numbers)
    guards, x = Guarded(device), make_x(tokens, numbers.shape[1])
    got = op.linear(guards.tensor(x), guarded(weight, guards), kernel=KERNEL)
    check(as_numpy(got), x, numbers, "int")
    guards.assert_untouched()


def test_packed_nibbles_are_taken_apart(device):
    codes, scale, _, weight = codes_weight(device, 4, 32)
    two = codes[:, 0::2] | (codes[:, 1::2] << 4)
    again = op.pack_tensor(two, scale.to(device), group_len=32)
    assert torch.equal(again.codes, weight.codes)


# Products


@EACH_FORMAT
@pytest.mark.parametrize("tokens", [1, 5, *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (2, 16, 33))])
def test_every_format(name, tokens, device):
    cols, guards = cols_of(name, 96), Guarded(device)
    numbers, weight = packed(name, 19, cols, device, guards=guards)
    x, out = make_x(tokens, cols), guards.tensor(poisoned((tokens, 19), "float32"))
    kernel = KERNEL if tokens <= 32 else INVARIANT
    op.linear(guards.tensor(x), weight, out=out, kernel=kernel)
    check(as_numpy(out), x, numbers, name)
    guards.assert_untouched()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("precision", op.PRECISIONS)
@pytest.mark.parametrize("name", ["BF16", "F16", "Q4_K", "F32"])
def test_precisions_over_tensor_cores(name, precision, dtype, device):
    cols = 256
    numbers, weight = packed(name, 33, cols, device)
    guards, x = Guarded(device), make_x(6, cols, dtype)
    got = op.linear(guards.tensor(x), weight, precision=precision, kernel=KERNEL)
    check(as_numpy(got), x, numbers, name, precision, few=False)
    guards.assert_untouched()


@pytest.mark.parametrize("name", ["BF16", "Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("tokens,dtype", [(2, "float32"), (1, "bfloat16"), (7, "bfloat16"), (20, "float16")])
@pytest.mark.slow
def test_bias_residual_and_norm(name, tokens, dtype, device):
    random, cols, rows = np.random.default_rng(8), 256, 35
    numbers, weight = packed(name, rows, cols, device)
    x = make_x(tokens, cols, dtype)
    norm = (1 + 0.1 * random.standard_normal(cols)).astype(np.float32)
    bias, residual = random.standard_normal(rows).astype(np.float32), make_x(tokens, rows, seed=9)
    guards = Guarded(device)
    given = guards.tensors({"bias": bias, "residual": residual, "norm": norm})
    got = op.linear(guards.tensor(x), weight, eps=1e-5, kernel=KERNEL, **given)
    normed = norm_reference(x, norm, 1e-5)
    check(as_numpy(got), x, numbers, name, few=tokens <= 2, after=lambda y: y + bias + residual, normed=normed)
    guards.assert_untouched()


def gate(left, right):
    return left / (1 + np.exp(-left)) * right


@pytest.mark.parametrize("names", [("BF16", "BF16"), ("Q4_0", "Q4_0"), ("Q4_K", "Q6_K")])
@pytest.mark.parametrize("tokens", [1, 6])
def test_gated(names, tokens, device):
    cols, rows = 256, 21
    (left, first), (right, second) = (packed(name, rows, cols, device, seed) for seed, name in enumerate(names))
    guards, x = Guarded(device), 0.1 * make_x(tokens, cols)
    out = guards.tensor(poisoned((tokens, rows), "float32"))
    op.linear_gated(guards.tensor(x), first, second, out=out, kernel=KERNEL)
    wide = x.astype(np.float64)
    exact = gate(wide @ left.T.astype(np.float64), wide @ right.T.astype(np.float64))
    low_x, _ = operands(x, left, names[0], "auto", tokens <= 2)
    more = [more_rows(numbers, np.random.default_rng(seed)) for seed, numbers in enumerate((left, right))]
    others = gate(*(wide @ numbers.astype(np.float64).T for numbers in more))
    low = gate(*(straightforward(low_x, numbers.astype(np.float32)) for numbers in more))
    scale = max(1.0, np.abs(exact).max() / np.abs(others).max())
    whole, low = np.concatenate([exact, others * scale], axis=1), np.concatenate([exact, low * scale], axis=1)
    assert_within_budget(np.concatenate([as_numpy(out), others * scale], axis=1), whole, low, "float32")
    guards.assert_untouched()


# Few rows as integers


INTEGERS = pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q5_0", "Q6_K", "Q2_K", "Q3_K"])


@INTEGERS
def test_bfloat16_close_to_the_largest_is_not_rounded(name, device):
    """16-bit integers hold numbers of 8 bits within 2^7 of the largest: what is left is the error of float32 sums."""
    numbers, weight = packed(name, 7, 256, device)
    random = np.random.default_rng(7)
    x = rounded(random.choice([-1, 1], (2, 256)) * np.exp2(random.uniform(-6, 1, (2, 256))), "bfloat16")
    got = op.linear(Guarded(device).tensor(x), weight, kernel=KERNEL)
    check(as_numpy(got), x, numbers, name, "exact")


@INTEGERS
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_columns_of_any_size_keep_their_digits(name, size, device):
    """Sixteen columns have a scale of their own: next to others that are 2^40 times as large, or nothing at all."""
    numbers, weight = packed(name, 5, 256, device)
    x = make_x(2, 256) * np.float32(size)
    x[:, :64] = 0
    x[:, 64] = 2 - 2.0**-23  # what 15 bits would round up to a power of two
    got = as_numpy(op.linear(torch.from_numpy(x).to(device), weight, kernel=KERNEL))
    check(got, x, numbers, name)
    zero = op.linear(torch.zeros(1, 256, device=device), weight, kernel=KERNEL)
    assert not as_numpy(zero).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(bad, device):
    _, weight = packed("Q4_0", 5, 64, device)
    x = make_x(2, 64)
    x[1, 40] = bad
    got = as_numpy(op.linear(torch.from_numpy(x).to(device), weight, kernel=KERNEL))
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).all()


@INTEGERS
def test_exact_makes_no_integers_of_x(name, device):
    numbers, weight = packed(name, 5, 256, device)
    x = make_x(2, 256)
    got = op.linear(torch.from_numpy(x).to(device), weight, precision="exact", kernel=KERNEL)
    check(as_numpy(got), x, numbers, name, "exact")


def launches(monkeypatch):
    """How many there were is counted from now on."""
    counted = []
    original = triton_linear._launch
    monkeypatch.setattr(triton_linear, "_launch", lambda *a, **k: (counted.append(1), original(*a, **k)))
    return counted


@pytest.mark.parametrize("names,expected", [(["Q4_K"] * 3, 1), (["Q4_K", "Q4_K", "Q6_K"], 2), (["F16"] * 4, 2)])
def test_many_weights_of_one_layout_are_one_launch(names, expected, device, monkeypatch):
    made = [packed(name, 7 + 16 * i, 256, device, i) for i, name in enumerate(names)]
    counted, x = launches(monkeypatch), make_x(2, 256)
    got = op.linear_many(torch.from_numpy(x).to(device), [weight for _, weight in made], kernel=KERNEL)
    assert len(counted) == expected
    for out, (numbers, _), name in zip(got, made, names, strict=True):
        check(as_numpy(out), x, numbers, name)


@pytest.mark.parametrize("tokens,more", [(1, 1), (5, 2)])
@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_0"])
def test_columns_are_shared_out_and_sums_stay_the_same(name, tokens, more, device):
    """Split sums are those of any run, and of any number of rows on one side of the change of method."""
    cols, rows = 2048 + 32, 20
    numbers, weight = packed(name, rows, cols, device)
    x = torch.from_numpy(make_x(tokens + more, cols)).to(device)
    plan = triton_linear._plan(x[:tokens], [triton_linear._Part(weight, None, x)], "auto", None, False, False)
    assert plan.splits > 1
    whole = op.linear(x, weight, kernel=KERNEL)
    once, twice = (op.linear(x[:tokens], weight, kernel=KERNEL) for _ in range(2))
    assert torch.equal(once, twice)
    assert torch.equal(once, whole[:tokens])
    check(as_numpy(once), as_numpy(x[:tokens]), numbers, name)


def test_the_invariant_kernel_knows_no_neighbours(device):
    _, weight = packed("Q4_K", 18, 512, device)
    x = torch.from_numpy(make_x(35, 512)).to(device)
    together = op.linear(x, weight, kernel=INVARIANT)
    for rows in (slice(0, 1), slice(3, 8), slice(30, 35)):
        assert torch.equal(op.linear(x[rows], weight, kernel=INVARIANT), together[rows])


def test_outputs_of_other_types_and_strides(device):
    numbers, weight = packed("Q4_0", 20, 64, device)
    x = make_x(3, 64)
    held = torch.full((3, 24), float("nan"), dtype=torch.bfloat16, device=device)
    op.linear(torch.from_numpy(x).to(device), weight, out=held[:, :20], kernel=KERNEL)
    exact = x.astype(np.float64) @ numbers.T.astype(np.float64)
    assert_within_budget(as_numpy(held[:, :20]), exact, rounded(exact, "bfloat16"), "bfloat16")
    assert torch.isnan(held[:, 20:]).all()


def test_x_may_have_strides(device):
    numbers, weight = packed("F16", 9, 40, device)
    wide = make_x(4, 80)
    for x in (wide[:, :40], wide.T[:4, :2].repeat(20, 1), wide[::2, 40:]):
        got = op.linear(torch.from_numpy(x).to(device), weight, kernel=KERNEL)
        check(as_numpy(got), np.ascontiguousarray(x), numbers, "F16")


def test_no_rows(device):
    _, weight = packed("Q4_0", 9, 64, device)
    assert op.linear(torch.empty((0, 64), device=device), weight, kernel=KERNEL).shape == (0, 9)


# torch's candidate


@pytest.mark.parametrize("name", ["BF16", "F32", "Q4_K"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_does_the_same(name, dtype, device):
    random, cols, rows = np.random.default_rng(8), 256, 21
    numbers, weight = packed(name, rows, cols, device)
    x, bias = make_x(40, cols, dtype), random.standard_normal(rows).astype(np.float32)
    norm = (1 + 0.1 * random.standard_normal(cols)).astype(np.float32)
    given = Guarded(device).tensors({"x": x, "bias": bias, "norm": norm})
    x_tensor = given.pop("x")
    got = op.linear(x_tensor, weight, kernel=TORCH, eps=1e-5, **given)
    check(as_numpy(got), x, numbers, name, few=False, after=lambda y: y + bias, normed=norm_reference(x, norm, 1e-5))
    both = op.linear_gated(0.1 * x_tensor, weight, weight, kernel=TORCH)
    assert both.shape == (40, rows) and torch.isfinite(both).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q3_K", "Q6_K", "IQ4_XS"])
def test_rows_are_written_out_as_floats(name, device):
    from headrace.kernels.triton.dequantize import dequantized

    numbers, weight = packed(name, 11, cols_of(name, 96), device)
    got = dequantized(weight, slice(2, 11), torch.float32)
    assert np.array_equal(as_numpy(got), numbers[2:])


def test_embedding_of_a_weight(device):
    numbers, table = packed("Q6_K", 5, 256, device)
    rows = embedding(torch.tensor([4, 0, 9], dtype=torch.int32, device=device), table)
    assert np.array_equal(as_numpy(rows)[:2], numbers[[4, 0]]) and np.isnan(as_numpy(rows)[2]).all()
