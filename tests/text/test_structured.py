"""Answers of a given form: always of it, whatever the model wants, and forms of strangers do no harm."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.check.fakes import TinyModel, write_tiny_model
from headrace.errors import ArgumentError
from headrace.text.structured import MOST_CHARACTERS
from headrace.text.token_rules import token_rules

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NESTED = '{"type":"array","items":' * 3000 + "{}" + "}" * 3000
CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3500)) + '\nr3500: "a"'
Open = Callable[..., LLM]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyModel())

    def open_model(**options: Any) -> LLM:
        return LLM(path, kv_dtype="float32", **options)

    return open_model


@pytest.fixture(scope="module")
def llm(tiny: Open) -> LLM:
    return tiny()


def person(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["name", "age"] and len(found["name"]) <= 5 and 0 <= found["age"] <= 99


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "schema": ({"json_schema": PERSON}, person),
    "regex": ({"regex": r"[a-f]{2,8}-\d{3}"}, re.compile(r"[a-f]{2,8}-\d{3}").fullmatch),
    "choice": ({"choice": ("yes", "no", 'the "third" é\n')}, lambda text: text in ("yes", "no", 'the "third" é\n')),
    "grammar": ({"grammar": 'start: "(" start ")" | "x"'}, lambda text: re.fullmatch(r"(\(*)x(\)*)", text)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_answer_has_its_form(llm: LLM, name: str) -> None:
    fields, is_of_form = FORMS[name]
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=3, n=6, **fields)
    ended = [choice for choice in llm.generate([5, 6, 7], params).choices if choice.finish_reason == "stop"]
    assert len(ended) >= 4 and all(is_of_form(choice.text) for choice in ended)
    assert all(choice.token_ids[-1] in llm.tokenizer.end_ids for choice in ended)


def test_an_object_is_json(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, temperature=0.7, seed=1, n=8, json_object=True, logit_bias={125: 3.0})
    ended = [c.text for c in llm.generate([9], params).choices if c.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


def test_a_form_changes_nobody_elses_answer_and_nobody_changes_its(tiny: Open) -> None:
    prompts = [[int(i) for i in np.random.default_rng(n).integers(0, 300, 30 + n)] for n in range(9)]
    params = [
        SamplingParams(max_tokens=40, temperature=1.0, seed=n, speculate=n % 2, **(FORMS["schema"][0] if n % 3 else {}))
        for n in range(9)
    ]
    alone = [tiny().generate(prompt, each).token_ids for prompt, each in zip(prompts, params, strict=True)]
    llm = tiny(max_requests=4, kv_cache_bytes=256 * 512)
    requests = [
        llm.engine.request(prompt, each, token_rules(llm.tokenizer, each))
        for prompt, each in zip(prompts, params, strict=True)
    ]
    for request in requests:
        llm.engine.add(request)
    while llm.engine.has_work:
        llm.engine.step()
    assert [request.token_ids for request in requests] == alone


def test_what_the_form_needs_is_not_banned(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, choice=("yes",), bad_words=("yes", "y", "e", "s"), min_tokens=50)
    answer = llm.generate([1, 2], params)
    assert (answer.text, answer.finish_reason) == ("yes", "stop")


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"json_schema": "{bad"}, "json_schema: .*key must be a string"),
        ({"json_schema": {"type": "nope"}}, "json_schema: .*nope"),
        ({"json_schema": ""}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "json_schema"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema"),
        ({"json_schema": {"$ref": "http://127.0.0.1/schema"}}, "json_schema"),
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "regex"),
        ({"grammar": "start: nope"}, 'grammar: .*unknown name: "nope"'),
        ({"grammar": "nothing"}, "grammar"),
        ({"json_schema": NESTED}, "json_schema: expected at most|json_schema: .*recursion"),
        ({"regex": "(" * 30000 + "a" + ")" * 30000}, "regex"),
        ({"regex": "a" * (MOST_CHARACTERS + 1)}, f"regex: expected at most {MOST_CHARACTERS} characters"),
        ({"choice": ("a" * MOST_CHARACTERS, "b")}, "choice: expected at most"),
        ({"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000}, "grammar: .*nested"),
    ],
)
def test_what_is_no_form_is_refused_before_anything_is_computed(llm: LLM, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        llm.stream([1], SamplingParams(**fields))
    assert not llm.engine.has_work


HOSTILE = {
    "rules in a long chain": {"grammar": CHAIN},
    "a state for every string": {"regex": "(a|b)*a(a|b){200}c"},
    "repeated repetitions": {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
    "many readings": {"grammar": 'start: e\ne: e e | "a" | "b" | e "a" e'},
    "many properties": {
        "json_schema": {"properties": {f"p{i}": {"type": "string", "maxLength": 5000} for i in range(900)}}
    },
    "many items": {"json_schema": {"type": "array", "minItems": 10**6, "items": {"enum": ["a", "b"]}}},
    "itself": {"json_schema": {"$ref": "#"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_end_soon_in_little_memory(tiny: Open, name: str) -> None:
    llm = tiny()
    company = llm.engine.request([3, 4], SamplingParams(max_tokens=60, ignore_eos=True))
    llm.engine.add(company)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, process_time()
    try:
        llm.generate([1], SamplingParams(max_tokens=60, temperature=1.0, seed=1, **HOSTILE[name]))
    except ArgumentError as error:
        assert str(error).startswith(next(iter(HOSTILE[name])))
    while llm.engine.has_work:
        llm.engine.step()
    assert len(company.token_ids) == 60
    assert process_time() - started < 30 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def test_forms_are_parsed_once(llm: LLM) -> None:
    params = SamplingParams(json_schema=PERSON)
    first = token_rules(llm.tokenizer, params).form
    assert first is token_rules(llm.tokenizer, dataclasses.replace(params, seed=1)).form
    assert token_rules(llm.tokenizer, SamplingParams()).form is None
