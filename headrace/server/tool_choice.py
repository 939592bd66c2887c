"""Which tools an answer has to call, or may call: the schema or grammar that it then must be of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from headrace.server.problems import Problem, unsupported
from headrace.server.tools import MARKS
from headrace.text.tokenizer import Tokenizer


def call_schema(tools: Sequence[dict[str, Any]], choice: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema of a call that `tool_choice` demands: of any of the tools, or of the named one. None: of no demand."""
    if choice in (None, "auto", "none"):
        return None
    names = {tool["function"]["name"] for tool in tools} if choice == "required" else {_named(choice)}
    calls = [_call(tool["function"]) for tool in tools if tool["function"]["name"] in names]
    if not calls:
        raise Problem(
            400,
            f"tool_choice: no tool is called {min(names, default='')!r:.80}",
            param="tool_choice",
            code="invalid_value",
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        expected = 'auto, none, required or {"type": "function", "function": {"name": ...}}'
        raise Problem(400, f"tool_choice: expected {expected}", param="tool_choice", code="invalid_value")
    return name


def _call(function: dict[str, Any]) -> dict[str, Any]:
    arguments = {"type": "object", **(function.get("parameters") or {})}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


# An answer that may hold calls: text that never looks like one, and calls of the tools' schemas, as `tools.ToolReader`
# finds them. Between marks or, at the very beginning, without; behind a control token where the model has one for it.
_AUTO = r"""
start: begin call (between call)* after | {token} first (MORE call)* END? | text
first: plain rest
call: SPACE? "{{" SPACE? "\"name\"" rest
rest: SPACE? ":" SPACE? ({functions}) SPACE? "}}"
begin[lazy]: BEGIN
between[lazy]: BEGIN
after: REST
text: REST
plain[lazy]: /[ \t\r\n]*(\[[ \t\r\n]*)?\{{[ \t\r\n]*"name"/
BEGIN: /(.|\n)*<tool_call>/ & ~/(.|\n)*(\[TOOL_CALLS\]|<\|python_tag\|>)(.|\n)*/ & ~LIKE
REST: /(.|\n)*/ & ~/(.|\n)*(<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>)(.|\n)*/ & ~LIKE
LIKE: /[ \t\r\n\[\],;]*(<\/tool_call>[ \t\r\n\[\],;]*)?\{{[ \t\r\n]*"name"(.|\n)*/
MORE: /[ \t\r\n]*[,;\n][ \t\r\n]*/
END: /[ \t\r\n\],;]+/
SPACE: /[ \t\r\n]{{1,32}}/
"""
_FUNCTION = r"""
{rule}: {name} SPACE? "," SPACE? ("\"arguments\"" | "\"parameters\"") SPACE? ":" SPACE? {rule}_arguments
{rule}_arguments: %json {schema}
"""


def check_strict(form: str | None, held: bool) -> None:
    """Refuses another form of the answer, named by its field, where tools hold it to theirs."""
    if held and form is not None:
        raise unsupported(form, "not together with strict tools")


def auto_form(tools: Sequence[dict[str, Any]], strict: Sequence[bool], tokenizer: Tokenizer) -> dict[str, Any]:
    """What SamplingParams are told of tools that may be called, those that are `strict` with arguments of their schema.

    Nothing where none is.
    """
    return {"grammar": auto_grammar(tools, strict, _mark_ids(tokenizer))} if any(strict) else {}


def _mark_ids(tokenizer: Tokenizer) -> list[int]:
    """The control tokens that begin calls."""
    spelled = [tokenizer.encode(mark, add_special=False) for mark in MARKS]
    return [ids[0] for ids in spelled if len(ids) == 1 and ids[0] in tokenizer.special_ids - tokenizer.end_ids]


def auto_grammar(tools: Sequence[dict[str, Any]], strict: Sequence[bool], mark_ids: Sequence[int]) -> str:
    """The Lark grammar of answers that may call tools. mark_ids: control tokens that begin calls."""
    rules = [f"function_{i}" for i in range(len(tools))]
    token = f"({' | '.join(f'<[{i}]>' for i in mark_ids)})?" if mark_ids else ""
    pieces = [_AUTO.format(token=token, functions=" | ".join(rules))]
    for rule, tool, held in zip(rules, tools, strict, strict=True):
        function = tool["function"]
        schema = {"type": "object", **((function.get("parameters") or {}) if held else {})}
        name = json.dumps(json.dumps(function["name"]))
        pieces.append(_FUNCTION.format(rule=rule, name=name, schema=json.dumps(schema)))
    return "".join(pieces)
