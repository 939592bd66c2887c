"""A request: a prompt as token ids, how to draw from it, and what has come of it so far."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from headrace.config import SamplingParams
from headrace.engine.logprobs import TokenLogprobs
from headrace.engine.row_edits import RowEdits
from headrace.engine.sequence import CachedSequence
from headrace.errors import HeadraceError
from headrace.kv_cache.prefix import Node
from headrace.token_rules import TokenRules


@dataclass(eq=False)
class Request:
    """One answer in the making. Lengths in tokens, times in seconds.

    seed: of its draws; the n-th of them depends on the seed, n and the logits alone. copies: requests for other answers
    to the same prompt, which begin when it has been computed. logprobs and prompt_logprobs: one for each token of
    answer and prompt where the parameters ask for them; nothing comes before the prompt's first token, which has None.
    """

    prompt_ids: list[int]
    params: SamplingParams
    rules: TokenRules = field(default_factory=TokenRules)
    most_tokens: int = 2**62  # of prompt and answer together
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    error: HeadraceError | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    sequence: CachedSequence = field(default_factory=CachedSequence)
    nodes: list[Node] = field(default_factory=list)  # of its full pages, in the prefix cache
    copies: list[Request] = field(default_factory=list)
    seed: int = -1
    guesses: list[int] = field(default_factory=list)  # of the tokens behind its text, for the next step
    num_guessed: int = 0
    num_accepted: int = 0
    num_drafts: int = 0  # steps with guesses
    accepted_at: list[int] = field(default_factory=list)  # guesses that were right, by their place in their step
    num_preemptions: int = 0
    reused_len: int = 0  # prompt tokens whose keys were in the cache already
    prefill_s: float = 0.0
    decode_s: float = 0.0
    logits_hash: str = ""

    def __post_init__(self) -> None:
        self.ids = [*self.prompt_ids, *self.token_ids]  # prompt and answer
        if self.seed < 0:
            self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        scores = self.params.prompt_logprobs is not None
        self.scored_len = 1 if scores else len(self.prompt_ids)  # prompt tokens that need no logits any more
        self.prompt_logprobs = [None] if scores else []
        self.edits = RowEdits(self.params, self.rules)
        self._end_ids = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self._end_ids |= self.rules.end_ids

    @property
    def pending_len(self) -> int:
        """Tokens of the text that are not computed yet; 1 while it decodes."""
        return len(self.ids) - len(self.sequence.ids)

    @property
    def first_output(self) -> int:
        """The first of its tokens whose logits are wanted: what comes before may be taken from the cache."""
        return (self.scored_len if self.scored_len < len(self.prompt_ids) else len(self.ids)) - 1

    def commit(self, token: int) -> None:
        """Takes a drawn token, and finishes when it ends the text or nothing more fits."""
        self.token_ids.append(token)
        self.ids.append(token)
        if self.edits.constraint:
            self.edits.constraint.advance(token)
        if token in self._end_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_tokens or len(self.ids) >= self.most_tokens:
            self.finish_reason = "length"

    def fail(self, error: HeadraceError) -> None:
        """Ends it: no token can be drawn for it."""
        self.error, self.finish_reason = error, "error"
        for copy in self.copies:
            copy.fail(error)

    def add_seconds(self, seconds: float) -> None:
        """Books a step that it had a part in."""
        if self.token_ids:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds
