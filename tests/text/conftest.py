"""Vocabularies for the text layer's tests: the default model's, and small ones whose every token can be read here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.errors import SourceError
from headrace.text.byte_level import _BYTE_OF
from headrace.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Metadata = dict[str, Any]


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's file, fetched if it is not cached."""
    sources = pytest.importorskip("headrace.weights.sources")
    try:
        return Path(sources.resolve("smollm2"))
    except SourceError as error:
        pytest.skip(f"the default model is neither cached nor can be fetched: {error}")


@pytest.fixture(scope="session")
def default_metadata(default_model_path: Path) -> Metadata:
    """The metadata in the default model's file."""
    from headrace.weights.gguf import open_gguf

    with open_gguf(default_model_path) as file:
        return dict(file.metadata)


@pytest.fixture(scope="session")
def default_tokenizer(default_metadata: Metadata) -> Tokenizer:
    """The default model's tokenizer."""
    return Tokenizer.from_metadata(default_metadata)


@pytest.fixture(scope="session")
def byte_level_metadata() -> Callable[..., Metadata]:
    """Builds the metadata of a byte-level vocabulary: 256 bytes, a few merges, and the tokens given as (name, kind)."""

    def build(named: list[tuple[str, int]] = [], pre: str = "gpt-2", **fields: Any) -> Metadata:  # noqa: B006
        merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©", "ð Ł", "1 2", "Ġ Ġ"]
        tokens = [*_BYTE_OF, *(merge.replace(" ", "") for merge in merges), *(name for name, _ in named)]
        kinds = [NORMAL] * (len(tokens) - len(named)) + [kind for _, kind in named]
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        } | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}

    return build


@pytest.fixture(scope="session")
def scored_metadata() -> Callable[..., Metadata]:
    """Builds the metadata of a SentencePiece vocabulary: <unk>, <s>, </s>, perhaps bytes, and tokens with scores.

    Each token is (spelling, score) or (spelling, score, kind).
    """

    def build(tokens: list[tuple[Any, ...]], with_bytes: bool = True, **fields: Any) -> Metadata:
        rows: list[tuple[Any, ...]] = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
        rows += [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)] if with_bytes else []
        rows += [(*token, NORMAL)[:3] for token in tokens]
        spellings, scores, kinds = zip(*rows, strict=True)
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(spellings),
            "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        } | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}

    return build
