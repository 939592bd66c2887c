"""Files that lie about their model: each lie is named, and no metadata crashes what reads it."""

from __future__ import annotations

import functools
import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, metadata_of, tensors_of, write_tiny_model
from headrace.config import ModelConfig
from headrace.errors import CapacityError, HeadraceError, ModelFileError, UnsupportedError
from headrace.kv_cache.storage import allocate
from headrace.models.families import LARGEST, config_from
from headrace.ops.formats import FORMATS
from headrace.weights.gguf_writer import write_gguf

PROMPT = [int(i) for i in np.random.default_rng(5).integers(0, 300, 150)]


def write(folder: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    path = folder / "tiny.gguf"
    write_gguf(path, metadata, [(name, *rest) for name, rest in tensors.items()])
    return path


def open_changed(
    folder: Path, changes: dict[str, Any], model: TinyModel | None = None, tensors: dict[str, Any] | None = None
) -> LLM:
    """The tiny model with some metadata (None: left out) and some tensors replaced."""
    model = model or TinyModel()
    metadata = metadata_of(model) | changes
    kept = {name: value for name, value in ({**tensors_of(model), **(tensors or {})}).items() if value is not None}
    return LLM(write(folder, {key: value for key, value in metadata.items() if value is not None}, kept), threads=1)


WHOLE = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.scaling.original_context_length",
]
REAL = [
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.attn_factor",
]
NO_NUMBERS = [math.nan, math.inf, -math.inf, -1, "four", "", True, np.array([4, 4], np.int32), ["4"]]
NO_WHOLE = [*NO_NUMBERS, 0.5, 4.0, LARGEST + 1, 2**63]
NO_REAL = [*NO_NUMBERS, 0.0, 0]
ZERO_IS_NONE = "attention.sliding_window"
BAD = [(key, value) for key in WHOLE for value in NO_WHOLE]
BAD += [(key, 0) for key in WHOLE if key != ZERO_IS_NONE] + [(key, value) for key in REAL for value in NO_REAL]


@pytest.mark.parametrize("key,value", BAD, ids=lambda value: str(value)[:40])
def test_a_bad_number_is_named(key: str, value: Any) -> None:
    metadata = metadata_of(TinyModel()) | {f"llama.{key}": value}
    with pytest.raises(ModelFileError, match=key):
        config_from(metadata, 300, False)


REQUIRED = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_number_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelFileError, match=f"llama.{key}.*is missing"):
        open_changed(tmp_path, {f"llama.{key}": None})


def test_what_may_be_missing_has_the_usual_value(tmp_path: Path) -> None:
    optional = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    expected = LLM(write_tiny_model(tmp_path / "whole.gguf")).logits(PROMPT)
    without = open_changed(tmp_path, {f"llama.{key}": None for key in optional})
    np.testing.assert_array_equal(without.logits(PROMPT), expected)


LIES: dict[str, tuple[dict[str, Any], type[HeadraceError], str]] = {
    "more layers": ({"llama.block_count": 3}, ModelFileError, "blk.2"),
    "very many layers": ({"llama.block_count": LARGEST}, ModelFileError, f"says {LARGEST} layers"),
    "fewer layers": ({"llama.block_count": 1}, ModelFileError, "says 1 layers.*blk.1"),
    "heads": ({"llama.attention.head_count": 8}, ModelFileError, r"attn_q.weight': expected \[128, 64\].*\[64, 64\]"),
    "very many heads": ({"llama.attention.head_count": LARGEST}, ModelFileError, "attn_q.weight"),
    "uneven heads": ({"llama.attention.head_count": 5}, ModelFileError, "head_count: 5 is no multiple"),
    "kv heads": ({"llama.attention.head_count_kv": 4}, ModelFileError, r"attn_k.weight': expected \[64, 64\]"),
    "dim": ({"llama.embedding_length": 32}, ModelFileError, "token_embd.weight"),
    "ffn": ({"llama.feed_forward_length": 95}, ModelFileError, "ffn_gate.weight"),
    "key length": ({"llama.attention.key_length": 32}, ModelFileError, "attn_q.weight"),
    "value length": ({"llama.attention.value_length": 32}, ModelFileError, "attn_v.weight"),
    "long rotation": ({"llama.rope.dimension_count": 18}, ModelFileError, "rope.dimension_count"),
    "odd rotation": ({"llama.rope.dimension_count": 7}, ModelFileError, "rope.dimension_count"),
    "small theta": ({"llama.rope.freq_base": 0.5}, ModelFileError, "rope.freq_base"),
    "experts": ({"llama.expert_count": 8}, UnsupportedError, "expert_count"),
    "no architecture": ({"general.architecture": None}, ModelFileError, "general.architecture"),
    "architecture number": ({"general.architecture": 7}, ModelFileError, "general.architecture"),
    "architecture": ({"general.architecture": "lama"}, UnsupportedError, "(?s)'lama'.*llama, qwen2, qwen3"),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, UnsupportedError, "'longrope'.*"),
    "scaling number": ({"llama.rope.scaling.type": 3}, ModelFileError, "rope.scaling.type"),
    "short vocabulary": (
        {
            "tokenizer.ggml.tokens": metadata_of(TinyModel())["tokenizer.ggml.tokens"][:299],
            "tokenizer.ggml.token_type": np.ones(299, np.int32),
            "tokenizer.ggml.merges": metadata_of(TinyModel())["tokenizer.ggml.merges"][:-1],
        },
        ModelFileError,
        "tokenizer.ggml.tokens: expected 300.*299",
    ),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, ModelFileError, "tokenizer.ggml.tokens"),
    "other tokenizer": ({"tokenizer.ggml.model": "t5"}, UnsupportedError, "'t5'"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_named(tmp_path: Path, name: str) -> None:
    changes, error, text = LIES[name]
    with pytest.raises(error, match=text):
        open_changed(tmp_path, changes)


def test_every_tensor_is_needed(tmp_path: Path) -> None:
    for model in (TinyModel(), TinyModel("qwen2"), TinyModel("qwen3")):
        for name in tensors_of(model):
            if name != "output.weight":  # without it the head is the embedding
                with pytest.raises(ModelFileError, match=name):
                    open_changed(tmp_path, {}, model, {name: None})


def test_every_shape_is_checked(tmp_path: Path) -> None:
    for model in (TinyModel("qwen2"), TinyModel("qwen3")):
        for name, (form, shape, raw) in tensors_of(model).items():
            shorter = (form, (shape[0] - 1, *shape[1:]), raw.reshape(shape[0], -1)[:-1].reshape(-1))
            named = "tokenizer.ggml.tokens" if name == "token_embd.weight" else name
            with pytest.raises(ModelFileError, match=named):
                open_changed(tmp_path, {}, model, {name: shorter})


VECTOR = ("F32", (64,), np.zeros(256, np.uint8))


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.1.ffn_gate_inp.weight", "blk.2.attn_norm.weight", "x"])
def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises((UnsupportedError, ModelFileError), match=name):
        open_changed(tmp_path, {}, tensors={name: VECTOR})


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_bad_rope_factors_are_refused(tmp_path: Path, factor: float) -> None:
    factors = np.array([1.0] * 7 + [factor], np.float32)
    with pytest.raises(ModelFileError, match="rope_freqs.weight"):
        open_changed(tmp_path, {}, tensors={"rope_freqs.weight": ("F32", (8,), factors.view(np.uint8))})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_vector_of_no_numbers_is_named(tmp_path: Path, value: float) -> None:
    norm = np.array([1.0] * 63 + [value], np.float32).view(np.uint8)
    for name in ("blk.1.ffn_norm.weight", "output_norm.weight"):
        with pytest.raises(ModelFileError, match=f"{name}.*finite numbers, got {value}"):
            open_changed(tmp_path, {}, tensors={name: ("F32", (64,), norm)})


def test_every_format_runs_or_is_named(tmp_path: Path) -> None:
    for form in FORMATS:
        model = TinyModel(dim=256, head_dim=64, ffn_dim=256, matrix_format=form)
        llm = LLM(write_tiny_model(tmp_path / f"{form}.gguf", model))
        assert llm.logits(PROMPT[:3]).shape == (3, 300)
    path = write_tiny_model(tmp_path / "tiny.gguf")
    raw, name = bytearray(path.read_bytes()), b"blk.1.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8
    assert raw[at : at + 4] == bytes(4)
    raw[at] = 16
    path.write_bytes(raw)
    with pytest.raises(UnsupportedError, match="'blk.1.ffn_up.weight' has type IQ2_XXS"):
        LLM(path)


def test_a_large_context_takes_no_memory_before_it_is_used(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    llm = open_changed(tmp_path, {"llama.context_length": LARGEST})
    assert llm.context_len == LARGEST
    assert len(llm.generate(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True)).token_ids) == 4
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert taken < 2**26 < LARGEST * llm.kv_bytes_per_token


def test_a_cache_beyond_memory_is_a_capacity_error() -> None:
    config = config_from(metadata_of(TinyModel()), 300, False)
    config = replace(config, num_kv_heads=LARGEST, head_dim=LARGEST)
    assert isinstance(config, ModelConfig)
    with pytest.raises(CapacityError):
        allocate(config, num_pages=LARGEST // 64, page_size=64)


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, 2, 3, 4, 5, 8, 15, 16, 32, 64, 96, 128, 255, 256, 2**20, LARGEST, 2**31, 2**32]),
    st.floats(width=32),
    st.sampled_from([0.0, 1e-45, 1e-30, 1e-5, 0.5, 1.0, 1.5, 10000.0, 1e30, 3e38, math.nan, math.inf]),
    st.floats().map(np.float64),
)
VALUES = st.one_of(
    NUMBERS,
    st.booleans(),
    st.text(max_size=8),
    st.sampled_from(["yarn", "linear", "none", "llama", "qwen2", "gpt2"]),
    st.none(),
    st.lists(st.text(max_size=4), max_size=4),
    st.lists(st.integers(0, 300), max_size=4).map(lambda values: np.array(values, np.int32)),
)


@functools.cache
def mutable_keys() -> list[str]:
    keys = [key for key in metadata_of(TinyModel()) if key != "general.name"]
    return sorted({*keys, *(f"llama.{key}" for key in (*WHOLE, *REAL, "rope.scaling.type", "expert_count"))})


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(changes=st.dictionaries(st.sampled_from(mutable_keys()), VALUES, min_size=1, max_size=4))
def test_any_metadata_runs_or_ends_in_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    try:
        llm = open_changed(tmp_path_factory.getbasetemp(), changes)
        prompt = [1] * min(5, llm.context_len - 1)
        llm.generate(prompt, SamplingParams(max_tokens=3))
        llm.generate("hello", SamplingParams(max_tokens=2))
        llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1))
    except HeadraceError as error:
        assert str(error)
