"""An answer to a streamed request, read from the bytes of its connection: status, pieces of text with times, usage."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

Piece = tuple[float, bytes]  # when bytes came, and which
_DONE = "[DONE]"


@dataclass
class Answer:
    """What came: texts as they came, when (seconds), and what the server counted. body: of an answer without events.

    error: "" where all of it came, otherwise why not, in words that are the same for the same reason.
    """

    status: int = 0
    error: str = ""
    text: str = ""
    text_s: list[float] = field(default_factory=list)  # of each event that had text
    finish_reason: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    body: str = ""


def read_answer(pieces: Sequence[Piece], start: float = 0.0, why: str = "") -> Answer:
    """Reads an HTTP response. start: the zero of times. why: what ended the connection, where it was not the server."""
    raw = b"".join(data for _, data in pieces)
    head, found, _ = raw.partition(b"\r\n\r\n")
    if not found:
        return Answer(error=why or "no answer")
    ends = list(accumulate(len(data) for _, data in pieces))
    headers = _headers(head)
    chunks = _chunks(raw, len(head) + 4, chunked=headers.get(b"transfer-encoding") == b"chunked")
    timed = [(pieces[bisect_left(ends, end)][0] - start, data) for end, data in chunks]
    answer = Answer(status=int(head.split(b" ", 2)[1]))
    if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        _read_events(answer, timed, why)
    else:
        answer.body = b"".join(data for _, data in timed).decode(errors="replace")
        answer.error = why or _error(answer.status, answer.body)
    return answer


def _headers(head: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower(): value.strip().lower() for name, _, value in lines}


def _chunks(raw: bytes, at: int, *, chunked: bool) -> Iterator[tuple[int, bytes]]:
    """The body's chunks with the places where they end; of a chunk that was cut off nothing."""
    if not chunked:
        if at < len(raw):
            yield len(raw), raw[at:]
        return
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end].partition(b";")[0], 16)
        first, at = line_end + 2, line_end + 4 + size
        if not size or first + size > len(raw):
            return
        yield first + size, raw[first : first + size]


def _read_events(answer: Answer, timed: Sequence[tuple[float, bytes]], why: str) -> None:
    done, texts = False, list[str]()
    for at_s, event in _events(timed):
        if event == _DONE:
            done = True
            continue
        data = json.loads(event)
        if "error" in data:
            answer.error = f"in the stream: {_code(data)}"
            continue
        text = "".join(_text(choice) for choice in data.get("choices", ()))
        if text:
            texts.append(text)
            answer.text_s.append(at_s)
        _note(answer, data)
    answer.text = "".join(texts)
    answer.error = answer.error or why or ("" if done else "cut short")


def _events(timed: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """The data of each event, with the time at which its end came."""
    held = b""
    for at_s, data in timed:
        *whole, held = (held + data).split(b"\n\n")
        for event in whole:
            lines = (line for line in event.decode().split("\n") if line.startswith("data: "))
            if said := "\n".join(line[6:] for line in lines):
                yield at_s, said


def _text(choice: dict[str, Any]) -> str:
    said = choice["delta"].get("content") if "delta" in choice else choice.get("text")
    return said or ""


def _note(answer: Answer, data: dict[str, Any]) -> None:
    for choice in data.get("choices", ()):
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if usage := data.get("usage"):
        answer.prompt_tokens, answer.answer_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _error(status: int, body: str) -> str:
    if status == 200:
        return ""
    try:
        return f"{status} {_code(json.loads(body))}"
    except ValueError:
        return str(status)


def _code(data: Any) -> str:
    error = data.get("error") if isinstance(data, dict) else None
    said = error if isinstance(error, dict) else {}
    return str(said.get("code") or said.get("type") or "error")
