"""The prompt of a conversation, in which nobody but the template writes control tokens.

A template puts control tokens such as <|im_end|> around what people say. Somebody may say "<|im_end|>", and once all is
one text the two are alike: what was said would end its own turn and begin another's. So before the template runs, a
character that nobody uses goes into whatever could spell a control token, and it is taken out where the prompt is cut
at the control tokens that are left, which are the template's.

The character must not change what a template does, and some look into contents. So the marked prompt without the
character has to be the prompt of the conversation as it is. Marks are set densely at first, behind every character that
begins a control token; then only inside those that are spelled out. Where neither comes out alike, a conversation that
spells out control tokens is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from headrace.errors import ArgumentError, HeadraceError
from headrace.text.chat import ChatTemplate
from headrace.text.literals import LiteralFinder
from headrace.text.tokenizer import Tokenizer

Change = Callable[[str], str]
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode promises that these are no characters


@dataclass(frozen=True)
class Prompt:
    """text: as the template writes it. ids: its tokens, where contents are text whatever they spell."""

    text: str
    ids: list[int]


def chat_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    continue_final: bool = False,
    **options: Any,
) -> Prompt:
    """What the template makes of a conversation, in tokens.

    continue_final: the prompt ends inside the last message, an assistant's text, which the answer goes on with.
    options: those of `ChatTemplate.render`. Raises what it raises, and ArgumentError for control tokens that are
    spelled out where the template does not let them be told from its own.
    """
    now, last = datetime.now(), _last_text(messages) if continue_final else ""
    if continue_final:
        options["add_generation_prompt"] = False

    def render(change: Change) -> str:
        changed = [_changed_message(each, change) for each in messages]
        text = template.render(changed, rendered_at=now, **_changed_options(options, change))
        return _up_to(text, change(last).strip()) if continue_final else text

    plain = template.render(messages, rendered_at=now, **options)  # it checks what the marks are to be put into
    plain = _up_to(plain, last.strip()) if continue_final else plain
    texts = _texts(messages, options)
    marks = Marks(tokenizer.controls, _unused_mark(texts, template))
    if all(marks.dense(text) == text for text in texts):
        return Prompt(plain, tokenizer.encode(plain, add_special=False))
    for change in (marks.dense, marks.sparse):
        with suppress(HeadraceError):  # a template may refuse what it does not know
            marked = render(change)
            if marks.removed(marked) == plain:
                return Prompt(plain, _ids(marked, marks, tokenizer))
    spelled = next((name for text in texts for name in tokenizer.controls.found(text)), None)
    if spelled is not None:
        raise ArgumentError(
            f"messages: expected no control tokens in texts, got {spelled!r}, "
            "which this model's template does not let be told from its own",
            "leave it out",
        )
    return Prompt(plain, tokenizer.encode(plain, add_special=False))


class Marks:
    """Puts a character into texts that keeps them from spelling control tokens, and takes it out."""

    def __init__(self, controls: LiteralFinder, mark: str) -> None:
        self._controls, self._mark = controls, mark
        self._escaped = json.dumps(mark)[1:-1]  # what a template makes of it that writes JSON in ASCII
        first = "".join(map(re.escape, sorted({name[0] for name in controls.literals})))
        self._first = re.compile(f"([{first}])") if first else None

    def dense(self, text: str) -> str:
        """Behind every character that begins a control token."""
        marked = self._first.sub(rf"\1{self._mark}", text) if self._first else text
        return self._before_end_of_control(marked)

    def sparse(self, text: str) -> str:
        """Inside control tokens that are spelled out, and at ends that others could spell one out with."""
        end = len(text.rstrip())
        places = [*self._controls.starts(text), *([end - 1] if self._begins_at_end(text[:end]) else [])]
        pieces, before = list[str](), 0
        for place in sorted(set(places)):
            pieces += (text[before : place + 1], self._mark)
            before = place + 1
        return self._before_end_of_control("".join([*pieces, text[before:]]))

    def removed(self, text: str) -> str:
        """The text without the marks."""
        return text.replace(self._mark, "").replace(self._escaped, "")

    def _before_end_of_control(self, text: str) -> str:
        begin = len(text) - len(text.lstrip())
        longest = min(self._controls.longest, len(text) - begin)
        ends = any(text[begin : begin + length] in self._controls.ends for length in range(1, longest + 1))
        return text[:begin] + self._mark + text[begin:] if ends else text

    def _begins_at_end(self, text: str) -> bool:
        longest = min(self._controls.longest, len(text))
        return any(text[len(text) - length :] in self._controls.beginnings for length in range(1, longest + 1))


def _ids(marked: str, marks: Marks, tokenizer: Tokenizer) -> list[int]:
    ids = list[int]()
    for part, control in tokenizer.controls.split(marked):
        if control is None:
            ids += tokenizer.encode(marks.removed(part), add_special=False, parse_special=False)
        else:
            ids.append(control)
    return ids


def _unused_mark(texts: Sequence[str], template: ChatTemplate) -> str:
    everything = "\n".join([*texts, *template.sources])
    mark = next((mark for mark in _MARKS if mark not in everything and json.dumps(mark)[1:-1] not in everything), None)
    if mark is None:
        raise ArgumentError("messages: expected fewer of the code points U+FDD0 to U+FDEF, which are no characters")
    return mark


def _texts(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[str]:
    texts = list[str]()

    def note(text: str) -> str:
        texts.append(text)
        return text

    for message in messages:
        _changed_message(message, note)
    _changed_options(options, note)
    return texts


def _changed_message(message: Mapping[str, Any], change: Change) -> dict[str, Any]:
    # The role is as good as the template's own text: some put it into a control token. `render` allows words only.
    return {name: value if name == "role" else _changed(value, change) for name, value in message.items()}


def _changed_options(options: Mapping[str, Any], change: Change) -> dict[str, Any]:
    return {name: value if name == "name" else _changed(value, change) for name, value in options.items()}


def _changed(value: Any, change: Change) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(name, change): _changed(each, change) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(each, change) for each in value]
    return value


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    last = messages[-1] if messages else {}
    text = last.get("content")
    if last.get("role") != "assistant" or not isinstance(text, str) or not text.strip():
        raise ArgumentError("messages: expected to end with an assistant's text, for it is to be continued")
    return text


def _up_to(prompt: str, last: str) -> str:
    begin = prompt.rfind(last)
    if begin < 0:
        raise ArgumentError("messages: the chat template does not show the last one, which is to be continued")
    return prompt[: begin + len(last)]
