"""What a load says of a server: latencies by percentile, tokens and requests per second, goodput, errors by kind.

TTFT: from when a request was due to its first text. TPOT: the time between first and last text over the tokens behind
the first, one figure a request. Gaps: between pieces of text, of all requests together. Goodput: requests with whole
answers whose TTFT and TPOT were within the limits, over all that were sent, and per second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from headrace.bench.report import table
from headrace.bench.serving_client import Outcome, Run

PERCENTILES = (50, 95, 99)
LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "gap": "between pieces", "end_to_end": "end to end"}


@dataclass(frozen=True)
class Figures:
    """Of one load. Limits in seconds."""

    run: Run
    ttft_limit_s: float
    tpot_limit_s: float

    @cached_property
    def whole(self) -> list[Outcome]:
        """The requests that were answered to the end, with some text."""
        return [outcome for outcome in self.run.outcomes if not outcome.error and outcome.answer.text_s]

    @cached_property
    def duration_s(self) -> float:
        """From when the first request was due to the end of the last."""
        outcomes = self.run.outcomes
        return max(each.ended_s for each in outcomes) - min(each.due_s for each in outcomes)

    @cached_property
    def seconds(self) -> dict[str, list[float]]:
        """Of each kind of latency its samples."""
        gaps = [later - earlier for each in self.whole for earlier, later in pairwise(each.answer.text_s)]
        return {
            "ttft": [ttft_s(each) for each in self.whole],
            "tpot": [tpot_s(each) for each in self.whole if each.answer.answer_tokens > 1],
            "gap": gaps,
            "end_to_end": [each.ended_s - each.due_s for each in self.whole],
        }

    @property
    def percentiles(self) -> dict[str, dict[str, float]]:
        """In milliseconds; nothing of what there were no samples of."""
        return {
            name: {f"p{p}_ms": float(np.percentile(samples, p)) * 1e3 for p in PERCENTILES}
            for name, samples in self.seconds.items()
            if samples
        }

    @property
    def tokens_in(self) -> int:
        return sum(each.answer.prompt_tokens for each in self.whole)

    @property
    def tokens_out(self) -> int:
        return sum(each.answer.answer_tokens for each in self.whole)

    @property
    def num_good(self) -> int:
        """Requests within both limits."""
        return sum(ttft_s(each) <= self.ttft_limit_s and tpot_s(each) <= self.tpot_limit_s for each in self.whole)

    @property
    def errors(self) -> dict[str, int]:
        """How often what went wrong."""
        failed = (each.error or "no text" for each in self.run.outcomes if each.error or not each.answer.text_s)
        return dict(Counter(failed).most_common())

    @property
    def steady_tokens_per_s(self) -> float | None:
        """Tokens/s while all of these requests answered at once; None where they never did."""
        first = max((each.answer.text_s[0] for each in self.whole), default=0.0)
        last = min((each.answer.text_s[-1] for each in self.whole), default=0.0)
        if len(self.whole) < len(self.run.outcomes) or last <= first:
            return None
        return sum(_tokens_between(each, first, last) for each in self.whole) / (last - first)

    def data(self) -> dict[str, Any]:
        """For the document."""
        count, seconds = len(self.run.outcomes), self.duration_s
        return {
            "requests": count,
            "whole": len(self.whole),
            "errors": self.errors,
            "seconds": seconds,
            "latencies": self.percentiles,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "tokens_in_per_s": self.tokens_in / seconds,
            "tokens_out_per_s": self.tokens_out / seconds,
            "requests_per_s": len(self.whole) / seconds,
            "goodput": {
                "ttft_limit_ms": self.ttft_limit_s * 1e3,
                "tpot_limit_ms": self.tpot_limit_s * 1e3,
                "share": self.num_good / count,
                "requests_per_s": self.num_good / seconds,
            },
            "client_cpu_share": self.run.cpu_s / self.run.wall_s,
        }

    def text(self) -> str:
        """For people."""
        data = self.data()
        goodput = data["goodput"]
        rows = [
            [LATENCIES[name], *(f"{each[f'p{p}_ms']:.1f}" for p in PERCENTILES)]
            for name, each in self.percentiles.items()
        ]
        errors = ", ".join(f"{count} x {kind}" for kind, count in self.errors.items())
        lines = [
            table(["ms", *(f"p{p}" for p in PERCENTILES)], rows),
            "",
            f"{data['whole']} of {data['requests']} requests answered in {data['seconds']:.1f} s: "
            f"{data['requests_per_s']:.2f} requests/s, {data['tokens_in_per_s']:.0f} tokens/s in, "
            f"{data['tokens_out_per_s']:.0f} tokens/s out",
            f"goodput: {goodput['share']:.0%}, {goodput['requests_per_s']:.2f} requests/s, with a first token within "
            f"{goodput['ttft_limit_ms']:.0f} ms and then one every {goodput['tpot_limit_ms']:.0f} ms",
            f"errors: {errors or 'none'}",
            f"the client took {data['client_cpu_share']:.1%} of one core",
        ]
        return "\n".join(lines)


def ttft_s(outcome: Outcome) -> float:
    """Seconds from when it was due to its first text."""
    return outcome.answer.text_s[0] - outcome.due_s


def tpot_s(outcome: Outcome) -> float:
    """Seconds for each token behind the first; 0 where there is none."""
    times, tokens = outcome.answer.text_s, outcome.answer.answer_tokens
    return (times[-1] - times[0]) / (tokens - 1) if tokens > 1 else 0.0


def in_flight(outcomes: Sequence[Outcome]) -> tuple[list[float], list[int]]:
    """How many requests were on their way, at the times when that changed."""
    changes = sorted([(each.due_s, 1) for each in outcomes] + [(each.ended_s, -1) for each in outcomes])
    counts = np.cumsum([change for _, change in changes])
    return [at_s for at_s, _ in changes], [int(count) for count in counts]


def _tokens_between(outcome: Outcome, first: float, last: float) -> float:
    """Tokens that came in this time: those of a piece are as many as its share of the answer's pieces."""
    times = outcome.answer.text_s
    pieces = sum(first < at_s <= last for at_s in times)
    return pieces * outcome.answer.answer_tokens / len(times)
