"""What the command line says on stderr: errors, progress, and how fast an answer came.

stdout is left to data. Nothing here needs colour or a terminal: without one, progress becomes a few plain lines.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.completion import Completion

_QUIET_S = 1.0  # what is over sooner says nothing
_TERMINAL_PERIOD_S = 0.1
_PLAIN_PERIOD_S = 10.0


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """Shows work that lasts: call it with (message, done, total or None); as a context manager it cleans up after."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._message: str | None = None
        self._due_s = 0.0
        self._width = 0

    def __call__(self, message: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if message != self._message:
            self._message, self._due_s = message, now + _QUIET_S
        if now < self._due_s:
            return
        self._due_s = now + (_TERMINAL_PERIOD_S if self._terminal else _PLAIN_PERIOD_S)
        text = f"{message} {min(1.0, done / total):.0%}" if total else message
        if self._terminal:
            self._overwrite(text)
        else:
            say(text)

    def _overwrite(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._width) + ("" if text else "\r"))
        sys.stderr.flush()
        self._width = len(text)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._overwrite("")


def speed_line(completion: Completion) -> str:
    """Tokens/s of prefill and decode, GB/s, share of the measured roof, hash of the last logits."""
    timings = completion.timings
    parts = [
        f"prefill {_tokens_per_s(timings.prefill_tokens_per_s)}",
        f"decode {_tokens_per_s(timings.decode_tokens_per_s)}",
    ]
    if timings.decode_tokens_per_s:
        parts.append(f"{completion.gb_per_s:.1f} GB/s")
        if completion.roof_fraction is not None:
            roof = completion.gb_per_s / completion.roof_fraction if completion.roof_fraction else 0.0
            parts.append(f"{completion.roof_fraction:.0%} of the {roof:.1f} GB/s roof")
    return " | ".join([*parts, f"logits {completion.logits_hash}"])


def _tokens_per_s(rate: float) -> str:
    return f"{rate:.1f} tokens/s" if rate else "-"
