"""`headrace bench serving`: many clients at once of an OpenAI-compatible server, this one's or any other.

A load runs once: latencies, tokens/s, goodput (`serving_figures`), for headrace's own server also where the time of a
step goes (`serving_parts`). With peers, a burst of streams is answered over and over, in turns with others
(`serving_turns`). The server is a process of its own, and so is the client, which says how much of a core it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from headrace.bench.figure import check_target
from headrace.bench.peers import Opening
from headrace.bench.report import document
from headrace.bench.serving_figures import Figures
from headrace.bench.serving_host import Host, hosted
from headrace.bench.serving_load import ServingOptions, load_of
from headrace.bench.serving_parts import StepParts, read_metrics
from headrace.bench.serving_plot import draw
from headrace.bench.serving_turns import Turns, ceiling_s, check_peers, text_of
from headrace.errors import ArgumentError, HeadraceError
from headrace.machine import this_machine, usable_cores
from headrace.options import LoadOptions, words
from headrace.talk import ProgressLine

Show = Callable[[str], None]
_SPARE = 8  # tokens of room beyond a prompt and its answer


def bench_serving(
    model: str | None, options: ServingOptions, loading: LoadOptions, *, json_only: bool, progress: ProgressLine
) -> dict[str, Any]:
    """Prints what was found, then the JSON document (alone when `json_only`), which is also returned.

    model: with a url the name that is asked for, else what `headrace serve` is started with.
    """
    peers = words(options.peer)
    _check(options, peers)
    with hosted(model, options, serve_arguments(options, loading), progress) as host:
        show: Show = (lambda text: None) if json_only else (lambda text: print(text, flush=True))
        found = (
            _turns(host, model or "smollm2", options, loading, show) if peers else _load(host, options, show, progress)
        )
    data = {**_conditions(host, options, loading), **found}
    print(document(data))
    return data


def serve_arguments(options: ServingOptions, loading: LoadOptions) -> list[str]:
    """What a server that is started here is told: room for all of the load."""
    given = {"max_concurrency": options.concurrency, "max_queue": options.requests, **asdict(loading)}
    return [part for name, value in given.items() for part in _argument(name, value)]


def _argument(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return [flag] if value else []
    return [flag, str(value)]


def _check(options: ServingOptions, peers: Sequence[str]) -> None:
    if options.plot is not None:
        check_target(options.plot, "plot")
    check_peers(peers)
    if peers and (options.url is not None or options.rate is not None or options.plot is not None):
        raise ArgumentError("peer: expected no url, rate or plot with it", "the server is started for the comparison")


def _load(host: Host, options: ServingOptions, show: Show, progress: ProgressLine) -> dict[str, Any]:
    load = load_of(options)
    progress(f"sending {len(load)} requests", 0, None)
    run = host.run(load, options, options.concurrency)
    figures = Figures(run, options.slo_ttft_ms / 1e3, options.slo_tpot_ms / 1e3)
    if not figures.whole:
        raise HeadraceError(f"no request was answered to its end: {figures.errors}")
    show(figures.text())
    readings = [read_metrics(mark) for mark in run.marks]
    parts = StepParts.between(*readings) if len(readings) == 2 and all(readings) else None  # type: ignore[arg-type]
    if parts is not None:
        show(str(parts))
    if options.plot is not None:
        draw(figures, options.plot, f"{host.model}, {_how(options)}")
    return {**figures.data(), "parts": parts.data() if parts else None}


def _turns(host: Host, model: str, options: ServingOptions, loading: LoadOptions, show: Show) -> dict[str, Any]:
    from headrace.weights.gguf import open_gguf
    from headrace.weights.load import load_config
    from headrace.weights.sources import resolve

    path, threads = resolve(model), loading.threads or usable_cores()
    with open_gguf(path) as file:
        vocab_size = load_config(file).vocab_size
    room = options.prompt_len + options.answer_len + _SPARE
    opening = Opening(str(path), threads, room, options.concurrency, loading.kv_dtype)
    turns = Turns(host, options, opening, vocab_size)
    rows, work = turns.run(words(options.peer))
    found: dict[str, Any] = {"rows": [row.data() for row in rows.values()]}
    if work is not None:
        most = options.concurrency * options.answer_len / ceiling_s(work, options, threads)
        show(f"the machine's roofs allow {most:.0f} tokens/s: {rows[turns.many].speed.median / most:.0%} of them")
        found["ceiling_tokens_per_s"] = most
    show(text_of(rows, turns.many))
    return found


def _how(options: ServingOptions) -> str:
    if options.rate is not None:
        return f"{options.rate:g} requests/s"
    return f"{options.concurrency} clients"


def _conditions(host: Host, options: ServingOptions, loading: LoadOptions) -> dict[str, Any]:
    machine = this_machine()
    asked = {name: None if name == "api_key" else value for name, value in asdict(options).items()}
    return {
        "model": host.model,
        "cpu": machine.cpu_name,
        "threads": (loading.threads or usable_cores()) if host.is_ours else None,
        "date": time.strftime("%Y-%m-%d"),
        "options": {name: value if value is None else _plain(value) for name, value in asked.items()},
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else str(value)
