"""quantize: small errors in every format, exact where others are exact, and whole models in little memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from headrace.errors import ArgumentError, ModelFileError
from headrace.ops.formats import FORMATS, dequantize
from headrace.weights.gguf import open_gguf
from headrace.weights.gguf_writer import write_gguf
from headrace.weights.quantize import quantize, quantize_file

BLOCK_FORMATS = [name for name, form in FORMATS.items() if form.block_len > 1]
SAME_AS_REFERENCE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def weights(kind: str) -> np.ndarray:
    """float32 [64, 1024] of a kind that models have."""
    random = np.random.default_rng(0)
    normal = 0.02 * random.normal(size=(64, 1024))
    if kind == "outliers":
        normal[:, ::97] *= 8
    elif kind == "one-sided":
        normal = np.abs(normal) + 0.01
    elif kind == "heavy-tailed":
        normal = 0.02 * random.standard_t(3, size=normal.shape)
    elif kind == "sparse":
        normal *= random.random(normal.shape) < 0.05
    return normal.astype(np.float32)


KINDS = ["normal", "outliers", "one-sided", "heavy-tailed", "sparse"]


def error(values: np.ndarray, name: str) -> float:
    """Root mean square of what a format loses."""
    return float(np.sqrt(np.mean((dequantize(quantize(values, name), name) - values.astype(np.float64)) ** 2)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAME_AS_REFERENCE)
def test_simple_formats_equal_the_reference_package(name: str, kind: str) -> None:
    values = weights(kind)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(quantize(values, name), theirs)


def plain_error(values: np.ndarray, name: str) -> float:
    """What the textbook quantizer loses, in float64 and with scales of full precision: round between the ends."""
    group_len, levels, symmetric = {
        "Q2_K": (16, 3, False), "Q4_K": (32, 15, False), "Q5_K": (32, 31, False),
        "Q3_K": (16, 7, True), "Q6_K": (16, 63, True), "IQ4_NL": (32, 15, True), "IQ4_XS": (32, 15, True),
    }[name]  # fmt: skip
    groups = values.astype(np.float64).reshape(-1, group_len)
    low = -np.abs(groups).max(axis=1, keepdims=True) if symmetric else np.minimum(groups.min(axis=1, keepdims=True), 0)
    high = -low if symmetric else np.maximum(groups.max(axis=1, keepdims=True), 0)
    step = np.where(high > low, high - low, 1) / levels
    return float(np.sqrt(np.mean((np.rint((groups - low) / step) * step + low - groups) ** 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(BLOCK_FORMATS) - set(SAME_AS_REFERENCE)))
def test_rounded_scales_cost_less_than_the_search_gains(name: str, kind: str) -> None:
    assert error(weights(kind), name) <= 1.1 * plain_error(weights(kind), name)


# Worse, better. On sparse values the order is no law: there short groups win over many bits.
ORDERED = [
    ("Q2_K", "Q3_K"), ("Q3_K", "Q4_K"), ("Q4_K", "Q5_K"), ("Q5_K", "Q6_K"), ("Q6_K", "Q8_0"), ("Q4_0", "IQ4_NL"),
    ("Q4_0", "Q4_K"), ("Q8_0", "F16"), ("BF16", "F16"), ("F16", "F32"),
]  # fmt: skip


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"sparse"}))
@pytest.mark.parametrize(("worse", "better"), ORDERED)
def test_more_bits_lose_less(worse: str, better: str, kind: str) -> None:
    assert error(weights(kind), better) < error(weights(kind), worse)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_chunks_and_strides_do_not_change_bytes(name: str) -> None:
    values = np.resize(weights("normal"), (3, 64, 2048))  # more than one chunk
    whole = quantize(values, name)
    assert whole.shape == (3, 64, FORMATS[name].row_bytes(2048))
    np.testing.assert_array_equal(whole[1, 5], quantize(values[1, 5], name))
    np.testing.assert_array_equal(whole[:, ::2], quantize(values[:, ::2], name))
    assert quantize(values[:0], name).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    assert not dequantize(quantize(np.zeros((2, 512), np.float32), name), name).any()


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-6, -1e-30, 1e-44])
def test_equal_values_come_back_within_a_step(name: str, value: float) -> None:
    values = np.full((1, 256), value, np.float32)
    found = dequantize(quantize(values, name), name)
    smallest_half = 2.0**-24
    step = abs(value) / (2 ** (FORMATS[name].bits_per_value - 2)) + 128 * smallest_half
    assert np.abs(found - value).max() <= step


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    values = weights("normal")
    values[7, 77] = bad
    with pytest.raises(ArgumentError, match="expected finite numbers"):
        quantize(values, name)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "F16"])
def test_numbers_too_large_for_the_scale_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="too large for fp16"):
        quantize(np.full((1, 256), -1e12, np.float32), name)


def test_bfloat16_keeps_infinities_and_nans() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 3.4e38, 1.00390625], np.float32)
    found = dequantize(quantize(values, "BF16"), "BF16")
    np.testing.assert_array_equal(found, np.array([np.inf, -np.inf, np.nan, np.inf, 1.0], np.float32))


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match="expected float32"):
        quantize(np.zeros((2, 32), np.float64), "Q4_0")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="multiple of 256 for Q4_K, got 32"):
        quantize(np.zeros((2, 32), np.float32), "Q4_K")


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    wide, narrow, vector = weights("normal")[:4], weights("outliers")[:8, :96], weights("normal")[0]
    metadata = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "wide": 5,
        "tokens": ["a", "b"],
    }
    tensors = [
        ("token_embd.weight", "F32", wide.shape, quantize(wide, "F32")),
        ("blk.0.attn_q.weight", "F16", narrow.shape, quantize(narrow, "F16")),
        ("blk.0.attn_norm.weight", "F16", vector.shape, quantize(vector, "F16")),
        ("blk.0.ffn_down_exps.weight", "Q8_0", (2, 2, 1024), quantize(wide.reshape(2, 2, 1024), "Q8_0")),
    ]
    write_gguf(path, metadata, tensors, kinds={"wide": 10})
    return path


@pytest.mark.parametrize("recipe", ["q4_k_m", "Q8_0", "f16"])
def test_a_model_is_converted_tensor_by_tensor(tiny_model: Path, recipe: str) -> None:
    seen: list[tuple[int, int | None]] = []
    target = tiny_model.with_name("new.gguf")
    quantize_file(tiny_model, target, recipe, progress=lambda message, done, total: seen.append((done, total)))
    old, new = open_gguf(tiny_model), open_gguf(target)
    assert list(new.tensors) == list(old.tensors)
    assert new.tensors["blk.0.attn_norm.weight"].format == "F32"
    for name, info in new.tensors.items():
        assert info.shape == old.tensors[name].shape
        values = dequantize(old.data(name), old.tensors[name].format).reshape(info.shape)
        expected = quantize(values, info.format) if info.format != old.tensors[name].format else old.data(name)
        np.testing.assert_array_equal(new.data(name), expected.reshape(-1))
    assert seen[-1] == (old.tensor_bytes, old.tensor_bytes)


def test_metadata_is_kept_with_its_types(tiny_model: Path) -> None:
    target = tiny_model.with_name("new.gguf")
    quantize_file(tiny_model, target, "q4_k_m")
    old, new = open_gguf(tiny_model), open_gguf(target)
    changed = {"general.file_type": 15, "general.quantization_version": 2}
    assert new.metadata == old.metadata | changed
    assert new.kinds == old.kinds | dict.fromkeys(changed, 4)


def test_a_model_may_be_quantized_onto_itself(tiny_model: Path) -> None:
    quantize_file(tiny_model, tiny_model, "q8_0")
    assert open_gguf(tiny_model).tensors["blk.0.attn_q.weight"].format == "Q8_0"


def test_a_bad_source_or_recipe_leaves_no_file(tiny_model: Path) -> None:
    before = os.listdir(tiny_model.parent)
    with pytest.raises(ArgumentError, match=r"recipe: 'q9' is not known\n.*q4_k_m"):
        quantize_file(tiny_model, tiny_model.with_name("new.gguf"), "q9")
    tiny_model.write_bytes(tiny_model.read_bytes()[:-200])
    with pytest.raises(ModelFileError):
        quantize_file(tiny_model, tiny_model.with_name("new.gguf"), "q8_0")
    assert os.listdir(tiny_model.parent) == before


def test_a_large_tensor_passes_in_pieces(tmp_path: Path) -> None:
    values = np.zeros((8192, 1024), np.float32)
    write_gguf(tmp_path / "large.gguf", {}, [("a.weight", "F32", values.shape, values.view(np.uint8))])
    tracemalloc.start()
    quantize_file(tmp_path / "large.gguf", tmp_path / "new.gguf", "f16")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < values.nbytes / 2


@pytest.mark.slow
def test_the_default_model_converts_to_a_file_that_others_read(default_model_path: Path, tmp_path: Path) -> None:
    quantize_file(default_model_path, tmp_path / "new.gguf", "q4_k_m")
    theirs, ours = gguf.GGUFReader(tmp_path / "new.gguf"), open_gguf(tmp_path / "new.gguf")
    assert len(theirs.fields["tokenizer.ggml.merges"].data) == len(ours.metadata["tokenizer.ggml.merges"]) == 48900
    for tensor in theirs.tensors:
        assert tensor.tensor_type.name == ours.tensors[tensor.name].format
        assert tensor.data_offset == ours.tensors[tensor.name].offset
    assert len(theirs.tensors) == len(ours.tensors) == 272
