"""rms_norm on a GPU, into numbers and into codes: every case and type, inside guarded memory."""

import numpy as np
import pytest

from headrace.check import cases
from headrace.check.codes import assert_codes_follow
from headrace.check.compare import assert_within_budget, poisoned, rounded
from headrace.check.guards import Guarded, as_numpy
from headrace.ops import norm

pytest.importorskip("torch")
CASES = [case for case in cases.NORM if case.tokens < 100] + [cases.NormCase("longer_than_a_program", 2, 16500)]
EPS = 1e-5


def arrays(case, dtype):
    random = np.random.default_rng(case.dim)
    x = rounded(random.standard_normal((case.tokens, case.dim)) * case.scale, dtype)
    return x, random.standard_normal(case.dim).astype(np.float32)


def straightforward(x, weight, out_dtype):
    x = x.astype(np.float32)
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(EPS))
    return rounded(x * scale * weight, out_dtype)


@pytest.mark.parametrize("dtype,out_dtype", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_within_budget(device, case, dtype, out_dtype):
    x, weight = arrays(case, dtype)
    guarded = Guarded(device)
    out = guarded.tensor(poisoned(x.shape, out_dtype), "out")
    norm.rms_norm(guarded.tensor(x), guarded.tensor(weight), eps=EPS, out=out, kernel="triton_norm")
    assert_within_budget(
        as_numpy(out), norm.reference(x, weight, EPS), straightforward(x, weight, out_dtype), out_dtype
    )
    guarded.assert_untouched()


def test_rows_may_be_strided(device):
    wide = np.random.default_rng(0).standard_normal((6, 100)).astype(np.float32)
    x, weight = wide[::2, 10:90], np.ones(80, np.float32)
    guarded = Guarded(device)
    got = norm.rms_norm(guarded.tensor(x), guarded.tensor(weight), kernel="triton_norm")
    assert_within_budget(as_numpy(got), norm.reference(x, weight), straightforward(x, weight, "float32"), "float32")


@pytest.mark.parametrize("codes", norm.CODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_codes_are_those_of_the_formula(device, case, codes):
    x, weight = arrays(case, "float32")
    guarded = Guarded(device)
    given = guarded.tensor(x), guarded.tensor(weight)
    found = norm.rms_norm_quantized(*given, eps=EPS, dtype=codes, kernel="triton_norm_quantized")
    got = norm.QuantizedRows(as_numpy(found.codes), as_numpy(found.scales))
    assert_codes_follow(got, x, weight, codes)


def test_rows_without_a_scale_have_codes_of_zero(device):
    x = np.array([[0, 0], [1, np.nan], [np.inf, 1], [3, 4]], np.float32)
    guarded = Guarded(device)
    found = norm.rms_norm_quantized(
        guarded.tensor(x), guarded.tensor(np.ones(2, np.float32)), kernel="triton_norm_quantized"
    )
    scales = as_numpy(found.scales)
    assert as_numpy(found.codes).tolist() == [[0, 0], [0, 0], [0, 0], [95, 127]]
    assert scales[0] == 0 and np.isnan(scales[1:3]).all()


@pytest.mark.parametrize("dim", [40, 16500])
def test_a_residual_takes_x_and_is_normalized(device, dim):
    random = np.random.default_rng(5)
    x, residual = (random.standard_normal((3, dim)).astype(each) for each in (np.float32, np.float16))
    weight = random.standard_normal(dim).astype(np.float32)
    guarded = Guarded(device)
    tensors = guarded.tensor(x, "x"), guarded.tensor(weight, "weight")
    for codes in (False, True):
        beside = guarded.tensor(residual.copy(), "residual")
        op, name = (norm.rms_norm_quantized, "_quantized") if codes else (norm.rms_norm, "")
        got = op(*tensors, eps=EPS, residual=beside, kernel=f"triton_norm{name}")
        total = (residual.astype(np.float32) + x).astype(np.float16)
        assert np.array_equal(as_numpy(beside), total)
        if codes:
            found = norm.QuantizedRows(as_numpy(got.codes), as_numpy(got.scales))
            assert_codes_follow(found, total, weight, "int8")
        else:
            exact = norm.reference(total, weight, EPS)
            assert_within_budget(as_numpy(got), exact, straightforward(total, weight, "float32"), "float32")
    guarded.assert_untouched()
