"""The pace of steps: how many tokens of prompts go beside running answers without holding them up for long.

A step takes what its answers take alone, and more for each token of a prompt. Both are measured as steps go by, so that
a step with prompts takes at most `_MOST_SLOWDOWN` times as long as one without. What is computed never depends on it.
"""

from __future__ import annotations

_MOST_SLOWDOWN = 2.0
_FIRST_TOKENS = 8  # before anything is known
_MEMORY = 0.8  # how much of an estimate the next measurement leaves


class Pace:
    """Seconds of steps by number of answers, and seconds of a prompt's token beside them."""

    def __init__(self) -> None:
        self._step_s: dict[int, float] = {}
        self._token_s: float | None = None

    def observe(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """A step took this long."""
        if not answers:
            return
        if not prompt_tokens:
            self._step_s[answers] = _blend(self._step_s.get(answers), seconds)
        elif (alone := self.step_s(answers)) is not None:
            self._token_s = _blend(self._token_s, max(seconds - alone, 0.0) / prompt_tokens)

    def prompt_tokens(self, answers: int) -> int:
        """Tokens of prompts for a step with so many answers, one at least."""
        alone = self.step_s(answers)
        if alone is None or not self._token_s:
            return _FIRST_TOKENS
        return max(1, int((_MOST_SLOWDOWN - 1) * alone / self._token_s))

    def step_s(self, answers: int) -> float | None:
        """Seconds of a step of answers alone, by the nearest number of them that was measured."""
        if answers in self._step_s:
            return self._step_s[answers]
        nearest = min(self._step_s, key=lambda count: abs(count - answers), default=None)
        return None if nearest is None else self._step_s[nearest]


def _blend(before: float | None, now: float) -> float:
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now
