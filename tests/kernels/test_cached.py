"""Elements of a KV cache: every code of every type, at every length and instruction set, as ml-dtypes and NumPy say."""

import ml_dtypes
import numpy as np
import pytest

from headrace.errors import ArgumentError
from headrace.kernels import cpu
from headrace.kernels.arrays import empty_like, numpy_dtype
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu import arrays

LEVELS = [level for level in cpu.ISAS if cpu.ISAS.index(level) <= cpu.ISAS.index(cpu.best_isa()) and level != "amx"]
TYPES = ["float8_e4m3fn", "int8", "int4"]


def codes_to_floats(level, dtype, codes, num_elements):
    out = np.full(num_elements + 1, np.nan, np.float32)
    native.codes_to_floats(level, dtype, codes, out[:num_elements])
    assert np.isnan(out[num_elements])
    return out[:num_elements]


def floats_to_codes(level, dtype, values):
    num_bytes = -(-values.size // 2) if dtype == "int4" else values.size
    out = np.full(num_bytes + 1, 0xA5, np.uint8)
    native.floats_to_codes(level, dtype, np.ascontiguousarray(values, np.float32), out[:num_bytes])
    assert out[num_bytes] == 0xA5
    return out[:num_bytes]


def expected_floats(dtype, codes):
    if dtype == "float8_e4m3fn":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if dtype == "int8":
        return codes.view(np.int8).astype(np.float32)
    nibbles = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1).astype(np.int32)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)


def expected_codes(dtype, values):
    if dtype == "float8_e4m3fn":
        clipped = np.clip(values, -448, 448)  # ml-dtypes makes NaN of what is larger; NaN stays one here
        return clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    if dtype == "int8":
        return np.rint(np.clip(values, -128, 127)).astype(np.int8).view(np.uint8)
    codes = np.rint(np.clip(values, -8, 7)).astype(np.int8).view(np.uint8) & 15
    codes = np.append(codes, np.zeros(values.size % 2, np.uint8))
    return codes[0::2] | codes[1::2] << 4


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_code_means_what_it_should(level, dtype):
    codes = np.arange(256, dtype=np.uint8)
    expected = expected_floats(dtype, codes)
    got = codes_to_floats(level, dtype, codes, expected.size)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got)[expected == 0], np.signbit(expected)[expected == 0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_length_stays_inside_its_bytes(level, dtype):
    codes = np.random.default_rng(0).integers(0, 256, 64).astype(np.uint8)
    values = expected_floats(dtype, codes)
    values[np.isnan(values)] = 3
    for length in range(50):
        num_bytes = -(-length // 2) if dtype == "int4" else length
        stored = floats_to_codes(level, dtype, values[:length])
        assert np.array_equal(stored, expected_codes(dtype, values[:length])), length
        assert np.array_equal(codes_to_floats(level, dtype, stored, length), values[:length]), length
        assert stored.size == num_bytes


def difficult_values(dtype):
    """Every value the type has, the middle between every two, one step to either side, and what is too large."""
    own = np.unique(expected_floats(dtype, np.arange(256, dtype=np.uint8)))
    own = own[~np.isnan(own)]
    middles = (own[1:] + own[:-1]) / 2
    around = np.concatenate([own, middles])
    around = np.concatenate(
        [around, np.nextafter(around, np.float32(np.inf)), np.nextafter(around, np.float32(-np.inf))]
    )
    huge = [448.1, 463.9, 464, 465, 1e10, 3e38, np.inf, 1e-40, 1e-30, 2.0**-11, 127.5, 2.0**31, 2.0**32, 0.0]
    random = np.random.default_rng(1).standard_normal(1000) * np.exp(np.random.default_rng(2).uniform(-9, 7, 1000))
    values = np.concatenate([around, huge, random]).astype(np.float32)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_storing_rounds_to_nearest_even_and_saturates(level, dtype):
    values = difficult_values(dtype)
    got, expected = floats_to_codes(level, dtype, values), expected_codes(dtype, values)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_stays_nan_in_float8_and_is_the_lowest_integer(level):
    nan = np.full(17, np.nan, np.float32)
    assert (floats_to_codes(level, "float8_e4m3fn", nan) & 0x7F == 0x7F).all()
    assert (floats_to_codes(level, "int8", nan).view(np.int8) == -128).all()
    assert floats_to_codes(level, "int4", nan).tolist() == [0x88] * 8 + [0x08]


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ArgumentError, match="codes: expected 8 bytes, got 7"):
        native.codes_to_floats("portable", "int4", np.zeros(7, np.uint8), np.zeros(15, np.float32))
    with pytest.raises(ArgumentError, match="dtype: unknown 'int5'"):
        native.floats_to_codes("portable", "int5", np.zeros(7, np.float32), np.zeros(7, np.uint8))


def test_float8_and_bool_cross_the_border():
    torch = pytest.importorskip("torch")
    float8 = np.arange(12, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(3, 4)
    for array in (float8, torch.from_numpy(float8.view(np.uint8)).view(torch.float8_e4m3fn)):
        tensor = arrays.as_tensor(array, "pages")
        assert (tensor.dtype, tensor.shape) == ("float8_e4m3fn", [3, 4])
        assert np.array_equal(tensor.numpy(), float8.view(np.uint8))
    bools = np.array([True, False, True])
    for array in (bools, torch.from_numpy(bools)):
        tensor = arrays.as_tensor(array, "mask")
        assert tensor.dtype == "uint8"
        assert tensor.numpy().tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float64", "int8", "uint8"])
def test_new_arrays_have_the_type_asked_for(dtype):
    torch = pytest.importorskip("torch")
    assert empty_like(np.zeros(1), (2, 3), dtype).dtype == numpy_dtype(dtype)
    assert empty_like(torch.zeros(1), (2, 3), dtype).dtype == getattr(torch, dtype)
    fixed = arrays.zeros((2, 3), dtype)
    assert fixed.dtype == dtype
    assert fixed.numpy().dtype == numpy_dtype(dtype)
    assert not fixed.numpy().astype(np.float32).any()
