"""The table of word cuts: words worked out by hand from each model's patterns, and nothing lost or moved."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.byte_level import _BYTE_OF
from headrace.text.pretokenizers import build_pre_tokenizer, find_word_cut, supported_names

TEXT = "I'll  pay 1234€ for HTMLPages!\n\n x"

WORDS = {
    "gpt-2": "I|'ll| | pay| 1234|€| for| HTMLPages|!|\n\n| x",
    "smollm": "I|'ll| | pay| |1|2|3|4|€| for| HTMLPages|!|\n\n| x",
    "llama-bpe": "I|'ll| | pay| |123|4|€| for| HTMLPages|!\n\n| x",
    "qwen2": "I|'ll| | pay| |1|2|3|4|€| for| HTMLPages|!\n\n| x",
    "qwen35": "I|'ll| | pay| |1|2|3|4|€| for| HTMLPages|!\n\n| x",
    "tekken": "I|'ll| | pay| |1|2|3|4|€| for| HTMLPages|!\n\n| x",
    "gpt-4o": "I'll| | pay| |123|4|€| for| HTMLPages|!\n\n| x",
    "deepseek-v3": "I|'ll| | pay| |123|4|€| for| HTMLPages|!\n\n| x",
    "deepseek-coder": "I|'|ll| | pay| |1|2|3|4|€| for| HTMLPages|!|\n|\n| x",
    "deepseek-llm": "I|'|ll| | pay| |1|2|3|4|€| for| HTMLPages|!|\n|\n| x",
    "falcon": "I|'|ll| | pay| |123|4|€| for| HTMLPages|!|\n\n| x",
    "default": "I|'|ll| | pay| |123|4|€| for| HTMLPages|!|\n\n| x",
    "bloom": "I'll| | pay| 1234€| for| HTMLPages|!\n\n| x",
    "viking": "I'll| | pay| |1|2|3|4|€| for| HTMLPages|!\n\n| x",
}


def cut_words(name: str, text: str) -> list[str]:
    """The words of `text`, with the spelling of bytes undone."""
    words = build_pre_tokenizer(find_word_cut(name)).pre_tokenize_str(text)
    return [b"".join(_BYTE_OF[character] for character in word).decode(errors="replace") for word, _ in words]


@pytest.mark.parametrize("name", WORDS)
def test_words(name):
    assert "|".join(cut_words(name, TEXT)) == WORDS[name]


def test_camel_case_is_cut_where_the_model_cuts_it():
    assert cut_words("gpt-4o", "camelCase ALLCaps") == ["camel", "Case", " ALLCaps"]
    assert cut_words("llama-bpe", "camelCase") == ["camelCase"]


def test_marks_belong_to_letters_for_some():
    assert cut_words("qwen35", "e\u0301a") == ["e\u0301a"]
    assert cut_words("qwen2", "e\u0301a") == ["e", "\u0301a"]


def test_no_name_means_default():
    assert find_word_cut(None) == find_word_cut("default")


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(supported_names()), text=st.text(max_size=30))
def test_nothing_is_lost_or_moved(name, text):
    assert "".join(word for word, _ in build_pre_tokenizer(find_word_cut(name)).pre_tokenize_str(text)) == "".join(
        {value: key for key, value in _BYTE_OF.items()}[bytes([byte])] for byte in text.encode()
    )


def test_same_patterns_as_transformers():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    shared = set(mapping.GGUF_PRE_TOKENIZER_SPLITS) & set(supported_names())
    assert len(shared) > 15
    assert {name: find_word_cut(name).steps for name in shared} == {
        name: (mapping.GGUF_PRE_TOKENIZER_SPLITS[name],) for name in shared
    }
