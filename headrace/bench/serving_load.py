"""What `headrace bench serving` sends: how many requests, when, how long their prompts and answers are.

In the closed loop so many clients each send the next request when they have the last answer. In the open one requests
come when they come (Poisson arrivals of a rate), whether the server keeps up or not, and their latencies count from
when they were due: a server that is behind cannot slow its own clients down and look better for it.

Prompts are common words in random order, of which most vocabularies make a token each; the server says how many tokens
they were. No two prompts begin alike for long, so nothing is found in a cache of beginnings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import ArgumentError

LENGTHS = ("fixed", "uniform", "lognormal")
_SIGMA, _LONGEST = 0.6, 8  # lognormal: of the logarithm; times the median
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many off before must well back through years much where your way down should "
    "because long each just state people too little world own work see men here day life water house never under last "
    "might great old"
)


@dataclass(frozen=True)
class ServingOptions:
    """The command line of `headrace bench serving`, besides the model. Lengths in tokens."""

    url: str | None = None
    api_key: str | None = None
    rate: float | None = None
    concurrency: int = 16
    requests: int = 64
    prompt_len: int = 128
    answer_len: int = 128
    lengths: str = "fixed"
    seed: int = 0
    chat: bool = False
    plain: bool = False
    timeout: float = 600.0
    slo_ttft_ms: float = 1000.0
    slo_tpot_ms: float = 50.0
    peer: str = ""
    repeat: int = 5
    llama_lib: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests", "prompt_len", "answer_len", "repeat"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected a whole number >= 1, got {getattr(self, name)}")
        for name in ("rate", "timeout", "slo_ttft_ms", "slo_tpot_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ArgumentError(f"{name}: expected more than 0, got {value}")
        if self.lengths not in LENGTHS:
            raise ArgumentError(f"lengths: expected {', '.join(LENGTHS)}, got {self.lengths!r}")


@dataclass(frozen=True)
class Sent:
    """A request to send. due_s: from the start of the load on; None: when a client is free."""

    prompt: str
    answer_len: int
    due_s: float | None = None


def load_of(options: ServingOptions) -> list[Sent]:
    """The requests in order, the same for the same seed."""
    chance = random.Random(options.seed)
    dues = _arrivals(options.rate, chance) if options.rate else iter(lambda: None, 0)
    return [
        Sent(
            words(_length(options.prompt_len, options.lengths, chance), chance),
            _length(options.answer_len, options.lengths, chance),
            next(dues),
        )
        for _ in range(options.requests)
    ]


def words(count: int, chance: random.Random) -> str:
    """So many random words."""
    return " ".join(chance.choices(_TEXT.split(), k=count))


def body_of(sent: Sent, model: str, options: ServingOptions) -> dict[str, Any]:
    """What is sent for it: a greedy stream of exactly so many tokens, if the server knows `ignore_eos`."""
    asked: dict[str, Any] = {
        "model": model,
        "max_tokens": sent.answer_len,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not options.plain:
        asked["ignore_eos"] = True
    if options.chat:
        return {**asked, "messages": [{"role": "user", "content": sent.prompt}]}
    return {**asked, "prompt": sent.prompt}


def _arrivals(rate: float, chance: random.Random) -> Iterator[float]:
    at_s = 0.0
    while True:
        yield at_s
        at_s += chance.expovariate(rate)


def _length(typical: int, lengths: str, chance: random.Random) -> int:
    """fixed: always the same. uniform: from 1 to what makes it the mean. lognormal: it is the median."""
    if lengths == "uniform":
        return chance.randint(1, 2 * typical - 1)
    if lengths == "lognormal":
        return min(max(1, round(chance.lognormvariate(math.log(typical), _SIGMA))), _LONGEST * typical)
    return typical
