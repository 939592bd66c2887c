"""An answer read from the bytes of its connection is the same wherever they were cut, and says why it is not whole."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.serving_answer import Answer, read_answer

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def event(data: Any) -> bytes:
    return b"data: " + (data.encode() if isinstance(data, str) else json.dumps(data).encode()) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def text(said: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"text": said, "finish_reason": reason}]})


EVENTS = [text("The "), b": keep-alive\n\n", text("mïll"), text("", "length"), event({"choices": [], "usage": USAGE})]
WHOLE = HEAD + b"".join(map(chunk, [*EVENTS[:1], EVENTS[1] + EVENTS[2], *EVENTS[3:], event("[DONE]")])) + chunk(b"")


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    pieces = [(float(i), WHOLE[first:last]) for i, (first, last) in enumerate(pairwise(edges))]
    answer = read_answer([piece for piece in pieces if piece[1]])
    assert (answer.status, answer.error, answer.text, answer.finish_reason) == (200, "", "The mïll", "length")
    assert (answer.prompt_tokens, answer.answer_tokens) == (7, 3)
    assert len(answer.text_s) == 2 and answer.text_s == sorted(answer.text_s)


def test_a_piece_came_when_its_last_byte_did() -> None:
    first, second = chunk(text("a")), chunk(text("b"))
    pieces = [(1.0, HEAD), (2.0, first + second[:-9]), (3.0, second[-9:])]
    assert read_answer(pieces, start=0.5).text_s == [1.5, 2.5]


def test_chats_are_read_and_roles_are_no_text() -> None:
    said = [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    events = [event({"choices": [{"delta": delta, "finish_reason": None}]}) for delta in said]
    answer = read_answer([(1.0, HEAD + b"".join(map(chunk, events)))])
    assert answer.text == "a" and answer.text_s == [1.0]


@pytest.mark.parametrize(
    ("raw", "why", "error"),
    [
        (b"", "", "no answer"),
        (b"", "no answer in time", "no answer in time"),
        (WHOLE[: WHOLE.index(b"[DONE]")], "", "cut short"),
        (WHOLE[: WHOLE.index(b"[DONE]")], "left", "left"),
        (HEAD + chunk(event({"error": {"code": "shutting_down"}})), "", "in the stream: shutting_down"),
        (b'HTTP/1.1 429 No\r\nContent-Length: 9\r\n\r\n{"error": {"code": "queue_full"}}', "", "429 queue_full"),
        (b"HTTP/1.1 502 No\r\n\r\n<html>", "", "502"),
    ],
)
def test_what_is_missing_has_a_reason(raw: bytes, why: str, error: str) -> None:
    assert read_answer([(0.0, raw)] if raw else [], 0.0, why).error == error


def test_a_body_without_events_is_kept() -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\na 1\n"
    assert read_answer([(0.0, raw)]) == Answer(200, body="a 1\n")
