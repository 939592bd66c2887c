"""Guesses of what comes next, to be verified many at once: a step of several tokens costs little more than one of one.

A guess is right when the model draws the same token there, with the random number that is due there. So an answer is
the one that would have come without guesses, token for token, drawn or greedy; guesses only change how long it takes.
From earlier text (prompt lookup, Saxena 2023): what followed the last place where the text ended as it does now.
Speculative decoding: Leviathan et al. 2023, Chen et al. 2023, who accept more guesses but draw other texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from headrace.engine.pace import Pace
from headrace.engine.request import Request
from headrace.engine.scheduler import Part

_LONGEST, _SHORTEST = 4, 2  # tokens that must have stood there before
_MEMORY = 0.8  # how much of an estimate the next step leaves
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 512  # tokens without guesses after they did not pay


class Drafts(Protocol):
    """What guesses for many requests at once."""

    def guess(self, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Up to `most` tokens for each request."""


class Guesser:
    """Gives requests that ask for it (`SamplingParams.speculate`) guesses for the next step, and learns from it.

    drafts: another model's; without one guesses come from the request's earlier text. room: outputs of a step.
    """

    def __init__(self, drafts: Drafts | None, room: int) -> None:
        self.num_guessed = self.num_accepted = 0
        self._drafts, self._room = drafts, room
        self._known: dict[Request, tuple[Lookup, Trust]] = {}

    def prepare(self, running: Sequence[Request], pace: Pace) -> None:
        """Sets the guesses of all running requests."""
        room = self._room - len(running)
        wanting = list[tuple[Request, int]]()
        for request in running:
            request.guesses = []
            if request.params.speculate and pace.step_s(1) is not None:
                most = min(self._allowed(request), room)
                if most > 0:
                    room -= most
                    wanting.append((request, most))
        for (request, most), guesses in zip(wanting, self._guess(wanting), strict=True):
            request.guesses = guesses[:most]
        if self._known:
            self._known = {request: known for request, known in self._known.items() if not request.finish_reason}

    def learn(self, parts: Sequence[Part], tokens: Sequence[Sequence[int]], seconds: float, pace: Pace) -> None:
        """What became of the guesses in a step that took so long."""
        if not self._known:
            return
        alone = pace.step_s(len(parts))
        for part, drawn in zip(parts, tokens, strict=True):
            request = part.request
            if request.guesses and drawn and alone:
                right = len(drawn) - 1
                _note(request, right)
                self.num_guessed += len(request.guesses)
                self.num_accepted += right
                self._known[request][1].observe(right, seconds / alone)

    def _allowed(self, request: Request) -> int:
        if request.pending_len != 1 or request.edits.constraint:
            return 0
        _, trust = self._known.setdefault(request, (Lookup(), Trust(request.params.speculate)))
        left = min(request.most_tokens - len(request.ids), request.params.max_tokens - len(request.token_ids))
        return min(trust.allowed(), left - 1)

    def _guess(self, wanting: Sequence[tuple[Request, int]]) -> list[list[int]]:
        if self._drafts and wanting:
            return self._drafts.guess([request for request, _ in wanting], max(most for _, most in wanting))
        return [self._known[request][0].guess(request.ids, most) for request, most in wanting]


def _note(request: Request, right: int) -> None:
    request.num_drafts += 1
    request.num_guessed += len(request.guesses)
    request.num_accepted += right
    request.accepted_at += [0] * (right - len(request.accepted_at))
    for place in range(right):
        request.accepted_at[place] += 1


class Lookup:
    """Where a text's endings stood before. Costs the same per token however long the text is."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # of some tokens in a row: the place behind them
        self._known_len = 0

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that could follow `ids`, which only ever grows between calls."""
        for end in range(max(self._known_len, _SHORTEST), len(ids)):  # the text's own end leads nowhere yet
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[tuple(ids[end - length : end])] = end
        self._known_len = max(len(ids), self._known_len)
        for length in range(min(_LONGEST, len(ids)), _SHORTEST - 1, -1):
            if end := self._ends.get(tuple(ids[len(ids) - length :]), 0):
                return list(ids[end : end + most])
        return []


class Trust:
    """How many guesses are worth a request's while: none for a while after they did not pay.

    A step with guesses takes `cost` times as long as one without and gives the accepted ones more.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._gain = 1.0  # tokens of a step with guesses, over what it takes in steps without
        self._pause, self._left = _FIRST_PAUSE, 0

    def allowed(self) -> int:
        """Guesses for the next step."""
        if self._left:
            self._left -= 1
            return 0
        return self.most

    def observe(self, accepted: int, cost: float) -> None:
        """A step with guesses gave so many more tokens than one and took `cost` steps."""
        self._gain = _MEMORY * self._gain + (1 - _MEMORY) * (1 + accepted) / cost
        if self._gain >= 1:
            self._pause = _FIRST_PAUSE
            return
        self._left = self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._gain = 1.0


def num_accepted(guesses: Sequence[int], drawn: Sequence[int]) -> int:
    """How many guesses are what was drawn in their place; `drawn` has one token more than there are guesses."""
    for i, guess in enumerate(guesses):
        if guess != drawn[i]:
            return i
    return len(guesses)
