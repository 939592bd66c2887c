"""Calls of tools in the text of an answer, found while it comes: Hermes and Qwen, Llama 3, Mistral, plain JSON.

`ToolReader` takes text as it is made and gives parts: text to show, the beginning of a call, pieces of its arguments.
The pieces of a call are slices of what the model wrote, so together they are the JSON it wrote. What begins like a call
and turns out to be none, or calls a function that was not offered, is shown as text.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field

_CLOSE = "</tool_call>"
MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Part:
    """A piece of an answer: text, or of call number `call` its name (once, first) or a piece of its arguments.

    end: of a text, how many characters of the answer there are up to its end.
    """

    text: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""
    end: int = field(default=0, compare=False)


class ToolReader:
    """Reads one answer. names: the functions that were offered; most_calls: what comes after them is left out.

    strict: only what begins with the name is a call, as the grammar of strict tools has it.
    """

    def __init__(self, names: Collection[str], most_calls: int | None = None, *, strict: bool = False) -> None:
        self.num_calls = 0
        self._names, self._most_calls, self._strict = frozenset(names), most_calls, strict
        self._held = ""  # text that may yet turn out to be a mark or a call
        self._scan: CallScan | None = None
        self._shown = False  # any text: plain JSON is a call only at the very beginning
        self._num_read = 0
        self._behind_call = False
        self._in_marks = False
        self._opened = ""  # a mark that no call has followed yet

    @property
    def full(self) -> bool:
        """Whether as many calls have come as were wanted."""
        return self._most_calls is not None and self.num_calls >= self._most_calls and self._scan is None

    def push(self, text: str) -> list[Part]:
        """What can be said now that this text has come."""
        self._held += text
        self._num_read += len(text)
        parts: list[Part] = []
        while self._held and not self.full and self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back, now that nothing follows."""
        parts: list[Part] = []
        if self._scan is not None:
            raw = self._scan.raw
            if not self._scan.announced:
                parts.append(Part(raw + self._held, end=self._num_read))
        elif not self.full:
            held, self._held = self._opened + self._held, ""
            self._show(held, parts)
        self._held, self._scan = "", None
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """One step; False when more text is needed."""
        if self._scan is not None:
            return self._advance_call(parts)
        if self._in_marks:
            return self._seek_close(parts)
        if not self._shown and self._begins_json(parts):
            return self._scan is not None
        at = min((i for i in (self._held.find(mark) for mark in MARKS) if i >= 0), default=-1)
        if at >= 0:
            mark = next(mark for mark in MARKS if self._held.startswith(mark, at))
            before, self._held = self._held[:at], self._held[at:]
            self._show(before, parts)
            self._held = self._held[len(mark) :]
            self._in_marks, self._opened = True, mark
            return True
        keep = max(_overlap(self._held, mark) for mark in MARKS)
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._show(sure, parts)
        return False

    def _begins_json(self, parts: list[Part]) -> bool:
        """Whether an answer begins with a call without marks, or may yet do so."""
        rest = self._held.lstrip(_SPACE + "[,;" if self.num_calls else _SPACE)
        if not self.num_calls and rest.startswith("["):
            rest = rest[1:].lstrip(_SPACE)
        if rest.startswith("{"):
            before = self._held[: len(self._held) - len(rest)]
            self._held, self._scan = rest, CallScan(before, name_first=self._strict)
            return True
        return not rest

    def _seek_close(self, parts: list[Part]) -> bool:
        rest = self._held.lstrip(_SPACE + "[],;")
        before = self._opened and self._opened + self._held[: len(self._held) - len(rest)]
        if rest.startswith("{"):
            self._held, self._scan, self._opened = rest, CallScan(before, name_first=self._strict), ""
            return True
        if rest.startswith(_CLOSE) and not before:
            self._held, self._in_marks = rest[len(_CLOSE) :], False
            return True
        if rest and (rest.startswith(_CLOSE) or not _CLOSE.startswith(rest)):
            self._in_marks, self._held, self._opened = False, rest, ""
            self._show(before, parts)
            return True
        return False

    def _advance_call(self, parts: list[Part]) -> bool:
        scan = self._scan
        assert scan is not None
        used = scan.push(self._held)
        self._held = self._held[used:]
        if scan.name is not None and scan.name not in self._names:
            scan.broken = True
        if scan.broken and not scan.announced:
            self._scan = None
            self._show(scan.raw, parts)
            self._in_marks = False
            return True
        if scan.name is not None and not scan.announced and scan.begun:
            scan.announced = True
            parts.append(Part(call=self.num_calls, name=scan.name))
        if scan.announced and (piece := scan.take()):
            parts.append(Part(call=self.num_calls, arguments=piece))
        if not scan.closed and not scan.broken:
            return False
        return self._end_call(scan, parts)

    def _end_call(self, scan: CallScan, parts: list[Part]) -> bool:
        self._scan = None
        self._behind_call = scan.name is not None
        if scan.announced:
            self.num_calls += 1
        elif scan.name is not None:  # a call without arguments
            parts += [Part(call=self.num_calls, name=scan.name), Part(call=self.num_calls, arguments="{}")]
            self.num_calls += 1
        else:
            self._show(scan.raw, parts)
            self._in_marks = False
        return True

    def _show(self, text: str, parts: list[Part]) -> None:
        """Gives text that stands right before what is held. What only parts it from a call goes with the call."""
        if self._behind_call:
            text = text.lstrip(_SPACE + "],;")
        if text:
            self._behind_call = False
            self._shown = self._shown or bool(text.strip())
            parts.append(Part(text, end=self._num_read - len(self._held)))


class CallScan:
    """Follows one JSON object {"name": ..., "arguments": {...}}, character by character."""

    def __init__(self, before: str, *, name_first: bool = False) -> None:
        self.raw, self._name_first = before, name_first
        self.name: str | None = None
        self.announced = self.begun = self.closed = self.broken = False
        self._depth, self._in_string, self._escaped = 0, False, False
        self._key: str | None = None  # whose value comes
        self._token: list[str] = []  # of the key or the value at depth 1
        self._pending: list[str] = []  # of the arguments
        self._expects_value = False

    def take(self) -> str:
        """The piece of the arguments that has come since the last time."""
        piece, self._pending = "".join(self._pending), []
        return piece

    def push(self, text: str) -> int:
        """Reads on; how many characters were read, fewer than all where the object ends."""
        for i, character in enumerate(text):
            self._read(character)
            if self.closed or self.broken:
                self.raw += text[: i + 1]
                return i + 1
        self.raw += text
        return len(text)

    def _read(self, character: str) -> None:
        if self._in_string:
            self._collect(character)
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
            return
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
            if self._depth == 1:
                return
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._end_value()
                self.closed = True
                return
        elif self._depth == 1 and character == ":" and not self._expects_value:
            self._end_key()
            return
        elif self._depth == 1 and character == ",":
            self._end_value()
            return
        self._collect(character)

    def _collect(self, character: str) -> None:
        if self._expects_value and self._key in ("arguments", "parameters"):
            if (not self.begun or self._depth == 1) and character in _SPACE:
                return
            if not self.begun and character != "{":
                self.broken = True  # arguments are an object
            self.begun = True
            self._pending.append(character)
        else:
            self._token.append(character)

    def _end_key(self) -> None:
        raw = "".join(self._token)
        if self._name_first and self._key is None and raw.strip() != '"name"':
            self.broken = True
        try:
            self._key = json.loads(raw)
        except ValueError:
            self.broken = True
        self._token, self._expects_value = [], True

    def _end_value(self) -> None:
        if self._expects_value and self._key == "name":
            try:
                name = json.loads("".join(self._token))
            except ValueError:
                name = None
            self.name, self.broken = (name, False) if isinstance(name, str) else (None, True)
        self._token, self._expects_value = [], False


def _overlap(text: str, mark: str) -> int:
    """The longest end of the text that begins the mark."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[len(text) - length :]):
            return length
    return 0
