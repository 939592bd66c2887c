"""A request: a prompt as token ids, how to draw from it, and what has come of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.config import SamplingParams


@dataclass
class Request:
    """One answer in the making. Lengths in tokens, times in seconds."""

    prompt_ids: list[int]
    params: SamplingParams
    end_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reused_len: int = 0  # prompt tokens whose keys were in the cache already
    prefill_s: float = 0.0
    decode_s: float = 0.0
    logits_hash: str = ""

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids

    def commit(self, token: int, context_len: int) -> None:
        """Takes a drawn token, and finishes when it ends the text or nothing more fits."""
        self.token_ids.append(token)
        if token in self.end_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_tokens or len(self.prompt_ids) + len(self.token_ids) >= context_len:
            self.finish_reason = "length"

    def add_seconds(self, seconds: float) -> None:
        """Books the time of the token just committed: the first one is the prefill's."""
        if len(self.token_ids) == 1:
            self.prefill_s = seconds
        else:
            self.decode_s += seconds
