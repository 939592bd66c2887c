"""The pace of steps: how many tokens of prompts go beside running answers without holding them up for long.

A step takes what its answers take alone, and more for each token of a prompt. Both are measured as steps go by, so that
a step with prompts takes at most `_MOST_SLOWDOWN` times as long as one without. What is computed never depends on it.

A machine that others use as well takes longer now and then for no reason of ours. So what steps took longer is added
up, shorter ones included, and divided by the prompts' tokens in them: noise cancels, and a step with few tokens, of
which noise says most, counts little. More than twice as many tokens as were tried lately are not tried.
"""

from __future__ import annotations

_MOST_SLOWDOWN = 1.8  # of the 2 that answers may be held up: what is measured varies
_FIRST_TOKENS = 8  # before anything is known
_MEMORY = 0.8  # how much of an estimate the next measurement leaves


class Pace:
    """Seconds of steps by number of answers, and seconds of a prompt's token beside them."""

    def __init__(self) -> None:
        self._step_s: dict[int, float] = {}
        self._extra_s = self._extra_tokens = 0.0  # beyond answers alone: seconds, and the prompts' tokens they were for
        self._tried = 0.0  # the most of these in a step lately

    def observe(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """A step took this long."""
        if not answers:
            return
        if not prompt_tokens:
            self._step_s[answers] = _blend(self._step_s.get(answers), seconds)
        elif (alone := self.step_s(answers)) is not None:
            self._extra_s = _MEMORY * self._extra_s + seconds - alone
            self._extra_tokens = _MEMORY * self._extra_tokens + prompt_tokens
            self._tried = max(prompt_tokens, _MEMORY * self._tried)

    def prompt_tokens(self, answers: int) -> int:
        """Tokens of prompts for a step with so many answers. As many as these at least: the weights are read once for
        all, so another token takes no longer than those that are there, on average."""
        alone, least = self.step_s(answers), max(answers, 1)
        if alone is None or not self._extra_tokens or self._extra_s <= 0:
            return max(_FIRST_TOKENS, least)
        allowed = (_MOST_SLOWDOWN - 1) * alone * self._extra_tokens / self._extra_s
        return max(int(min(allowed, 2 * self._tried)), least)

    def step_s(self, answers: int) -> float | None:
        """Seconds of a step of answers alone, by the nearest number of them that was measured."""
        if answers in self._step_s:
            return self._step_s[answers]
        nearest = min(self._step_s, key=lambda count: abs(count - answers), default=None)
        return None if nearest is None else self._step_s[nearest]


def _blend(before: float | None, now: float) -> float:
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now
