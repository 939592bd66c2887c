"""Sampling parameters: what they hold, and that every value that makes no sense is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from headrace.config import SamplingParams
from headrace.errors import ArgumentError


@pytest.mark.parametrize(
    "given,text",
    [
        ({"typical_p": 0.0}, "typical_p: expected more than 0"),
        ({"typical_p": 1.5}, "typical_p: expected a finite number between 0 and 1"),
        ({"typical_p": math.nan}, "typical_p"),
        ({"dry_multiplier": -1.0}, "dry_multiplier: expected a finite number >= 0"),
        ({"dry_base": 0.5}, "dry_base: expected a finite number >= 1"),
        ({"dry_allowed_len": 0}, "dry_allowed_len: expected a whole number >= 1"),
        ({"dry_breakers": "\n"}, "dry_breakers: expected a tuple of strings"),
        ({"bad_words": ("",)}, "bad_words: expected strings of at least one character"),
        ({"bad_words": 7}, "bad_words"),
        ({"stop": "x"}, r"stop: expected a tuple of strings, got the string 'x'"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: expected token ids"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids"),
        ({"stop_token_ids": (True,)}, "stop_token_ids"),
        ({"logit_bias": 3}, "logit_bias: expected a mapping"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias: expected token ids, got 'a'"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: expected token ids"),
        ({"logit_bias": {1: math.nan}}, "logit_bias: expected biases between -100 and 100, got nan for token 1"),
        ({"logit_bias": {1: 100.5}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: expected at most max_tokens = 8, got 9"),
        ({"n": 0}, "n: expected a whole number >= 1"),
        ({"n": 3, "best_of": 2}, "best_of: expected at least n = 3, got 2"),
        ({"logprobs": -1}, "logprobs: expected a whole number >= 0"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs"),
        ({"json_object": 1}, "json_object: expected True or False"),
        ({"regex": 7}, "regex: expected text"),
        ({"json_schema": 7}, "json_schema: expected JSON as text or a mapping"),
        ({"json_schema": {"a": math.nan}}, "json_schema"),
        ({"json_schema": {"a": object()}}, "json_schema"),
        ({"regex": "a", "choice": ("b",)}, "choice: expected one of .*, got regex and choice"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos: expected False with regex"),
        ({"json_object": True, "grammar": "x"}, "got json_object and grammar"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        SamplingParams(**given)


def test_everything_is_stored_so_that_nothing_can_change_it() -> None:
    biases, words = {5: 1, 2: -3.5}, ["a"]
    params = SamplingParams(logit_bias=biases, bad_words=words, stop_token_ids=[7, 3, 7])  # type: ignore[arg-type]
    biases[5], words[0] = 9, "b"
    assert (params.logit_bias, params.bad_words, params.stop_token_ids) == (((2, -3.5), (5, 1.0)), ("a",), (3, 7))
    assert dataclasses.replace(params, seed=1).logit_bias == params.logit_bias
    assert hash(params) == hash(SamplingParams(logit_bias={2: -3.5, 5: 1.0}, bad_words=("a",), stop_token_ids=(3, 7)))


def test_a_schema_is_stored_as_text() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, None]}}}
    params = SamplingParams(json_schema=schema)
    assert isinstance(params.json_schema, str) and json.loads(params.json_schema) == schema
    assert params.structure == ["json_schema"] and SamplingParams().structure == []
