"""The text stream against decoding everything at once: same text, never too early, never too late."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ArgumentError
from headrace.text.stream import TextStream
from headrace.text.tokenizer import Tokenizer

CONTROL = 3

stops_of_ab = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4)
texts_of_ab = st.text(alphabet="abé😀", max_size=40)


@pytest.fixture(scope="module")
def tokenizer(byte_level_metadata) -> Tokenizer:
    """One token per byte, a few for several (also for parts of a character), and a control token, the last."""
    return Tokenizer.from_metadata(byte_level_metadata([("<|im_end|>", CONTROL)]))


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: text up to the stop string completed first, the longest of those completed there."""
    for end in range(1, len(text) + 1):
        completed = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(completed)], True
    return text, False


def undecided_len(text: str, stops: list[str]) -> int:
    """How much of the end of `text` may still become a stop string."""
    beginnings = (stop[:length] for stop in stops for length in range(len(stop)))
    return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


@settings(max_examples=800, deadline=None)
@given(ids=st.lists(st.integers(0, 265), max_size=30), skip_special=st.booleans())
def test_same_text_as_decode(tokenizer, ids, skip_special):
    stream = TextStream(tokenizer, skip_special=skip_special)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip_special)


@settings(max_examples=800, deadline=None)
@given(ids=st.lists(st.integers(0, 265), max_size=30), stops=st.lists(st.text(max_size=2, min_size=1), max_size=3))
def test_same_text_as_decode_up_to_a_stop(tokenizer, ids, stops):
    stream = TextStream(tokenizer, stops)
    shown = "".join(stream.push(i) for i in ids) + stream.finish()
    assert (shown, stream.stopped) == first_stop(tokenizer.decode(ids), stops)


@settings(max_examples=1500, deadline=None)
@given(text=texts_of_ab, stops=stops_of_ab)
def test_shows_what_is_decided_and_nothing_else(tokenizer, text, stops):
    stream = TextStream(tokenizer, stops)
    shown = come = ""
    for character in text:
        ids = tokenizer.encode(character)
        assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)  # a character is not shown in parts
        shown, come = shown + stream.push(ids[-1]), come + character
        cut, stopped = first_stop(come, stops)
        assert stream.stopped == stopped
        assert shown == (cut if stopped else come[: len(come) - undecided_len(come, stops)])
    assert shown + stream.finish() == first_stop(text, stops)[0]


@settings(max_examples=300, deadline=None)
@given(text=texts_of_ab, stops=stops_of_ab)
def test_token_borders_do_not_matter(tokenizer, text, stops):
    whole, single = TextStream(tokenizer, stops), TextStream(tokenizer, stops)
    by_tokens = "".join(whole.push(i) for i in tokenizer.encode(text)) + whole.finish()
    by_bytes = "".join(single.push(i) for i in _byte_ids(tokenizer, text)) + single.finish()
    assert by_tokens == by_bytes


def _byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    id_of = {tokenizer.token_bytes(i): i for i in range(256)}
    return [id_of[bytes([byte])] for byte in text.encode()]


def test_invalid_bytes_are_shown_once_they_are_certainly_invalid(tokenizer):
    id_of = {tokenizer.token_bytes(i): i for i in range(256)}
    stream = TextStream(tokenizer)
    pieces = [stream.push(id_of[byte]) for byte in (b"\xf0", b"\x9f", b"a", b"\xff", b"\xe4", b"\xb8")]
    assert pieces == ["", "", "\ufffda", "\ufffd", "", ""]
    assert stream.finish() == "\ufffd"


def test_a_stop_string_ends_the_stream(tokenizer):
    stream = TextStream(tokenizer, "lo w")
    pieces = [stream.push(i) for i in tokenizer.encode("hello world")]
    assert "".join(pieces) == "hel"
    assert stream.stopped and stream.push(0) == "" and stream.finish() == ""


def test_control_tokens_are_not_part_of_a_stop_string(tokenizer):
    end = tokenizer.vocab_size - 1
    ids = [*tokenizer.encode("a"), end, *tokenizer.encode("b")]
    hidden, visible = TextStream(tokenizer, "ab"), TextStream(tokenizer, "m_end", skip_special=False)
    assert "".join(map(hidden.push, ids)) == "" and hidden.stopped
    assert "".join(map(visible.push, ids)) == "a<|i" and visible.stopped


def test_a_long_stop_string_costs_no_more(tokenizer):
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    stream = TextStream(tokenizer, "a" * 20_000 + "b")
    shown = [stream.push(a) for _ in range(60_000)]
    assert "".join(shown) == "a" * 40_000 and stream.push(b) == "" and stream.stopped


def test_the_space_before_a_text_is_taken_off_unless_the_text_continues(scored_metadata):
    tokenizer = Tokenizer.from_metadata(scored_metadata([("▁", -1), ("a", -2), ("▁a", 0)]))
    ids = tokenizer.encode("a a", add_special=False)
    for continues, expected in ((False, "a a"), (True, " a a")):
        stream = TextStream(tokenizer, continues=continues)
        assert "".join(map(stream.push, ids)) + stream.finish() == expected
    assert tokenizer.decode(ids) == "a a"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [None], [3]])
def test_stop_strings_are_checked(tokenizer, stop):
    with pytest.raises(ArgumentError, match="stop"):
        TextStream(tokenizer, stop)


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(ArgumentError, match="token id"):
        TextStream(tokenizer).push(10**6)
