"""rms_norm: every kernel x every case x every type, inside the error budget."""

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from headrace.check import cases
from headrace.check.codes import assert_codes_follow
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.errors import ArgumentError, KernelError
from headrace.kernels import cpu
from headrace.ops import norm
from headrace.ops.explanation import explain_request
from headrace.ops.select import choose

TYPES = list(itertools.product(norm.DTYPES, norm.DTYPES))
CPU_KERNELS = [kernel for kernel in norm.kernels() if "cpu" in kernel.devices]


def straightforward(x, weight, eps, out_dtype):
    x = x.astype(np.float32)
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps))
    return rounded(x * scale * weight, out_dtype)


@pytest.mark.parametrize("dtype,out_dtype", TYPES)
@pytest.mark.parametrize("case", cases.NORM, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
def test_kernel_is_within_budget(kernel, case, dtype, out_dtype):
    reasons = kernel.why_not(norm.request((case.tokens, case.dim), dtype, out_dtype))
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))
    random = np.random.default_rng(case.dim)
    x = rounded(random.standard_normal((case.tokens, case.dim)) * case.scale, dtype)
    weight = random.standard_normal(case.dim).astype(np.float32)
    out = poisoned(x.shape, out_dtype)
    norm.rms_norm(x, weight, eps=1e-5, out=out, kernel=kernel.name)
    exact = norm.reference(x, weight, 1e-5)
    assert_within_budget(out, exact, straightforward(x, weight, 1e-5, out_dtype), out_dtype)


def test_rows_may_be_strided():
    wide = np.random.default_rng(0).standard_normal((6, 100)).astype(np.float32)
    x, weight = wide[::2, 10:90], np.ones(80, np.float32)
    assert np.array_equal(norm.rms_norm(x, weight), norm.rms_norm(x.copy(), weight))


def test_torch_arrays_come_back_as_torch():
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 64).to(torch.bfloat16)
    y = norm.rms_norm(x, torch.ones(64))
    assert isinstance(y, torch.Tensor) and y.dtype == torch.bfloat16
    x_numpy = x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    expected = norm.rms_norm(x_numpy, np.ones(64, np.float32))
    assert np.array_equal(y.view(torch.uint16).numpy(), expected.view(np.uint16))


@pytest.mark.parametrize(
    "arguments,text",
    [
        ({"x": np.zeros((2, 3, 4), np.float32)}, "x: expected [tokens, dim]"),
        ({"x": np.zeros((2, 0), np.float32)}, "x: expected [tokens, dim]"),
        ({"weight": np.zeros(7, np.float32)}, "weight: expected [8]"),
        ({"weight": np.zeros(8, np.float64)}, "weight: expected float32"),
        ({"x": np.zeros((2, 8), np.int32)}, "x: expected a dtype"),
        ({"x": np.zeros((2, 16), np.float32)[:, ::2]}, "contiguous inner dimensions"),
        ({"x": [[1.0]]}, "x: expected an array"),
        ({"eps": float("nan")}, "eps: expected a finite number"),
        ({"out": np.zeros((3, 8), np.float32)}, "out: expected [2, 8]"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    call = {"x": np.ones((2, 8), np.float32), "weight": np.ones(8, np.float32)} | arguments
    with pytest.raises(ArgumentError) as caught:
        norm.rms_norm(call.pop("x"), call.pop("weight"), **call)
    assert text in str(caught.value)


def test_a_named_kernel_never_falls_back():
    x, weight = np.ones((1, 8), np.float32), np.ones(8, np.float32)
    with cpu.limit_isa("avx2"), pytest.raises(KernelError, match="cannot run.*needs avx512"):
        norm.rms_norm(x, weight, kernel="cpu_avx512")
    with pytest.raises(KernelError, match="none named 'gpu'"):
        norm.rms_norm(x, weight, kernel="gpu")


def test_explain_names_the_kernel_that_choose_takes():
    with cpu.limit_isa("portable"):
        told = explain_request(norm.kernels(), norm.request((4, 64)))
    assert told.chosen.kernel == "cpu_portable"
    reasons = {rejected.kernel: rejected.reason for rejected in told.rejected}
    assert reasons["cpu_avx2"].required == "avx2" and "portable" in reasons["cpu_avx2"].observed


def test_a_row_does_not_depend_on_its_neighbours_and_the_kernels_say_so():
    x = np.random.default_rng(0).standard_normal((37, 200)).astype(np.float32)
    weight = np.ones(200, np.float32)
    for kernel in CPU_KERNELS:
        if kernel.why_not(norm.request(x.shape)):
            continue
        together = norm.rms_norm(x, weight, kernel=kernel.name)
        alone = [norm.rms_norm(x[row : row + 1], weight, kernel=kernel.name)[0] for row in range(len(x))]
        assert np.array_equal(together, np.stack(alone))
    assert choose(norm.kernels(), norm.request(x.shape), require=("batch_invariant", "exact", "no_copy"))


@pytest.mark.parametrize("codes", norm.CODES)
@pytest.mark.parametrize("dtype", norm.DTYPES)
@pytest.mark.parametrize("case", [case for case in cases.NORM if case.tokens < 100], ids=lambda case: case.name)
def test_codes_are_those_of_the_formula(case, dtype, codes):
    random = np.random.default_rng(case.dim)
    x = rounded(random.standard_normal((case.tokens, case.dim)) * case.scale, dtype)
    weight = random.standard_normal(case.dim).astype(np.float32)
    found = norm.rms_norm_quantized(x, weight, eps=1e-5, dtype=codes, kernel="numpy_norm_quantized")
    assert_codes_follow(found, x, weight, codes)


def test_rows_without_a_scale_have_codes_of_zero():
    x = np.array([[0, 0], [1, np.nan], [np.inf, 1], [3, 4]], np.float32)
    with np.errstate(all="ignore"):
        found = norm.rms_norm_quantized(x, np.ones(2, np.float32))
    assert found.codes.tolist() == [[0, 0], [0, 0], [0, 0], [95, 127]]
    assert found.scales[0] == 0 and np.isnan(found.scales[1:3]).all()
    with pytest.raises(ArgumentError, match="dtype: expected one of int8"):
        norm.rms_norm_quantized(x, np.ones(2, np.float32), dtype="int4")


@pytest.mark.parametrize("arch,able", [("sm_80", False), ("sm_90", True), ("gfx90a", False), ("gfx942", True)])
def test_float8_needs_a_gpu_that_converts_it(arch, able):
    asked = replace(norm.quantized_request((4, 64), "bfloat16", "float8_e4m3fn"), device="cuda", arch=arch)
    told = explain_request(norm.quantized_kernels(), asked)
    assert (told.chosen is not None) == able
    reasons = {rejected.kernel: str(rejected.reason) for rejected in told.rejected}
    assert able or "needs one that converts to float8" in reasons["triton_norm_quantized"]


@pytest.mark.parametrize("dtype", norm.DTYPES)
def test_a_residual_takes_x_and_is_normalized(dtype):
    random = np.random.default_rng(5)
    x, residual = (rounded(random.standard_normal((6, 40)), each) for each in (dtype, "float16"))
    weight, total = random.standard_normal(40).astype(np.float32), residual.astype(np.float32) + x.astype(np.float32)
    got = norm.rms_norm(x, weight, eps=1e-5, residual=residual, out_dtype="float32")
    assert np.array_equal(residual, rounded(total, "float16"))
    exact = norm.reference(residual, weight, 1e-5)
    assert_within_budget(got, exact, straightforward(residual, weight, 1e-5, "float32"), "float32")
    residual = rounded(total - x.astype(np.float32), "float32")
    found = norm.rms_norm_quantized(x, weight, eps=1e-5, residual=residual)
    assert_codes_follow(found, residual, weight, "int8")
    with pytest.raises(ArgumentError, match=r"residual: expected \[6, 40\] of float32"):
        norm.rms_norm(x, weight, residual=residual[:5])
