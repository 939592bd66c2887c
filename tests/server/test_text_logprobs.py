"""Logprobs of an answer that also calls tools: the texts of its tokens together are the text that is shown."""

from __future__ import annotations

import random
from typing import Any

import pytest
from starlette.testclient import TestClient

from headrace.server.logprobs import TextLogprobs
from headrace.server.tools import ToolReader

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": [1, 2]}}\n</tool_call>'
TEXTS = {
    "text": ("Two and <b> two", ["Two and <b> two"]),
    "text, then a call": (f"I shall add. {CALL}", ["I shall add. "]),
    "text around calls": (f"So: {CALL}\n{CALL} Done.", ["So: ", "Done."]),
    "a call": (CALL, []),
    "a mark and no call": ("a <tool_call> b", ["a <tool_call> b"]),
    "half a mark": ("a <tool_ca", ["a <tool_ca"]),
    "a call that nobody offered": (CALL.replace("add", "rm"), [CALL.replace("add", "rm")]),
}


def told(pieces: list[str], chance: random.Random) -> tuple[list[str], list[str]]:
    """The texts between calls, and those of the tokens told of each; a step brings one token or several."""
    reader, scores = ToolReader(["add"]), TextLogprobs()
    texts, tokens, ended = [""], [""], False
    while not ended:
        taken, pieces = pieces[: (count := chance.randint(1, 3))], pieces[count:]
        ended = not pieces
        scores.add([{"token": piece} for piece in taken])
        for part in reader.push("".join(taken)) + (reader.finish() if ended else []):
            if part.name is not None:
                tokens[-1] += "".join(entry["token"] for entry in scores.rest())
                texts, tokens = [*texts, ""], [*tokens, ""]
            elif part.call is None:
                texts[-1] += part.text
                tokens[-1] += "".join(entry["token"] for entry in scores.take(part.text, part.end))
    tokens[-1] += "".join(entry["token"] for entry in scores.rest())
    return texts, tokens


@pytest.mark.parametrize("name", TEXTS)
def test_the_texts_of_tokens_are_the_text(name: str) -> None:
    answer, shown = TEXTS[name]
    for seed in range(40):
        chance = random.Random(seed)
        places = sorted(chance.choices(range(len(answer) + 1), k=chance.randint(0, 12)))  # the same twice: no text
        pieces = [answer[a:b] for a, b in zip([0, *places], [*places, len(answer)], strict=True)]
        texts, tokens = told(pieces, chance)
        assert texts == tokens, pieces
        assert [text for text in texts if text] == shown, pieces


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_responses_with_tools_tell_them(client: TestClient, choice: str) -> None:
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}}
    body: dict[str, Any] = {"model": "tiny", "input": "hi", "tools": [tool], "tool_choice": choice, "temperature": 0}
    response = client.post("/v1/responses", json={**body, "max_output_tokens": 80, "top_logprobs": 2})
    items = response.json()["output"]
    assert [item["type"] for item in items] == ["message" if choice == "auto" else "function_call"]
    for part in (part for item in items for part in item.get("content", [])):
        assert part["text"] == "".join(entry["token"] for entry in part["logprobs"]) != ""
        assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
