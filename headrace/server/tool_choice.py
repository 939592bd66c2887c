"""Which tool an answer has to call, as the JSON schema that it then must be of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.server.problems import Problem


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
