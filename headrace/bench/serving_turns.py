"""`headrace bench serving --peer ...`: many streams at once over HTTP, one stream, and others beside them, in turns.

engine: our engine without text or server. async: through AsyncLLM. llama.cpp: its decode of as many sequences by the C
functions, without text, sampling or HTTP; the server that comes with llama-cpp-python answers one request at a time.
All of them get prompts of the same lengths at the same moment and answer them to the last token, over and over, one
after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from headrace.bench.engines import Engine
from headrace.bench.peer_process import PeerProcess
from headrace.bench.peers import KINDS, Opening, missing_packages, peer_environment
from headrace.bench.report import table
from headrace.bench.roofline import ModelWork, decode_ceiling, measured_machine, prefill_ceiling
from headrace.bench.serving_figures import Figures
from headrace.bench.serving_host import Host
from headrace.bench.serving_load import ServingOptions, load_of
from headrace.bench.serving_parts import StepParts, read_metrics
from headrace.bench.timing import Spread, alternate
from headrace.errors import ArgumentError, HeadraceError

PEERS = ("engine", "async", "llama.cpp")
_FIRST_ID = 1000  # of the tokens of random prompts: what comes before may be marks and bytes
HEADS = ["who", "tokens/s (min-max, n)", "all answering", "ms/step", "computing", "engine", "between", "text+HTTP"]


@dataclass(frozen=True)
class Sample:
    """One turn. seconds: from the first prompt to the last token. steady: tokens/s while all answer at once."""

    seconds: float
    tokens: int
    steady: float | None = None
    parts: StepParts | None = None


Sampler = Callable[[], Sample]


@dataclass(frozen=True)
class Row:
    """What one of them made of its turns."""

    name: str
    samples: Sequence[Sample]

    @property
    def speed(self) -> Spread:
        return Spread.of([sample.tokens / sample.seconds for sample in self.samples])

    @property
    def steady(self) -> float | None:
        """The median while all answer at once."""
        speeds = [sample.steady for sample in self.samples if sample.steady]
        return median(speeds) if speeds else None

    @property
    def parts(self) -> StepParts | None:
        """Those of the turn whose step took neither the longest nor the shortest."""
        found = sorted((s.parts for s in self.samples if s.parts), key=lambda parts: parts.wall_s)
        return found[len(found) // 2] if found else None

    def cells(self) -> list[str]:
        parts, steady = self.parts, f"{self.steady:.0f}" if self.steady else "-"
        times = (parts.wall_s, parts.native_s, parts.engine_s, parts.between_s, parts.loop_s) if parts else ()
        return [self.name, str(self.speed), steady, *([f"{s * 1e3:.2f}" for s in times] or ["-"] * 5)]

    def data(self) -> dict[str, Any]:
        speed = self.speed
        return {
            "name": self.name,
            "tokens_per_s": {"median": speed.median, "low": speed.low, "high": speed.high, "count": speed.count},
            "steady_tokens_per_s": self.steady,
            "parts": self.parts.data() if self.parts else None,
        }


@dataclass(frozen=True)
class Turns:
    """The comparison. path: of the model; vocab_size: of its tokens."""

    host: Host
    options: ServingOptions
    opening: Opening
    vocab_size: int

    @property
    def many(self) -> str:
        return f"server, {self.options.concurrency} streams"

    def run(self, peers: Sequence[str]) -> tuple[dict[str, Row], ModelWork | None]:
        """Rows by name, the server's first; and what the model costs, where our engine is among the peers."""
        with ExitStack() as stack:
            engines = list(self._opened(peers, stack))
            ours = next((engine for engine in engines if engine.kind == "headrace"), None)
            work = ModelWork(**ours.ask("work")) if ours else None
            samplers: dict[str, Sampler] = {
                self.many: partial(self._served, self.options.concurrency),
                "server, 1 stream": partial(self._served, 1),
            }
            for engine in engines:
                call = "answer_async" if engine.name == "AsyncLLM" else "answer"
                samplers[engine.name] = partial(self._answered, engine, call)
            samples = taken(samplers, self.options.repeat)
        return {name: Row(name, each) for name, each in samples.items()}, work

    def _opened(self, peers: Sequence[str], stack: ExitStack) -> Iterator[Engine]:
        if "engine" in peers or "async" in peers:
            process = stack.enter_context(PeerProcess("headrace"))
            process.open(self.opening)
            named = {"engine": "engine alone", "async": "AsyncLLM"}
            yield from (Engine(named[peer], "headrace", "", process) for peer in peers if peer in named)
        if "llama.cpp" in peers:
            environment = peer_environment("llama.cpp", "", self.options.llama_lib)
            process = stack.enter_context(PeerProcess("llama.cpp", environment))
            told = process.open(self.opening)
            yield from (Engine(f"llama.cpp, {way}", "llama.cpp", way, process) for way in told["ways"])

    def _served(self, streams: int) -> Sample:
        options = replace(self.options, requests=streams, rate=None, seed=random.getrandbits(32))
        load = [replace(sent, answer_len=self.options.answer_len) for sent in load_of(options)]
        run = self.host.run(load, options, streams)
        figures = Figures(run, self.options.slo_ttft_ms / 1e3, self.options.slo_tpot_ms / 1e3)
        if figures.errors or figures.tokens_out != streams * self.options.answer_len:
            raise HeadraceError(f"the server gave {figures.tokens_out} tokens, {figures.errors}: no speed is printed")
        readings = [read_metrics(mark) for mark in run.marks]
        first, last = readings if len(readings) == 2 else (None, None)
        parts = StepParts.between(first, last) if first and last else None
        return Sample(figures.duration_s, figures.tokens_out, figures.steady_tokens_per_s, parts)

    def _answered(self, engine: Engine, call: str) -> Sample:
        count, options = self.options.concurrency, self.options
        ids = range(min(_FIRST_ID, self.vocab_size // 2), self.vocab_size)
        prompts = [random.choices(ids, k=options.prompt_len) for _ in range(count)]
        found = engine.ask(call, prompts, options.answer_len)
        parts = StepParts(**found["parts"]) if found.get("parts") else None
        steady = count / parts.wall_s if parts else found.get("steady")
        return Sample(found["seconds"], count * options.answer_len, steady, parts)


def taken(samplers: Mapping[str, Sampler], rounds: int) -> dict[str, list[Sample]]:
    """So many samples of each, in turns, behind a round that warms up."""
    kept: dict[str, list[Sample]] = {name: [] for name in samplers}

    def take(name: str) -> float:
        kept[name].append(samplers[name]())
        return kept[name][-1].seconds

    takers = {name: partial(take, name) for name in samplers}
    alternate(takers, 1)
    for samples in kept.values():
        samples.clear()
    alternate(takers, rounds)
    return kept


def check_peers(peers: Sequence[str]) -> None:
    """Raises for names that are none, and for what is not installed."""
    for name in peers:
        if name not in PEERS:
            raise ArgumentError(f"peer: expected some of {', '.join(PEERS)}, got {name!r}")
        if name in KINDS and (missing := missing_packages(name)):
            raise HeadraceError(f"peer: {name} needs what is not installed: {', '.join(missing)}")


def ceiling_s(work: ModelWork, options: ServingOptions, threads: int) -> float:
    """The least time for all prompts and all answers at this machine's roofs."""
    machine = measured_machine(work.weight_bytes, threads)
    count, steps = options.concurrency, options.answer_len - 1
    prompts = count * prefill_ceiling(work, machine, 0, options.prompt_len, threads).seconds
    middle = options.prompt_len + options.answer_len // 2
    return prompts + steps * decode_ceiling(work, machine, middle, threads, batch=count).seconds


def text_of(rows: Mapping[str, Row], many: str) -> str:
    """The table, and what is to be read in it."""
    lines = [table(HEADS, [row.cells() for row in rows.values()])]
    ours = rows[many]
    for name, row in rows.items():
        if name != many:
            factor = ours.speed.median / row.speed.median
            lines.append(f"{many}: {factor:.2f} x the tokens/s of {name}{_while(ours, row)}")
    if ours.parts:
        lines.append(f"the server's step: {ours.parts}")
    alone = rows.get("engine alone")
    if alone and alone.parts and ours.parts:
        added = ours.parts.wall_s / alone.parts.wall_s - 1
        lines.append(f"a step of the server takes {added:+.1%} beside the engine's alone, the client on the same cores")
    return "\n".join(lines)


def _while(ours: Row, other: Row) -> str:
    if not ours.steady or not other.steady:
        return ""
    return f", {ours.steady / other.steady:.2f} x while all answer"
