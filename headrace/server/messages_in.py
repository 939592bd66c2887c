"""Conversations on their way to a chat template: parts become text, tools become what the template knows.

Where a template knows nothing of tools, they are told in a system message and calls are written as Hermes models do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from headrace.llm import LLM
from headrace.server.problems import Problem, unsupported
from headrace.text.prompt import Prompt, chat_prompt

Message = dict[str, Any]
_RESERVED = {"messages", "tools", "add_generation_prompt", "continue_final", "name", "rendered_at"}

# What parts may have beside their text; whether it may say something, for then nothing is lost without it.
_PARTS_OWN = {
    "cache_control": True,
    "prompt_cache_breakpoint": True,
    "logprobs": True,
    "annotations": False,
    "citations": False,
}

_TOOLS_TOLD = """\
You may call these functions:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments between marks:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def flat_text(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str | None:
    """The text of a content that may be a list of parts."""
    if content is None or isinstance(content, str):
        return content
    return "".join(text_of(part, f"{where}[{i}]", kinds) for i, part in enumerate(content))


def text_of(part: dict[str, Any], where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of one part."""
    if part.get("type") not in kinds:
        raise unsupported(f"{where}.type", f"content of type {part.get('type')!r:.40}, only text is")
    unknown = sorted(part.keys() - {"type", "text"} - _PARTS_OWN.keys())
    lost = [name for name, kept in _PARTS_OWN.items() if part.get(name) and not kept]
    if unknown or lost:
        raise unsupported(f"{where}.{(unknown + lost)[0]}", "a part has a type and a text")
    text = part.get("text")
    if not isinstance(text, str):
        raise Problem(400, f"{where}.text: expected text", param=f"{where}.text", code="invalid_type")
    return text


def for_template(messages: Sequence[Message]) -> list[Message]:
    """Messages as templates expect them: text for content, mappings for the arguments of calls."""
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: Message, where: str) -> Message:
    plain = {**message, "content": flat_text(message.get("content"), f"{where}.content")}
    if plain["content"] is None and not plain.get("tool_calls"):
        raise Problem(400, f"{where}: has neither content nor tool_calls", param=where, code="invalid_value")
    if plain["role"] == "developer":
        plain["role"] = "system"
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            _plain_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(plain["tool_calls"])
        ]
    return {name: value for name, value in plain.items() if value is not None}


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        function["arguments"] = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        param = f"{where}.function.arguments"
        raise Problem(400, f"{param}: expected JSON: {error}", param=param, code="invalid_value") from error
    return {**call, "function": function}


def without_tool_roles(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The same conversation for a template that knows no tools."""
    told = _TOOLS_TOLD.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools)) if tools else ""
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            answer = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if plain and plain[-1]["role"] == "user" and plain[-1]["content"].startswith("<tool_response>"):
                plain[-1] = {"role": "user", "content": plain[-1]["content"] + "\n" + answer}
            else:
                plain.append({"role": "user", "content": answer})
        elif message.get("tool_calls"):
            plain.append({"role": "assistant", "content": _calls_as_text(message)})
        else:
            plain.append(message)
    if not told:
        return plain
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": plain[0]["content"] + "\n\n" + told}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _calls_as_text(message: Message) -> str:
    pieces = [message["content"]] if message.get("content") else []
    for call in message["tool_calls"]:
        function = call["function"]
        said = json.dumps({"name": function["name"], "arguments": function["arguments"]})
        pieces.append(f"<tool_call>\n{said}\n</tool_call>")
    return "\n".join(pieces)


def prompt_of(
    llm: LLM,
    messages: Sequence[Message],
    *,
    tools: Sequence[dict[str, Any]] = (),
    continue_final: bool = False,
    add_generation_prompt: bool = True,
    variables: dict[str, Any] | None = None,
) -> Prompt:
    """The prompt of a conversation. continue_final: it ends inside the last message, which the answer goes on with.

    What contents spell is text, control tokens included: `text.prompt` says how.
    """
    template, plain = llm.chat_template, for_template(messages)
    if not template.takes_tools:
        plain, tools = without_tool_roles(plain, tools), ()
    given = dict(variables or {})
    reserved = _RESERVED & given.keys()
    if reserved:
        param = f"chat_template_kwargs.{min(reserved)}"
        raise Problem(400, f"{param}: is set by the request itself", param=param, code="invalid_value")
    return chat_prompt(
        template,
        llm.tokenizer,
        plain,
        tools=tools or None,
        continue_final=continue_final,
        add_generation_prompt=add_generation_prompt,
        **given,
    )
