"""The drawing of `headrace bench serving --plot`: how latencies are spread, and what was done when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench.figure import new_figure, save
from headrace.bench.serving_figures import Figures, in_flight

_BINS = 60  # of the time


def draw(figures: Figures, out: Path, title: str) -> None:
    """Draws a load that some requests of were answered."""
    figure = new_figure(figsize=(11, 7))
    figure.suptitle(title)
    ((first, token), (tokens, requests)) = figure.subplots(2, 2)
    _spread(first, figures.seconds["ttft"], figures.ttft_limit_s, "to the first token")
    _spread(token, figures.seconds["gap"], figures.tpot_limit_s, "between pieces of an answer")
    _rate(tokens, figures)
    times, counts = in_flight(figures.run.outcomes)
    requests.step(times, counts, where="post", lw=1)
    requests.set(xlabel="seconds", ylabel="requests on their way", ylim=(0, None))
    for axes in (first, token, tokens, requests):
        axes.grid(True, lw=0.3)
    save(figure, out)


def _spread(axes: Any, samples: list[float], limit_s: float, what: str) -> None:
    """The share of samples that took at most so long."""
    times = np.sort(np.array(samples)) * 1e3
    axes.plot(times, np.arange(1, len(times) + 1) / max(len(times), 1), lw=1.5)
    axes.axvline(limit_s * 1e3, ls="--", lw=1, color="0.4", label=f"limit: {limit_s * 1e3:.0f} ms")
    axes.set(xlabel=f"ms {what}", ylabel="share of all", ylim=(0, 1.02))
    axes.legend(fontsize="small")


def _rate(axes: Any, figures: Figures) -> None:
    """Tokens/s over time."""
    each = [(at_s, len(o.answer.text_s), o.answer.answer_tokens) for o in figures.whole for at_s in o.answer.text_s]
    times, pieces, answers = (np.array(column) for column in zip(*each, strict=True))
    counts, edges = np.histogram(times, bins=_BINS, weights=answers / pieces)
    axes.stairs(counts / np.diff(edges), edges, lw=1)
    axes.set(xlabel="seconds", ylabel="tokens/s", ylim=(0, None))
