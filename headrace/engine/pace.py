"""The pace of steps: how many tokens of prompts go beside running answers without holding them up for long.

A step takes what its answers take alone, and more for each token of a prompt, the more the deeper that token is. Both
are measured as steps go by, so that a step with prompts takes at most `_MOST_SLOWDOWN` times as long as one without.
What is computed never depends on it.

A machine that others use as well takes longer now and then for no reason of ours. So both are medians: of the last
steps without prompts, and of what each of the last steps with them took longer, a token. More than twice as many tokens
as were tried lately are not tried.
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

_MOST_SLOWDOWN = 1.8  # of the 2 that answers may be held up: what is measured varies
_FIRST_TOKENS = 8  # before anything is known
_REMEMBERED = 16  # steps of each kind
_MOST_STEPS = 64  # with prompts, until one without tells anew what answers take alone
_MEMORY = 0.8  # how much of the most tokens tried each further step leaves


class Pace:
    """Seconds of the last steps by number of answers, and seconds of a prompt's token beside them."""

    def __init__(self) -> None:
        self._alone_s: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._token_s = deque[float](maxlen=_REMEMBERED)
        self._tried = 0.0  # the most tokens of prompts in a step lately
        self._steps = 0  # with prompts since the last one without

    def observe(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """A step took this long."""
        if not answers:
            return
        if not prompt_tokens:
            self._alone_s[answers].append(seconds)
            self._steps = 0
        elif (alone := self.step_s(answers)) is not None:
            self._token_s.append((seconds - alone) / prompt_tokens)
            self._tried = max(prompt_tokens, _MEMORY * self._tried)
            self._steps += 1

    def prompt_tokens(self, answers: int) -> int:
        """Tokens of prompts for a step with so many answers; a quarter as many as these at least, so that prompts get
        on. None now and then, and where so many answers are new: the step then tells what they take alone."""
        alone, least = self.step_s(answers), max(answers // 4, 1)
        if alone is None or not self._token_s:
            return max(_FIRST_TOKENS, least)
        if self._steps >= _MOST_STEPS or not self._is_known(answers):
            return 0
        token_s, most = median(self._token_s), max(int(2 * self._tried), least)
        if token_s <= 0:
            return most
        return min(max(int((_MOST_SLOWDOWN - 1) * alone / token_s), least), most)

    def _is_known(self, answers: int) -> bool:
        return any(abs(count - answers) <= answers // 8 for count in self._alone_s)

    def step_s(self, answers: int) -> float | None:
        """Seconds of a step of answers alone, by the nearest number of them that was measured."""
        if not self._alone_s:
            return None
        return median(self._alone_s[min(self._alone_s, key=lambda count: abs(count - answers))])
