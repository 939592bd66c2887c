"""From a conversation to the prompt a model was trained on, through the template in its file.

A template is a program in the Jinja language that came with the model. It sees exactly what Hugging Face gives
templates: the variables `messages`, `tools`, `documents`, `add_generation_prompt` and the special tokens; the
functions `raise_exception` and `strftime_now`; `tojson` without HTML escapes; loop controls and the `generation` tag.

It is also a program of a stranger, so it runs in Jinja's immutable sandbox, is given plain data only, and is stopped
when it loops or grows beyond what any conversation needs. A template that is broken, refuses the conversation or is
stopped ends in TemplateError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from headrace.errors import ArgumentError, ModelFileError, TemplateError, UnsupportedError
from headrace.text.vocabulary import read_strings, special_token_id

if TYPE_CHECKING:
    import jinja2

_KEY = "tokenizer.chat_template"
_HINT = "To send the prompt as it is, without the template: --raw, or LLM.generate."
MAX_PROMPT_CHARACTERS = 1 << 24


class ChatTemplate:
    """The chat templates of one model: one, or several by name."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The templates in a GGUF file's metadata; UnsupportedError where it has none."""
        sources = {key[len(_KEY) + 1 :] or "default": metadata[key] for key in metadata if _is_template_key(key)}
        if not sources:
            raise UnsupportedError("The model file has no chat template.", hint=_HINT)
        for name, source in sources.items():
            if not isinstance(source, str):
                raise ModelFileError(f"chat template {name!r}: expected text, got {type(source).__name__}")
        return cls(sources, _read_special_tokens(metadata))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the templates, sorted; most models have "default" only."""
        return tuple(sorted(self._sources))

    @property
    def sources(self) -> list[str]:
        """The templates themselves."""
        return list(self._sources.values())

    @property
    def takes_tools(self) -> bool:
        """Whether any of the templates does something with tools."""
        return any("tools" in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
        rendered_at: datetime | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation, with the model's control tokens written out.

        messages: mappings with "role" and "content" (text, or a list of parts); a message may also have what its
            template knows, such as "tool_calls", and then no content.
        add_generation_prompt: end with the beginning of an answer.
        tools: what the model may call, as JSON schemas.
        name: the template to use; by default "tool_use" if there are tools and there is one, else "default".
        rendered_at: what the template is told the time is; by default the time it is.
        kwargs: further variables for the template, such as enable_thinking=False.
        """
        variables = {
            **self._special_tokens,
            "documents": None,
            **_plain(kwargs, "template arguments"),
            "messages": _checked_messages(messages),
            "tools": _plain(list(tools), "tools") if tools is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
        if rendered_at is not None:
            variables["strftime_now"] = lambda format: rendered_at.strftime(format)
        return _run(self._compile(name or self._default_name(tools)), variables)

    def _default_name(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return "tool_use" if tools is not None and "tool_use" in self._sources else "default"

    def _compile(self, name: str) -> jinja2.Template:
        if name not in self._sources:
            known = ", ".join(self.names)
            raise ArgumentError(f"The model has no chat template named {name!r}", hint=f"it has: {known}")
        if name not in self._compiled:
            self._compiled[name] = _compile(self._sources[name])
        return self._compiled[name]


def _is_template_key(key: str) -> bool:
    return key == _KEY or key.startswith(_KEY + ".")


def _read_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The spellings of the special tokens, under the names templates know them by."""
    if "tokenizer.ggml.tokens" not in metadata:
        return {}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = read_strings(metadata, "tokens")
    ids = {variable: special_token_id(metadata, name, len(tokens)) for variable, name in names.items()}
    return {variable: tokens[i] for variable, i in ids.items() if i is not None}


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ArgumentError(
            f"messages: expected a non-empty list, got {messages!r:.80}", hint='[{"role": "user", "content": "Hello"}]'
        )
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The message as plain data, without the fields that are None: templates test for a field by its presence."""
    if not isinstance(message, Mapping):
        raise ArgumentError(f'{where}: expected {{"role": ..., "content": ...}}, got {message!r:.80}')
    fields: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None}, where)
    if not isinstance(fields.get("role"), str) or not re.fullmatch(r"[\w .-]+", fields["role"]):
        raise ArgumentError(f"{where}: expected a role such as 'user', got {fields.get('role')!r:.80}")
    content = fields.get("content")
    if content is None and not fields.get("tool_calls"):
        raise ArgumentError(f"{where}: has neither content nor tool_calls")
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if content is not None and not isinstance(content, str) and not is_parts:
        raise ArgumentError(f"{where}: expected content to be text or a list of parts, got {content!r:.80}")
    return fields


def _plain(value: Any, where: str) -> Any:
    """A copy of `value` in plain JSON types: a template must get no object whose methods do something."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{where}: expected text, numbers, lists and mappings only: {error}") from error


def _compile(source: str) -> jinja2.Template:
    import jinja2

    from headrace.text.template_language import build_environment

    try:
        return build_environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        message = f"The model's chat template is broken: line {error.lineno}: {error.message}"
        raise TemplateError(message, hint=_HINT) from error
    except Exception as error:  # names that are not valid, nesting too deep: whatever a strange program brings about
        raise TemplateError(f"The model's chat template is broken: {error!r}", hint=_HINT) from error


def _run(template: jinja2.Template, variables: dict[str, Any]) -> str:
    import jinja2

    from headrace.text.template_language import Environment

    pieces: list[str] = []
    length = 0
    environment = template.environment
    assert isinstance(environment, Environment)
    environment.begin_rendering()
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_PROMPT_CHARACTERS:
                raise OverflowError(f"more than {MAX_PROMPT_CHARACTERS} characters")
    except Exception as error:  # a strange program: it refuses, adds text to numbers, loops without end, ...
        if type(error) is jinja2.TemplateError:
            raise TemplateError(f"The chat template refuses the conversation: {error}", hint=_HINT) from error
        raise TemplateError(f"The chat template failed: {type(error).__name__}: {error}", hint=_HINT) from error
    return "".join(pieces)
