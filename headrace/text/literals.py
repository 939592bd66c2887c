"""Finding fixed strings in a text: the longest one at each place, the leftmost place first.

Vocabularies have up to thousands of tokens that are matched whole (`<|im_end|>`, `<unused42>`, ...). Most places of a
text cannot begin one, so a scan for their first characters comes first, and only there the few lengths are tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property


class LiteralFinder:
    """Splits text at the strings of a table."""

    def __init__(self, values: Mapping[str, int]) -> None:
        self._values = {literal: value for literal, value in values.items() if literal}
        lengths: dict[str, set[int]] = {}
        for literal in self._values:
            lengths.setdefault(literal[0], set()).add(len(literal))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None

    @property
    def literals(self) -> list[str]:
        """The strings."""
        return list(self._values)

    @cached_property
    def longest(self) -> int:
        """The length of the longest."""
        return max(map(len, self._values), default=0)

    @cached_property
    def beginnings(self) -> frozenset[str]:
        """What they begin with, without what is whole."""
        return frozenset(literal[:i] for literal in self._values for i in range(1, len(literal)))

    @cached_property
    def ends(self) -> frozenset[str]:
        """What they end with, without what is whole."""
        return frozenset(literal[i:] for literal in self._values for i in range(1, len(literal)))

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield (literal, its value) and (text between, None) in order; texts between may be empty."""
        begin = 0
        for start, stop in self._find(text):
            yield text[begin:start], None
            yield text[start:stop], self._values[text[start:stop]]
            begin = stop
        yield text[begin:], None

    def found(self, text: str) -> Iterator[str]:
        """Those that `split` finds."""
        return (text[start:stop] for start, stop in self._find(text))

    def starts(self, text: str) -> Iterator[int]:
        """Every place where one begins, also inside another."""
        for match in self._first.finditer(text) if self._first else ():
            if self._stop(text, match.start()) is not None:
                yield match.start()

    def _find(self, text: str) -> Iterator[tuple[int, int]]:
        place = 0
        while self._first and (match := self._first.search(text, place)):
            start = place = match.start()
            stop = self._stop(text, start)
            if stop is not None:
                yield start, stop
            place = stop or start + 1

    def _stop(self, text: str, start: int) -> int | None:
        """Where the longest one ends that begins at `start`."""
        ends = (start + length for length in self._lengths[text[start]])
        return next((end for end in ends if text[start:end] in self._values), None)
