"""Products of bf16: exact where sums are, within the bound of float sums elsewhere; rows do not see each other."""

import ml_dtypes
import numpy as np
import pytest

from headrace.check.compare import poisoned
from headrace.kernels import cpu
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import as_tensor

TOKENS = 64
UNIT = 2.0**-24  # half the distance of two floats near 1
LEVELS = ("avx512_bf16", "amx", "amx_emulated")
ROWS = (1, 5, 6, 7, 15, 16, 17, 32, 33, 45)
DIMS = (1, 15, 16, 17, 31, 32, 33, 72, 128)


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param in cpu.ISAS and cpu.ISAS.index(request.param) > cpu.ISAS.index(cpu.best_isa()):
        pytest.skip(f"this CPU has {cpu.best_isa()}")
    return request.param


def operands(rows, dim, keys, draw):
    """What is multiplied: rows of queries and keys, or rows of weights and values."""
    return (draw((rows, dim)), draw((TOKENS, dim))) if keys else (draw((rows, TOKENS)), draw((TOKENS, dim)))


def product(level, a, b, keys, start=None, keep=None):
    out = poisoned((len(a), TOKENS if keys else b.shape[1]), "float32") if start is None else start.copy()
    kept = None if keep is None else as_tensor(keep, "keep")
    native.product_bf16(level, a=as_tensor(a, "a"), b=as_tensor(b, "b"), c=as_tensor(out, "c"), keep=kept, keys=keys)
    return out


def whole_numbers(shape):
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(ml_dtypes.bfloat16)


def normal(shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(ml_dtypes.bfloat16)


def exact(a, b, keys):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ (b.T if keys else b)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dim", DIMS)
def test_whole_numbers_are_multiplied_exactly(level, dim, keys):
    for rows in ROWS:
        a, b = operands(rows, dim, keys, whole_numbers)
        assert np.array_equal(product(level, a, b, keys), exact(a, b, keys))


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dim", DIMS)
def test_what_was_there_is_kept_as_far_as_it_should(level, dim, keys):
    for rows in ROWS:
        a, b = operands(rows, dim, keys, whole_numbers)
        start = np.arange(rows * (TOKENS if keys else dim), dtype=np.float32).reshape(rows, -1)
        keep = np.array([1, 0, 0.5, 2, 1] * rows, np.float32)[:rows]
        assert np.array_equal(product(level, a, b, keys, start, keep), start * keep[:, None] + exact(a, b, keys))


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dim", [72, 128, 576])
def test_the_error_is_that_of_float_sums(level, dim, keys):
    """Every product is exact; each of them is added with one rounding, and sums of parts at most twice more."""
    a, b = operands(33, dim, keys, normal)
    terms = (dim if keys else TOKENS) + 2
    bound = terms * UNIT / (1 - terms * UNIT) * exact(np.abs(a), np.abs(b), keys)
    assert np.all(np.abs(product(level, a, b, keys) - exact(a, b, keys)) <= bound)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_wider_types_are_rounded_to_nearest(level, keys, dtype):
    draw = np.random.default_rng(3)
    a, b = operands(17, 40, keys, lambda shape: draw.standard_normal(shape).astype(dtype))
    rounded = [array.astype(ml_dtypes.bfloat16) for array in (a, b)]
    assert np.array_equal(product(level, a, b, keys), product(level, *rounded, keys))


@pytest.mark.parametrize("keys", [True, False])
def test_a_row_does_not_depend_on_its_neighbours(level, keys):
    a, b = operands(45, 72, keys, normal)
    together = product(level, a, b, keys)
    for first, count in [(0, 1), (5, 6), (13, 32), (31, 14)]:
        assert np.array_equal(product(level, a[first : first + count], b, keys), together[first : first + count])


@pytest.mark.parametrize("keys", [True, False])
def test_nan_stays_in_its_row(level, keys):
    a, b = operands(21, 72, keys, normal)
    a[7, 3] = np.nan
    out = product(level, a, b, keys)
    assert np.isnan(out[7]).all()
    assert np.isnan(out).sum() == out.shape[1]
