"""Calls of tools in text, however it is cut into pieces: names, arguments that are JSON, and text that is no call."""

from __future__ import annotations

import json
import random

import pytest

from headrace.server.tools import Part, ToolReader

NAMES = ("add", "look_up")
ARGUMENTS = {"a": 1, "text": 'quotes " and } braces { \\ \n', "list": [1, {"b": None}], "é": "水"}
SAID = json.dumps(ARGUMENTS)
CALL = f'{{"name": "add", "arguments": {SAID}}}'
OTHER = '{"name": "look_up", "arguments": {}}'
REMOVE = '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>'
ONE, TWO = [("add", ARGUMENTS)], [("add", ARGUMENTS), ("look_up", {})]

TEXTS = {
    "hermes": (f"<tool_call>\n{CALL}\n</tool_call>", "", ONE),
    "hermes, text before": (f"Let me see.\n<tool_call>{CALL}</tool_call>", "Let me see.\n", ONE),
    "hermes, two": (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>", "", TWO),
    "hermes, not closed": (f"<tool_call>\n{CALL}", "", ONE),
    "llama": (f'{{"name": "add", "parameters": {SAID}}}', "", ONE),
    "llama, with its mark": (f"<|python_tag|>{CALL}", "", ONE),
    "llama, two": (f"{CALL}; {OTHER}", "", TWO),
    "mistral": (f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", TWO),
    "mistral, its mark hidden": (f"[{CALL}, {OTHER}]", "", TWO),
    "arguments first": (f'{{"arguments": {SAID}, "name": "add"}}', "", ONE),
    "no arguments": ('<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    "text": ("a < b and {c} [d]", "a < b and {c} [d]", []),
    "text like a mark": ("<tool_ca", "<tool_ca", []),
    "json that is no call": ('{"a": {"name": "add"}}', '{"a": {"name": "add"}}', []),
    "a function nobody offered": ('{"name": "rm", "arguments": {}}', '{"name": "rm", "arguments": {}}', []),
    "a mark and no call": ("<tool_call> hm", "<tool_call> hm", []),
    "a mark and nothing": ("So [TOOL_CALLS]", "So [TOOL_CALLS]", []),
    "a mark and its end": ("<tool_call>\n</tool_call> so", "<tool_call>\n</tool_call> so", []),
    "marked json that is no call": ('[TOOL_CALLS] [{"a": 1}]', '[TOOL_CALLS] [{"a": 1}]', []),
    "a marked function nobody offered": (REMOVE, REMOVE, []),
    "a mark after a call": (f"<tool_call>{OTHER}</tool_call><tool_call> no", "<tool_call> no", [("look_up", {})]),
    "json in text": (f"It is {CALL}", f"It is {CALL}", []),
    "a list": ("[1, 2]", "[1, 2]", []),
    "nothing": ("", "", []),
}


def read(pieces: list[str], most_calls: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolReader(NAMES, most_calls)
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.push(piece)
    parts += reader.finish()
    calls: list[tuple[str, str]] = []
    for part in parts:
        if part.name is not None:
            assert part.call == len(calls)
            calls.append((part.name, ""))
        elif part.call is not None:
            assert part.call == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    return "".join(part.text for part in parts), calls


def cuts(text: str) -> list[list[str]]:
    chance = random.Random(len(text))
    ways = [[text], list(text)]
    for _ in range(20):
        places = sorted(chance.sample(range(len(text) + 1), min(4, len(text))))
        ways.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return ways


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_found_wherever_the_text_is_cut(name: str) -> None:
    text, shown, calls = TEXTS[name]
    for pieces in cuts(text):
        said, found = read(pieces)
        assert (said.strip(), [(function, json.loads(raw)) for function, raw in found]) == (shown.strip(), calls), (
            pieces
        )


def test_space_behind_arguments_is_not_theirs() -> None:
    assert read(['{"name": "add", "arguments": {"a": [1 ] } \n}'])[1] == [("add", '{"a": [1 ] }')]


def test_arguments_come_while_they_are_written() -> None:
    reader = ToolReader(NAMES)
    assert reader.push('<tool_call>{"name": "add", "argu') == []
    assert reader.push('ments": {"a"') == [Part(call=0, name="add"), Part(call=0, arguments='{"a"')]
    assert reader.push(": 1}") == [Part(call=0, arguments=": 1}")]


def test_no_more_calls_than_were_wanted() -> None:
    assert [name for name, _ in read([TEXTS["hermes, two"][0]], most_calls=1)[1]] == ["add"]


def test_text_that_is_no_call_is_shown_as_it_comes() -> None:
    reader = ToolReader(NAMES)
    assert reader.push("The ") == [Part("The ")]
    assert reader.push("<b>") == [Part("<b>")]
