"""KV formats: codes packed as they should be, and no number further off than half a step."""

import numpy as np
import pytest

from headrace.check.appended import codes_of
from headrace.ops.kv_formats import FORMATS, dequantize, pack_int4, quantize, unpack_int4


@pytest.mark.parametrize("dim", [1, 2, 7, 8])
def test_int4_codes_are_packed_low_half_first(dim):
    codes = np.random.default_rng(0).integers(-8, 8, (5, 3, dim)).astype(np.int8)
    packed = pack_int4(codes)
    assert packed.shape == (5, 3, -(-dim // 2))
    assert np.array_equal(packed[..., 0] & 15, codes[..., 0] & 15)
    assert np.array_equal(unpack_int4(packed, dim), codes)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "int4"])
def test_quantized_numbers_are_half_a_step_off_at_most(name):
    x = np.random.default_rng(0).standard_normal((4, 3, 37)) * np.array([1e-3, 1, 50])[:, None]
    codes, scales = quantize(x, name)
    read = dequantize(codes, scales, name, 37)
    steps = 1.0
    if name == "float8_e4m3fn":  # three bits of mantissa; below 2^-6 steps of 2^-9
        steps = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(x / scales[..., None]), 2.0**-9))) - 3), 2.0**-9)
    rounding = 2.0**-23 * np.abs(x)  # of the scale
    assert (np.abs(read - x) <= 0.5 * steps * scales[..., None] + rounding).all()
    assert np.array_equal(np.max(np.abs(codes_of(codes, name, 37)), axis=-1), np.full((4, 3), FORMATS[name].largest))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "int4"])
def test_given_scales_saturate(name):
    x = np.array([[[1e9, -1e9, 0.0, np.inf]]], np.float32)
    codes, scales = quantize(x, name, scales=np.full((1, 1), 0.5, np.float32))
    lowest, largest = FORMATS[name].lowest, FORMATS[name].largest
    assert dequantize(codes, scales, name).tolist() == [[[largest / 2, lowest / 2, 0, largest / 2]]]


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_plain_numbers_have_no_scales(name):
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    codes, scales = quantize(x, name)
    assert scales is None and str(codes.dtype) == name
    assert np.array_equal(dequantize(codes, None, name), x.astype(codes.dtype).astype(np.float64))
