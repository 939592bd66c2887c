"""The official openai client against a server in a process of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from headrace import LLM, SamplingParams

HI: Any = [{"role": "user", "content": "hi"}]
GREEDY: Any = {"model": "tiny", "max_tokens": 12, "temperature": 0.0}


@pytest.fixture(scope="module")
def openai(process: Any) -> OpenAI:
    return OpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> LLM:
    return LLM(tiny_path, kv_dtype="float32")


def test_a_chat_is_what_the_library_answers(openai: OpenAI, llm: LLM) -> None:
    answer = openai.chat.completions.create(messages=HI, **GREEDY)
    expected = llm.chat(HI, SamplingParams(max_tokens=12))
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chunks_are_the_answer(openai: OpenAI, llm: LLM) -> None:
    options: Any = {"include_usage": True, "include_speed": True}
    chunks = list(openai.chat.completions.create(messages=HI, stream=True, stream_options=options, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == llm.chat(HI, SamplingParams(max_tokens=12)).text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    names = {"tokens_per_s", "prefill_tokens_per_s", "gb_per_s", "roof_fraction", "time_to_first_token_s"}
    assert set(chunks[-1].headrace) == names
    assert 0 < chunks[-1].headrace["time_to_first_token_s"] < 60
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_prompt_seen_before_is_not_computed_again(openai: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "the water wheel " * 9}]
    for expected in (0, 100):
        answer = openai.chat.completions.create(messages=long, **GREEDY)
        details = answer.usage.prompt_tokens_details
        assert expected <= details.cached_tokens < answer.usage.prompt_tokens


def test_choices_differ_and_a_seed_repeats_them(openai: OpenAI) -> None:
    def texts() -> list[str | None]:
        answer = openai.chat.completions.create(messages=HI, model="tiny", max_tokens=12, n=3, seed=5, temperature=1.2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = texts()
    assert len(set(first)) == 3 and first == texts()


def test_an_answer_stops_before_its_stop_string(openai: OpenAI) -> None:
    whole = openai.chat.completions.create(messages=HI, **GREEDY).choices[0].message.content
    answer = openai.chat.completions.create(messages=HI, stop=[whole[4:6]], **GREEDY)
    assert answer.choices[0].message.content == whole[: whole.index(whole[4:6])]
    assert answer.choices[0].finish_reason == "stop"


def test_an_assistants_text_is_continued(openai: OpenAI, llm: LLM) -> None:
    begun: Any = [*HI, {"role": "assistant", "content": "The mill"}]
    extra = {"continue_final_message": True}
    answer = openai.chat.completions.create(messages=begun, extra_body=extra, **GREEDY)
    expected = llm.generate("user: hi\nassistant: The mill", SamplingParams(max_tokens=12), add_special=False)
    assert answer.choices[0].message.content == expected.text


def test_completions_of_several_prompts_with_echo(openai: OpenAI, llm: LLM) -> None:
    answer = openai.completions.create(prompt=["a mill", "water"], echo=True, **GREEDY)
    expected = [prompt + llm.generate(prompt, SamplingParams(max_tokens=12)).text for prompt in ("a mill", "water")]
    assert [choice.text for choice in answer.choices] == expected
    chunks = openai.completions.create(prompt=llm.tokenizer.encode("a mill"), echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_the_likeliest_of_several_answers(openai: OpenAI, llm: LLM, logprobs: int | None) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=2, best_of=4)
    asked: Any = {"model": "tiny", "max_tokens": 12, "seed": 5, "n": 2, "best_of": 4, "logprobs": logprobs}
    answer = openai.completions.create(prompt=["a mill", "water"], **asked)
    expected = [choice.text for prompt in ("a mill", "water") for choice in llm.generate(prompt, params).choices]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens > 4 * 12  # of those that were left out, too
    for wrong in ({"best_of": 1}, {"stream": True}):
        with pytest.raises(BadRequestError) as refused:
            openai.completions.create(prompt="x", **{**asked, **wrong})
        assert refused.value.param == "best_of"


def test_models_are_listed(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").owned_by == "headrace"


def test_errors_say_which_field_and_why(openai: OpenAI) -> None:
    with pytest.raises(NotFoundError) as missing:
        openai.chat.completions.create(messages=HI, model="gpt-9")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(BadRequestError) as unknown:
        openai.chat.completions.create(messages=HI, extra_body={"temprature": 1}, **GREEDY)
    assert (unknown.value.code, unknown.value.param) == ("unknown_parameter", "temprature")
    with pytest.raises(BadRequestError) as refused:
        openai.completions.create(prompt="x", suffix="y", **GREEDY)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "suffix")
    with pytest.raises(BadRequestError) as long:
        openai.completions.create(prompt="x" * 2000, **GREEDY)
    assert (long.value.code, long.value.type) == ("context_length_exceeded", "invalid_request_error")


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called_is(openai: OpenAI, choice: Any) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
    answer = openai.chat.completions.create(**asked, seed=1).choices[0]
    [call] = answer.message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather" and answer.message.content is None
    assert set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Oslo")
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    chunks = [chunk.choices[0] for chunk in openai.chat.completions.create(**asked, seed=1, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
    assert deltas[0].function.name == "weather" and deltas[0].id
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    back: Any = [*HI, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert openai.chat.completions.create(messages=back, tools=[WEATHER], **GREEDY).choices


def test_an_answer_is_json_of_a_schema(openai: OpenAI) -> None:
    schema = {"name": "x", "strict": True, "schema": WEATHER["function"]["parameters"]}
    given: Any = {"response_format": {"type": "json_schema", "json_schema": schema}, "seed": 2, "max_tokens": 200}
    said = json.loads(openai.chat.completions.create(model="tiny", messages=HI, **given).choices[0].message.content)
    assert said["city"] in ("Rome", "Oslo") and 1 <= said["days"] <= 9
    for wrong in (
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}},
    ):
        with pytest.raises(BadRequestError):
            openai.chat.completions.create(model="tiny", messages=HI, response_format=wrong)


def test_logprobs_have_the_texts_of_the_answer(openai: OpenAI) -> None:
    asked: Any = {"messages": HI, "logprobs": True, "top_logprobs": 2, **GREEDY}
    choice = openai.chat.completions.create(**asked).choices[0]
    told = choice.logprobs.content
    assert "".join(each.token for each in told) == choice.message.content
    assert all(each.top_logprobs[0].logprob == each.logprob for each in told)  # greedy: the likeliest
    assert all(len(each.top_logprobs) == 2 for each in told) and len(told) == 12
    chunks = [chunk.choices[0] for chunk in openai.chat.completions.create(stream=True, **asked)]
    streamed = [each for chunk in chunks if chunk.logprobs for each in chunk.logprobs.content]
    assert streamed == told


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_without_an_answer(openai: OpenAI, stream: bool) -> None:
    given: Any = {**GREEDY, "prompt": "a mill", "echo": True, "logprobs": 1}
    whole = openai.completions.create(**given).choices[0]
    if stream:
        [answer] = openai.completions.create(**{**given, "max_tokens": 0}, stream=True)
    else:
        answer = openai.completions.create(**{**given, "max_tokens": 0})
        assert answer.usage is not None and answer.usage.completion_tokens == 0
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("a mill", "length")
    assert choice.logprobs is not None and whole.logprobs is not None
    assert choice.logprobs.tokens is not None and "".join(choice.logprobs.tokens) == "a mill"
    count = len(choice.logprobs.tokens)
    assert choice.logprobs.token_logprobs == (whole.logprobs.token_logprobs or [])[:count]


def test_logprobs_of_a_prompt_that_is_echoed(openai: OpenAI) -> None:
    choice = openai.completions.create(prompt="a mill", echo=True, logprobs=1, **GREEDY).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text and choice.text.startswith("a mill")
    assert told.token_logprobs[0] is None and all(logprob < 0 for logprob in told.token_logprobs[1:])
    assert [
        choice.text[at : at + len(text)] for at, text in zip(told.text_offset, told.tokens, strict=True)
    ] == told.tokens


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_hidden_states_of_length_one(openai: OpenAI, pooling: str) -> None:
    texts = ["the water wheel", "x" * 700]
    answer = openai.embeddings.create(model="tiny", input=texts, extra_body={"pooling": pooling})
    for text, item in zip(texts, answer.data, strict=True):
        alone = openai.embeddings.create(model="tiny", input=text, extra_body={"pooling": pooling})
        assert alone.data[0].embedding == item.embedding
        assert math.hypot(*item.embedding) == pytest.approx(1)
    assert answer.usage.prompt_tokens > 700 // 2
    with pytest.raises(BadRequestError):
        openai.embeddings.create(model="tiny", input="x", dimensions=7)
