"""The official anthropic client against a server in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic, BadRequestError, NotFoundError

from headrace import LLM, SamplingParams

HI: Any = [{"role": "user", "content": "hi"}]
GREEDY: Any = {"model": "tiny", "max_tokens": 12, "extra_body": {"temperature": 0.0}}
TOOL: Any = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def anthropic(process: Any) -> Anthropic:
    return Anthropic(base_url=process.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> LLM:
    return LLM(tiny_path, kv_dtype="float32")


def test_a_message_is_what_the_library_answers(anthropic: Anthropic, llm: LLM) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, *HI]
    expected = llm.chat(messages, SamplingParams(max_tokens=12))
    message = anthropic.messages.create(system="Be brief.", messages=HI, **GREEDY)
    [block] = message.content
    assert block.text == expected.text and message.stop_reason == "max_tokens"
    usage = message.usage
    assert (usage.input_tokens or 0) + (usage.cache_read_input_tokens or 0) == len(expected.prompt_token_ids)
    assert usage.output_tokens == 12
    counted = anthropic.messages.count_tokens(model="tiny", system="Be brief.", messages=HI)
    assert counted.input_tokens == len(expected.prompt_token_ids)


def test_events_are_the_message(anthropic: Anthropic) -> None:
    whole = anthropic.messages.create(messages=HI, **GREEDY)
    with anthropic.messages.stream(messages=HI, **GREEDY) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 12
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_it_says_which_text_stopped_it_and_goes_on_from_a_begun_answer(anthropic: Anthropic, llm: LLM) -> None:
    begun: Any = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "The mill"}]}]
    whole = llm.generate("user: hi\nassistant: The mill", SamplingParams(max_tokens=12), add_special=False).text
    message = anthropic.messages.create(messages=begun, stop_sequences=["~~~", whole[3:5]], **GREEDY)
    assert message.content[0].text == whole[: whole.index(whole[3:5])]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", whole[3:5])


def test_a_tool_that_must_be_called_is(anthropic: Anthropic) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 200, "tools": [TOOL], "tool_choice": {"type": "any"}}
    asked["extra_body"] = {"temperature": 0}
    message = anthropic.messages.create(messages=HI, **asked)
    [block] = message.content
    assert (block.type, block.name, message.stop_reason) == ("tool_use", "add", "tool_use")
    assert 0 <= block.input["a"] <= 99
    with anthropic.messages.stream(messages=HI, **asked) as stream:
        assert stream.get_final_message().content[0].input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "5"}
    turns: Any = [*HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert anthropic.messages.create(messages=turns, tools=[TOOL], **GREEDY).content


def test_errors_are_anthropics(anthropic: Anthropic) -> None:
    with pytest.raises(NotFoundError) as missing:
        anthropic.messages.create(messages=HI, model="other", max_tokens=5)
    assert missing.value.body["error"]["type"] == "not_found_error"
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with pytest.raises(BadRequestError) as refused:
        anthropic.messages.create(messages=image, **GREEDY)
    assert refused.value.body["error"]["type"] == "invalid_request_error"
