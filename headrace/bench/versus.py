"""`headrace bench versus`: the same file, tokens and threads in one run, in turns with whatever peers are installed.

Prompts are fresh random tokens each time. A missing peer is said and left out. Decode at depth is the row that tells:
short contexts hide what attention costs. A peer's cache has the type nearest to ours, and its name says which.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.bench.model import check_model, random_ids
from headrace.bench.peers import PEERS, Headrace, Peer, missing_modules
from headrace.bench.report import document, table
from headrace.bench.timing import Spread, alternate
from headrace.config import EngineConfig
from headrace.errors import ArgumentError
from headrace.talk import ProgressLine, say

REPEAT = 5
# Other runtimes let their threads spin on for up to 0.2 s after the work: whoever is next must not pay for it.
_SETTLE_S = 0.3


@dataclass(frozen=True)
class Case:
    """A row: tokens computed at once (prefill) or one by one (decode) after `depth` cached ones."""

    phase: str
    depth: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.phase} {self.tokens} at depth {self.depth}"


CASES = (Case("prefill", 0, 512), Case("decode", 16, 64), Case("decode", 4096, 16))


def bench_versus(
    model: str, peer_names: tuple[str, ...], *, kv_dtype: str = EngineConfig.kv_dtype, progress: ProgressLine
) -> dict[str, Any]:
    """Prints a table with a ratio (headrace / peer) per row, then the JSON document, which is also returned."""
    from headrace.llm import LLM

    _check_names(peer_names)
    context_len = max(case.depth + case.tokens for case in CASES) + 8
    llm = LLM(model, context_len=context_len, kv_dtype=kv_dtype, progress=progress)
    check_model(llm)
    engines: dict[str, Peer] = {"headrace": Headrace(llm)}
    for name in peer_names:
        if missing := missing_modules(name):
            say(f"{name}: left out, not installed: {', '.join(missing)}")
            continue
        for peer in PEERS[name][1](llm.path, llm.threads, context_len, kv_dtype):
            engines[peer.name] = peer

    chance = np.random.default_rng()
    results = {}
    for number, case in enumerate(CASES):
        progress(f"measuring {case}", number, len(CASES))
        results[case] = measure(engines, case, lambda length: random_ids(llm, length, chance))
    print(versus_table(results))
    rows = [_data(case, results[case]) for case in CASES]
    data = {"model": llm.path.name, "threads": llm.threads, "kv_dtype": kv_dtype, "rows": rows}
    print(document(data))
    return data


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in PEERS:
            raise ArgumentError(f"--peers: expected some of {', '.join(PEERS)}, got {name!r}")


def measure(engines: Mapping[str, Peer], case: Case, random: Callable[[int], list[int]]) -> dict[str, Spread]:
    """Tokens/s of each engine for a case, taken in turns; one unmeasured round warms all of them up."""
    held = random(case.depth) if case.depth else []

    def sampler(engine: Peer) -> Callable[[], float]:
        return lambda: getattr(engine, case.phase)(random(case.tokens))

    for engine in engines.values():
        engine.hold(held)
    samplers = {name: sampler(engine) for name, engine in engines.items()}
    alternate(samplers, 1)
    samples = alternate(samplers, REPEAT, lambda: time.sleep(_SETTLE_S))
    return {name: Spread.of(speeds) for name, speeds in samples.items()}


def versus_table(results: Mapping[Case, Mapping[str, Spread]]) -> str:
    """One line per case and engine; the ratio says how many times as fast headrace is."""
    rows = []
    for case, spreads in results.items():
        for name, spread in spreads.items():
            ratio = "" if name == "headrace" else f"{spreads['headrace'].median / spread.median:.2f} x"
            rows.append([str(case), name, str(spread), ratio])
    return table(["case", "engine", "tokens/s (min-max, n)", "headrace is"], rows)


def _data(case: Case, spreads: Mapping[str, Spread]) -> dict[str, Any]:
    ours = spreads["headrace"].median
    engines = {
        name: {"median": spread.median, "min": spread.low, "max": spread.high, "ratio": ours / spread.median}
        for name, spread in spreads.items()
    }
    row = {"phase": case.phase, "depth": case.depth, "tokens": case.tokens, "repeat": REPEAT}
    return {**row, "unit": "tokens/s", "engines": engines}
