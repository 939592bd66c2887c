"""Text while it is being generated: what can be shown after each token, and no more.

Two things must not be seen. Half a character: a token is bytes, and a character may come in several tokens; the
incremental UTF-8 decoder holds the first half back. Half of a stop string: what might still become one is held back
until it does (then the text ends before it) or cannot any more (then it is shown).

Each stop string is followed by the Knuth-Morris-Pratt automaton, one character at a time, so the cost is linear in
the text whatever the stop strings are. A stop string counts at its last character: the first to be completed ends the
text, and of those completed by the same character the longest. So the result does not depend on token borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from encodings import utf_8

from headrace.errors import ArgumentError
from headrace.text.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text piece by piece.

    The pieces of `push` and `finish` together are `tokenizer.decode(ids)`, up to the first stop string.

    stop: one string or several, never shown.
    skip_special: leave control tokens out, as `decode` does.
    continues: the ids go on from earlier text, so a space at their beginning belongs to the text. Otherwise one that
        a SentencePiece tokenizer puts before every text is taken off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str] = (),
        *,
        skip_special: bool = True,
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._watches = [_StopWatch(text) for text in _checked_stops(stop)]
        self._skip_special = skip_special
        self._at_start = not continues
        self._characters = utf_8.IncrementalDecoder("replace")
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.matched is not None

    def push(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come; often "", after a stop string always."""
        if self.stopped:
            return ""
        new_bytes, self._at_start = self._tokenizer.shown_bytes(
            token_id, at_start=self._at_start, skip_special=self._skip_special
        )
        if new_bytes.isascii() and not self._characters.buffer:  # most tokens
            return self._release(new_bytes.decode())
        return self._release(self._characters.decode(new_bytes))

    def finish(self) -> str:
        """The text that was held back, now that no token will follow."""
        if self.stopped:
            return ""
        shown = self._release(self._characters.decode(b"", final=True))
        shown, self._held = shown + self._held, ""
        return shown

    def _release(self, new_text: str) -> str:
        if not self._watches:
            return new_text
        text = self._held + new_text
        for position, character in enumerate(new_text, start=len(self._held) + 1):
            completed = [watch.stop for watch in self._watches if watch.step(character)]
            if completed:
                self.matched, self._held = max(completed, key=len), ""
                return text[: position - len(self.matched)]
        num_shown = len(text) - max(watch.matched_len for watch in self._watches)
        self._held = text[num_shown:]
        return text[:num_shown]


class _StopWatch:
    """Follows one stop string through the text: how much of it the text's end is."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched_len = 0
        self._shorter = _fallbacks(stop)

    def step(self, character: str) -> bool:
        """Take one more character; True if the stop string is now complete."""
        length = self.matched_len
        while length and self.stop[length] != character:
            length = self._shorter[length]
        self.matched_len = length + (self.stop[length] == character)
        return self.matched_len == len(self.stop)


def _fallbacks(text: str) -> list[int]:
    """For each length n: the longest beginning of `text`, shorter than n, that ends text[:n]."""
    fallbacks, length = [0, 0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = fallbacks[length]
        length += text[length] == character
        fallbacks.append(length)
    return fallbacks


def _checked_stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ArgumentError(f"stop: expected non-empty strings, got {text!r}")
    return stops
