"""Sampling parameters that are text, in tokens: banned words in each of their places, breakers wherever they occur."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from headrace.config import SamplingParams
from headrace.errors import ArgumentError
from headrace.text.token_rules import token_rules
from headrace.text.tokenizer import Tokenizer


def test_a_bad_word_is_banned_behind_a_space_and_at_the_beginning(default_tokenizer: Tokenizer) -> None:
    rules = token_rules(default_tokenizer, SamplingParams(bad_words=("Paris", " headrace")))
    assert {default_tokenizer.decode(word) for word in rules.bad_words} == {"Paris", " Paris", "headrace", " headrace"}
    for text in ("It is Paris", "\nParis", "the headrace"):
        ids = tuple(default_tokenizer.encode(text))
        assert any(ids[-len(word) :] == word for word in rules.bad_words)
    assert rules.end_ids == default_tokenizer.end_ids


def test_words_of_a_vocabulary_that_puts_a_space_before_every_text(scored_metadata: Callable[..., Any]) -> None:
    tokenizer = Tokenizer.from_metadata(
        scored_metadata([("h", 0), ("i", 0), ("hi", 1), ("\u2581", 0), ("\u2581hi", 2)])
    )
    rules = token_rules(tokenizer, SamplingParams(bad_words=("hi",)))
    spelled = {b"".join(tokenizer.token_bytes(i) for i in word) for word in rules.bad_words}
    assert spelled == {b"hi", b" hi"}


def test_a_breaker_is_every_token_that_holds_it(default_tokenizer: Tokenizer) -> None:
    rules = token_rules(default_tokenizer, SamplingParams(dry_multiplier=1.0, dry_breakers=("\n", "<|im_start|>x")))
    for i in rules.dry_breakers - set(default_tokenizer.encode("<|im_start|>x", add_special=False)[-1:]):
        assert b"\n" in default_tokenizer.token_bytes(i)
    assert {default_tokenizer.encode(text)[0] for text in ("\n", "\n\n")} <= rules.dry_breakers
    assert not token_rules(default_tokenizer, SamplingParams()).dry_breakers


def test_a_word_that_merges_with_what_comes_before_is_banned_as_it_stands_alone(default_tokenizer: Tokenizer) -> None:
    rules = token_rules(default_tokenizer, SamplingParams(bad_words=("\n",)))
    assert tuple(default_tokenizer.encode("\n")) in rules.bad_words
    with pytest.raises(ArgumentError, match="text"):
        token_rules(default_tokenizer, SamplingParams(bad_words=("\ud800",)))
