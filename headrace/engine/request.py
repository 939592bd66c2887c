"""A request: a prompt as token ids, how to draw from it, and what has come of it so far."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from headrace.config import SamplingParams
from headrace.engine.sequence import CachedSequence
from headrace.kv_cache.prefix import Node


@dataclass(eq=False)
class Request:
    """One answer in the making. Lengths in tokens, times in seconds.

    seed: of its draws; the n-th of them depends on the seed, n and the logits alone. copies: requests for other answers
    to the same prompt, which begin when it has been computed.
    """

    prompt_ids: list[int]
    params: SamplingParams
    end_ids: frozenset[int] = frozenset()
    most_tokens: int = 2**62  # of prompt and answer together
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "cancelled"
    sequence: CachedSequence = field(default_factory=CachedSequence)
    nodes: list[Node] = field(default_factory=list)  # of its full pages, in the prefix cache
    copies: list[Request] = field(default_factory=list)
    seed: int = -1
    guesses: list[int] = field(default_factory=list)  # of the tokens behind its text, for the next step
    num_guessed: int = 0
    num_accepted: int = 0
    num_preemptions: int = 0
    reused_len: int = 0  # prompt tokens whose keys were in the cache already
    prefill_s: float = 0.0
    decode_s: float = 0.0
    logits_hash: str = ""

    def __post_init__(self) -> None:
        self.ids = [*self.prompt_ids, *self.token_ids]  # prompt and answer
        if self.seed < 0:
            self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def pending_len(self) -> int:
        """Tokens of the text that are not computed yet; 1 while it decodes."""
        return len(self.ids) - len(self.sequence.ids)

    def commit(self, token: int) -> None:
        """Takes a drawn token, and finishes when it ends the text or nothing more fits."""
        self.token_ids.append(token)
        self.ids.append(token)
        if token in self.end_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_tokens or len(self.ids) >= self.most_tokens:
            self.finish_reason = "length"

    def add_seconds(self, seconds: float) -> None:
        """Books a step that it had a part in."""
        if self.token_ids:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds
