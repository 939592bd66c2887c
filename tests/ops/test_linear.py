"""linear: every kernel x every weight format x every case, inside the error budget; packing is bit for bit."""

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.blocks import random_matrix
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.errors import ArgumentError, KernelError
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu import linear as linear_cpu
from headrace.machine import this_machine
from headrace.ops import linear as op
from headrace.ops.formats import FORMATS, dequantize
from headrace.ops.norm import reference as norm_reference
from headrace.ops.norm import rms_norm
from headrace.ops.select import choose

X = np.ones((1, 32), np.float32)
MORE_ROWS = 64  # of a straightforward product, which may by luck be nearly exact where a case has one output
CPU_KERNELS = [kernel for kernel in op.kernels() if "cpu" in kernel.devices]
EACH_KERNEL = pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
EACH_CASE = pytest.mark.parametrize("case", cases.LINEAR, ids=lambda case: case.name)
EACH_FORMAT = pytest.mark.parametrize("name", FORMATS)
INVARIANT = ("batch_invariant",)


def matrix(name, case, seed=0):
    """The raw bytes of a random matrix, and its packed form."""
    block = FORMATS[name].block_len
    cols = -(-case.cols // block) * block
    raw = random_matrix(name, case.rows, cols, np.random.default_rng(seed))
    return raw, op.pack(raw, name, (case.rows, cols)), cols


def skip_unless_able(kernel, request):
    reasons = kernel.why_not(request)
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))


def straightforward(x, raw, name, precision, over_tiles=False):
    """float32 products added one after the other, with the activations the precision allows: for quantized
    weights integers of 8 or 16 bits; over AMX tiles bf16."""
    if precision != "exact" and name not in op.FLOAT_FORMATS:
        x = op.integer_activations(x, "fast" if over_tiles else precision)
    elif precision != "exact" and over_tiles and name != "F32":
        x = rounded(x, "bfloat16").astype(np.float32)
    weight = dequantize(raw, name)
    out = np.empty((len(x), len(weight)), np.float32)
    for token, row in enumerate(x):
        out[token] = np.add.accumulate(weight * row, axis=1)[:, -1]
    return out


def over_tiles(kernel, case):
    return kernel.name == "cpu_amx" and case.tokens >= 16


def gated(gate, up):
    return gate / (1 + np.exp(-gate)) * up


@EACH_FORMAT
@EACH_CASE
@EACH_KERNEL
@pytest.mark.parametrize("precision", op.PRECISIONS)
def test_kernel_is_within_budget(kernel, case, name, precision):
    raw, weight, cols = matrix(name, case)
    skip_unless_able(kernel, op.request(case.tokens, [(name, case.rows, cols)], precision=precision))
    random = np.random.default_rng(1)
    x = random.standard_normal((case.tokens, cols)).astype(np.float32)
    bias = random.standard_normal(case.rows).astype(np.float32)
    residual = random.standard_normal((case.tokens, case.rows)).astype(np.float32)
    out = poisoned((case.tokens, case.rows), "float32")
    op.linear(x, weight, bias=bias, residual=residual, out=out, precision=precision, kernel=kernel.name)
    more, _, _ = matrix(name, cases.LinearCase("more", case.tokens, MORE_ROWS, cols), 11)
    raw = np.concatenate([raw.reshape(case.rows, -1), more.reshape(MORE_ROWS, -1)])
    added = np.pad(residual + bias, ((0, 0), (0, MORE_ROWS)))
    exact = op.reference(x, raw, name) + added
    got = np.concatenate([out, exact[:, case.rows :]], axis=1)
    assert_within_budget(
        got, exact, straightforward(x, raw, name, precision, over_tiles(kernel, case)) + added, "float32"
    )


@EACH_FORMAT
@EACH_KERNEL
def test_gated_is_within_budget(kernel, name):
    case = cases.LinearCase("gated", 9, 40, 256)
    (gate_raw, gate, cols), (up_raw, up, _) = matrix(name, case, 2), matrix(name, case, 3)
    skip_unless_able(kernel, op.request(case.tokens, [(name, case.rows, cols)]))
    x = 0.1 * np.random.default_rng(4).standard_normal((case.tokens, cols)).astype(np.float32)
    out = poisoned((case.tokens, case.rows), "float32")
    op.linear_gated(x, gate, up, out=out, kernel=kernel.name, precision="fast")
    exact = gated(op.reference(x, gate_raw, name), op.reference(x, up_raw, name))
    low = gated(straightforward(x, gate_raw, name, "fast"), straightforward(x, up_raw, name, "fast"))
    assert_within_budget(out, exact, low, "float32")


@pytest.mark.parametrize("tokens", [1, 4, 5, 19])  # each thread its own rows, or all of them once
@pytest.mark.parametrize("dtype", op.DTYPES)
@pytest.mark.parametrize("name", ["F32", "F16", "Q4_1", "Q6_K"])
def test_a_norm_first_is_the_norm_before(name, dtype, tokens):
    (_, first, cols), (_, second, _) = (matrix(name, cases.LinearCase("normed", 1, 40, 256), seed) for seed in (2, 3))
    random = np.random.default_rng(4)
    x = rounded(random.standard_normal((tokens, cols)), dtype)
    weight = random.standard_normal(cols).astype(np.float32)
    with cpu.limit_isa("avx512"):
        before = rms_norm(x, weight, eps=1e-3, out_dtype="float32")
        assert np.array_equal(op.linear(x, first, norm=weight, eps=1e-3), op.linear(before, first))
        gated_before = op.linear_gated(before, first, second)
        assert np.array_equal(op.linear_gated(x, first, second, norm=weight, eps=1e-3), gated_before)
        for got, w in zip(op.linear_many(x, [first, second], norm=weight, eps=1e-3), (first, second), strict=True):
            assert np.array_equal(got, op.linear(before, w))


@EACH_KERNEL
@pytest.mark.parametrize("tokens", [1, 21])
def test_with_a_norm_a_kernel_is_within_budget(kernel, tokens):
    case = cases.LinearCase("normed", tokens, 40, 256)
    raw, weight, cols = matrix("Q4_1", case)
    skip_unless_able(kernel, op.request(tokens, [("Q4_1", case.rows, cols)]))
    random = np.random.default_rng(4)
    x = 30 * random.standard_normal((tokens, cols)).astype(np.float32)
    norm = random.standard_normal(cols).astype(np.float32)
    out = poisoned((tokens, case.rows), "float32")
    op.linear(x, weight, norm=norm, eps=1e-5, out=out, kernel=kernel.name)
    normed = norm_reference(x, norm, 1e-5)
    low = straightforward(normed.astype(np.float32), raw, "Q4_1", "auto", over_tiles(kernel, case))
    assert_within_budget(out, op.reference(normed, raw, "Q4_1"), low, "float32")


@EACH_FORMAT
@pytest.mark.parametrize("tokens,rows,cols", [(16, 33, 256), (37, 40, 288), (64, 31, 512), (15, 16, 256)])
def test_tiles_are_within_budget(name, tokens, rows, cols):
    """AMX's algorithm over emulated tiles: odd panels, columns that do not fill a tile, a last block of few tokens."""
    raw, weight, cols = matrix(name, cases.LinearCase("tiles", tokens, rows, cols), 9)
    x = np.random.default_rng(10).standard_normal((tokens, cols)).astype(np.float32)
    out = poisoned((tokens, rows), "float32")
    linear_cpu.run("amx_emulated", x, [weight], [None], None, [out], False)
    assert_within_budget(out, op.reference(x, raw, name), straightforward(x, raw, name, "auto", True), "float32")


@EACH_FORMAT
def test_gated_tiles_are_within_budget(name):
    case = cases.LinearCase("gated", 21, 47, 256)
    (gate_raw, gate, cols), (up_raw, up, _) = matrix(name, case, 2), matrix(name, case, 3)
    x = 0.1 * np.random.default_rng(4).standard_normal((case.tokens, cols)).astype(np.float32)
    out = poisoned((case.tokens, case.rows), "float32")
    linear_cpu.run_gated("amx_emulated", x, gate, up, out, False)
    exact = gated(op.reference(x, gate_raw, name), op.reference(x, up_raw, name))
    low = [straightforward(x, side, name, "auto", True) for side in (gate_raw, up_raw)]
    assert_within_budget(out, exact, gated(*low), "float32")


@EACH_FORMAT
def test_packing_keeps_every_bit(name):
    raw, weight, cols = matrix(name, cases.LinearCase("bits", 1, 37, 512))
    expected = dequantize(raw, name)
    unpacked, from_file = np.empty_like(expected), np.empty_like(expected)
    weight.unpack(unpacked)
    native.dequantize(name, 37, cols, raw.reshape(-1), from_file)
    assert np.array_equal(unpacked.view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(from_file.view(np.uint32), expected.view(np.uint32))


@EACH_FORMAT
@pytest.mark.parametrize("level", linear_cpu.LEVELS[:3])
def test_a_token_does_not_depend_on_its_neighbours(name, level):
    if cpu.ISAS.index(level) > cpu.ISAS.index(cpu.best_isa()):
        pytest.skip(f"this CPU has {cpu.best_isa()}")
    raw, weight, cols = matrix(name, cases.LinearCase("alone", 1, 48, 512))
    up = op.pack(raw[::-1].copy(), name, (48, cols))
    x = np.random.default_rng(5).standard_normal((37, cols)).astype(np.float32)
    kernel, tokens = f"cpu_{level}", range(0, 37, 4)
    for precision in op.PRECISIONS:
        together = op.linear(x, weight, kernel=kernel, precision=precision, require=INVARIANT)
        both = op.linear_gated(x, weight, up, kernel=kernel, precision=precision, require=INVARIANT)
        for token in tokens:
            own = x[token : token + 1]
            assert np.array_equal(op.linear(own, weight, kernel=kernel, precision=precision)[0], together[token])
            alone = op.linear_gated(own, weight, up, kernel=kernel, precision=precision)
            assert np.array_equal(alone[0], both[token])


def test_tiles_promise_nothing():
    """Over them 16 tokens are computed otherwise than 1."""
    for kernels in (op.kernels(), op.gated_kernels()):
        amx = next(kernel for kernel in kernels if kernel.name == "cpu_amx")
        assert not amx.planned(op.request(21, [("Q8_0", 48, 512)]), this_machine()).batch_invariant
        assert choose(kernels, op.request(21, [("Q8_0", 48, 512)]), require=INVARIANT) is not amx


@EACH_FORMAT
def test_threads_give_the_same_bits(name):
    raw, weight, cols = matrix(name, cases.LinearCase("threads", 1, 100, 512))
    x = np.random.default_rng(6).standard_normal((5, cols)).astype(np.float32)
    outs = []
    for threads in (1, 2, 3):
        out = poisoned((5, 100), "float32")
        part = native.LinearPart(weight, native.wrap(out, "float32"), None, None)
        native.linear(native.Pool(threads), cpu.isa(), native.LinearInput(native.wrap(x, "float32"), 0), [part])
        outs.append(out)
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_activations_are_widened(dtype):
    _, weight, cols = matrix("F32", cases.LinearCase("wide", 1, 20, 40))
    x = rounded(np.random.default_rng(7).standard_normal((3, cols)), dtype)
    assert np.array_equal(op.linear(x, weight), op.linear(x.astype(np.float32), weight))


def test_many_shares_one_x():
    shapes = [("Q4_1", 40), ("Q6_K", 16), ("F16", 24)]
    packed = [matrix(name, cases.LinearCase("many", 1, rows, 512), i)[1] for i, (name, rows) in enumerate(shapes)]
    x = np.random.default_rng(8).standard_normal((4, 512)).astype(np.float32)
    for got, weight in zip(op.linear_many(x, packed), packed, strict=True):
        assert np.array_equal(got, op.linear(x, weight))


def test_activations_of_zero_and_of_huge_range():
    raw, weight, cols = matrix("Q4_0", cases.LinearCase("range", 1, 16, 64))
    x = np.zeros((2, cols), np.float32)
    x[1, 3] = 3e38
    got = op.linear(x, weight)
    assert np.all(got[0] == 0) and np.all(np.isfinite(got[1]) | np.isinf(got[1]))


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda w: op.linear(np.ones((1, 33), np.float32), w), "x: expected [tokens, 32]"),
        (lambda w: op.linear(np.ones((1, 32), np.int8), w), "x: expected a dtype"),
        (lambda w: op.linear(X, np.ones((4, 32))), "weight: expected packed"),
        (lambda w: op.linear(X, w, precision="half"), "precision: expected"),
        (lambda w: op.linear(X, w, bias=np.ones(5, np.float32)), "bias: expected [4]"),
        (
            lambda w: op.linear(X, w, residual=np.ones((1, 5), np.float32)),
            "residual: expected",
        ),
        (lambda w: op.linear(X, w, norm=np.ones(31, np.float32)), "norm: expected [32]"),
        (lambda w: op.linear(X, w, norm=np.ones(64, np.float32)[::2]), "norm: expected a contiguous"),
        (lambda w: op.linear(X, w, norm=np.ones(32)), "norm: expected float32"),
        (lambda w: op.linear(X, w, norm=np.ones(32, np.float32), eps=-1.0), "eps: expected a finite"),
        (lambda w: op.pack(np.zeros(10, np.uint8), "Q4_0", (1, 32)), "raw: expected 1 rows of 18 bytes"),
        (lambda w: op.pack(np.zeros(18, np.uint8), "Q4_0", (1, 33)), "shape: expected rows of a multiple of 32"),
        (lambda w: op.pack(np.zeros(18, np.uint8), "Q9", (1, 32)), "format_name: expected one of"),
    ],
)
def test_bad_arguments_are_named(call, text):
    weight = op.pack(np.zeros(4 * 18, np.uint8), "Q4_0", (4, 32))
    with pytest.raises(ArgumentError) as caught:
        call(weight)
    assert text in str(caught.value)


def test_a_named_kernel_never_falls_back():
    weight = op.pack(np.zeros(18, np.uint8), "Q4_0", (1, 32))
    with cpu.limit_isa("portable"), pytest.raises(KernelError, match="needs avx2"):
        op.linear(X, weight, kernel="cpu_avx2")
