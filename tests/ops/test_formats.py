"""formats: sizes and values agree with the reference package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as oracle

from headrace.errors import ArgumentError, UnsupportedError
from headrace.ops.formats import BLOCK_LAYOUTS, FORMAT_BY_ID, FORMATS, KNOWN_IDS, dequantize

# zero, smallest subnormal, largest subnormal, smallest normal, 1, largest, and the negatives; then inf and nan
ODD_HALVES = np.array(
    [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x8000, 0x8001, 0xFBFF, 0x7C00, 0xFC00, 0x7E00], "<u2"
)


def random_blocks(name: str, num_blocks: int, seed: int) -> np.ndarray:
    """uint8 [num_blocks, block_bytes]: random bits, with odd halves in every scale of the last blocks."""
    raw = np.random.default_rng(seed).integers(0, 256, (num_blocks, FORMATS[name].block_bytes), dtype=np.uint8)
    if name in BLOCK_LAYOUTS:
        fields = raw.view(BLOCK_LAYOUTS[name])[:, 0]
        for shift, field in enumerate(BLOCK_LAYOUTS[name].names or ()):
            if fields.dtype[field] == np.dtype("<f2"):
                fields[field][-len(ODD_HALVES) :] = np.roll(ODD_HALVES, shift).view("<f2")
    return raw


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal bit for bit, except that one nan is as good as another."""
    nans = np.isnan(left) & np.isnan(right)
    return left.shape == right.shape and bool(((left.view(np.uint32) == right.view(np.uint32)) | nans).all())


def test_the_table_agrees_with_the_reference_package() -> None:
    for form in FORMATS.values():
        their_type = gguf.GGMLQuantizationType[form.name]
        assert form.gguf_id == their_type.value
        assert (form.block_len, form.block_bytes) == gguf.GGML_QUANT_SIZES[their_type]
    assert len(FORMAT_BY_ID) == len(FORMATS) == 15


def test_every_other_type_of_the_reference_package_has_a_name() -> None:
    for their_type in gguf.GGMLQuantizationType:
        name = FORMAT_BY_ID[their_type].name if their_type in FORMAT_BY_ID else KNOWN_IDS[their_type]
        assert name == their_type.name
    assert not set(FORMAT_BY_ID) & set(KNOWN_IDS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_values_equal_the_reference_package(name: str) -> None:
    for seed in range(8):
        raw = random_blocks(name, 257, seed)
        assert same_bits(dequantize(raw, name), oracle(raw, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", FORMATS)
def test_leading_dimensions_chunks_and_strides_do_not_change_values(name: str) -> None:
    form = FORMATS[name]
    flat = random_blocks(name, 2 * 3 * (2**17 // form.block_len), seed=9)  # more than one chunk
    raw = flat.reshape(2, 3, -1)
    whole = dequantize(raw, name)
    assert whole.shape == (2, 3, raw.shape[-1] // form.block_bytes * form.block_len)
    assert same_bits(whole[1, 2], dequantize(raw[1, 2], name))
    assert same_bits(whole[:, ::2], dequantize(raw[:, ::2], name))
    assert dequantize(raw[:0], name).shape == (0, *whole.shape[1:])


def test_half_and_bfloat_values_are_all_right() -> None:
    every = np.arange(2**16, dtype="<u2")
    half = dequantize(every.view(np.uint8), "F16")
    assert same_bits(half, every.view("<f2").astype(np.float32))
    assert (dequantize(every.view(np.uint8), "BF16").view(np.uint32) == every.astype(np.uint32) << 16).all()


def test_a_scale_and_hand_written_quants_give_the_values_of_the_formula() -> None:
    block = np.zeros(1, BLOCK_LAYOUTS["Q4_0"])
    block["scale"] = 0.5
    block["quants"] = np.arange(16) | (15 - np.arange(16)) << 4
    expected = 0.5 * (np.concatenate([np.arange(16), 15 - np.arange(16)]) - 8)
    np.testing.assert_array_equal(dequantize(block.view(np.uint8), "Q4_0"), expected.astype(np.float32))


def test_sizes() -> None:
    assert FORMATS["Q4_1"].row_bytes(576) == 360
    assert FORMATS["Q8_0"].bits_per_value == 8.5
    with pytest.raises(ArgumentError, match="multiple of 256 for Q4_K, got 576"):
        FORMATS["Q4_K"].row_bytes(576)


@pytest.mark.parametrize("raw", [np.zeros(19, np.uint8), np.zeros(18, np.int8), np.zeros((), np.uint8)])
def test_bytes_that_are_no_blocks_are_refused(raw: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match=r"raw: expected uint8 .* multiple of 18"):
        dequantize(raw, "Q4_0")


def test_an_unknown_format_is_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedError, match=r"IQ2_XXS.*\n.*supported: F32, F16"):
        dequantize(np.zeros(66, np.uint8), "IQ2_XXS")
