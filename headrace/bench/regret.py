"""`headrace bench ops --regret`: the time of the chosen kernel over the time of the fastest that can run.

All kernels that can run a subject are timed in turns, by name, so that choosing costs each the same; one that is
several times slower than another in the first round does not take part in the rest. A regret counts as real only beyond
noise: when the middle halves (interquartile ranges) of the two kernels' samples do not overlap. A case that misses the
goal so is measured once more, with three times the rounds, and what that says is what counts: among a hundred cases
some are apart by chance.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.bench.subjects import Subject
from headrace.bench.timing import Spread, alternate, call_seconds
from headrace.ops.explanation import explain_request

GOAL = 1.05
_HOPELESS = 3.0  # times slower in the first round than the fastest


@dataclass(frozen=True)
class Regret:
    """How well one subject was chosen for."""

    subject: str
    chosen: str
    fastest: str
    ratio: float  # median of the chosen / median of the fastest
    beyond_noise: bool
    spreads: dict[str, Spread]  # seconds, of all that took part

    @property
    def flagged(self) -> bool:
        """Whether it misses the goal, and not by chance."""
        return self.ratio > GOAL and self.beyond_noise


def measure(subject: Subject, repeat: int) -> Regret | None:
    """The regret of a subject over `repeat` rounds of turns; None when fewer than two kernels can run it."""
    told = explain_request(subject.kernels, subject.request)
    if told.chosen is None or not told.able:
        return None
    chosen, samplers = told.chosen.kernel, {name: _sampler(subject, name) for name in subject.able()}
    first = {name: sample() for name, sample in samplers.items()}
    quick = [name for name in first if name == chosen or first[name] <= _HOPELESS * min(first.values())]
    quickest = {name: samplers[name] for name in quick}
    found = regret_of(subject.name, chosen, alternate(quickest, repeat))
    return regret_of(subject.name, chosen, alternate(quickest, 3 * repeat)) if found.flagged else found


def _sampler(subject: Subject, kernel: str) -> Any:
    return lambda: call_seconds(lambda: subject.run(kernel))


def regret_of(subject: str, chosen: str, samples: dict[str, list[float]]) -> Regret:
    """The regret that samples in seconds show."""
    spreads = {name: Spread.of(seconds) for name, seconds in samples.items()}
    fastest = min(spreads, key=lambda name: (spreads[name].median, name != chosen))
    ratio = spreads[chosen].median / spreads[fastest].median
    apart = middle_half(samples[chosen])[0] > middle_half(samples[fastest])[1]
    return Regret(subject, chosen, fastest, ratio, apart, spreads)


def middle_half(samples: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


HEADS = ["case", "chosen", "us (min-max, n)", "fastest", "us (min-max, n)", "regret", ""]


def row(found: Regret) -> list[str]:
    """A line of the table, times in microseconds."""
    times = [_microseconds(found.spreads[name]) for name in (found.chosen, found.fastest)]
    mark = "over the goal" if found.flagged else "within noise" if found.ratio > GOAL else ""
    return [found.subject, found.chosen, times[0], found.fastest, times[1], f"{found.ratio:.2f}", mark]


def _microseconds(spread: Spread) -> str:
    return str(Spread(spread.median * 1e6, spread.low * 1e6, spread.high * 1e6, spread.count))


def summary(found: Iterable[Regret]) -> dict[str, Any]:
    """Median and worst ratio, the worst beyond noise, and how many miss the goal."""
    regrets = list(found)
    ratios = [regret.ratio for regret in regrets]
    real = [regret.ratio for regret in regrets if regret.beyond_noise]
    return {
        "cases": len(regrets),
        "median": statistics.median(ratios) if ratios else 1.0,
        "worst": max(ratios, default=1.0),
        "worst_beyond_noise": max(real, default=1.0),
        "over_goal": [regret.subject for regret in regrets if regret.flagged],
    }


def data(found: Regret) -> dict[str, Any]:
    """One subject for JSON, times in seconds."""
    times = {name: {"median": s.median, "min": s.low, "max": s.high, "n": s.count} for name, s in found.spreads.items()}
    return {
        "case": found.subject,
        "chosen": found.chosen,
        "fastest": found.fastest,
        "regret": found.ratio,
        "beyond_noise": found.beyond_noise,
        "seconds": times,
    }
