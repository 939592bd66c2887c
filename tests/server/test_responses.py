"""OpenAI's responses, through the official client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from headrace import LLM, SamplingParams

ASKED: Any = {"model": "tiny", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def openai(process: Any) -> OpenAI:
    return OpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0)


def test_a_response_is_what_the_library_answers_and_its_events_are_the_response(
    openai: OpenAI, tiny_path: Path
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    expected = LLM(tiny_path, kv_dtype="float32").chat(messages, SamplingParams(max_tokens=12)).text
    answer = openai.responses.create(**ASKED, metadata={"a": "b"})
    assert answer.output_text == expected and answer.metadata == {"a": "b"}
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 12
    events = list(openai.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected


def test_a_conversation_in_parts_and_json_of_a_schema(openai: OpenAI) -> None:
    turns: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    given: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    answer = openai.responses.create(model="tiny", input=turns, text=given, max_output_tokens=100)
    assert answer.status == "completed" and json.loads(answer.output_text)["a"] in (1, 2)


@pytest.mark.parametrize(("field", "value"), [("store", True), ("previous_response_id", "x"), ("input", [])])
def test_what_cannot_be_done_is_refused_by_name(openai: OpenAI, field: str, value: Any) -> None:
    with pytest.raises(BadRequestError) as refused:
        openai.responses.create(**{**ASKED, field: value})
    assert refused.value.param == field


def test_logprobs_have_the_texts_of_the_answer(openai: OpenAI) -> None:
    asked: Any = {**ASKED, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = openai.responses.create(**asked)
    told = answer.output[0].content[0].logprobs
    assert "".join(each.token for each in told) == answer.output_text and len(told) == 12
    assert all(len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob == each.logprob for each in told)
    events = list(openai.responses.create(**asked, stream=True))
    streamed = [each for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    assert [each.token for each in streamed] == [each.token for each in told]
    assert answer.top_logprobs == 2 and not openai.responses.create(**ASKED).output[0].content[0].logprobs
