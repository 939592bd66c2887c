"""Finding fixed strings in a text: the longest one at each place, the leftmost place first.

Vocabularies have up to thousands of tokens that are matched whole (`<|im_end|>`, `<unused42>`, ...). Most places of a
text cannot begin one, so a scan for their first characters comes first, and only there the few lengths are tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping


class LiteralFinder:
    """Splits text at the strings of a table."""

    def __init__(self, values: Mapping[str, int]) -> None:
        self._values = {literal: value for literal, value in values.items() if literal}
        lengths: dict[str, set[int]] = {}
        for literal in self._values:
            lengths.setdefault(literal[0], set()).add(len(literal))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield (literal, its value) and (text between, None) in order; texts between may be empty."""
        begin = 0
        for start, stop in self._find(text):
            yield text[begin:start], None
            yield text[start:stop], self._values[text[start:stop]]
            begin = stop
        yield text[begin:], None

    def _find(self, text: str) -> Iterator[tuple[int, int]]:
        place = 0
        while self._first and (match := self._first.search(text, place)):
            start = place = match.start()
            ends = (start + length for length in self._lengths[text[start]])
            stop = next((end for end in ends if text[start:end] in self._values), None)
            if stop is not None:
                yield start, stop
            place = stop or start + 1
