"""The engines of a comparison: processes, the ways they run in, and what is left of them when one fails.

An engine that raised has lost a row; one that ended or did not answer stays out for the rest of the table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from headrace.bench.peer_process import PeerFailed, PeerProcess
from headrace.bench.peers import KINDS, Opening, peer_environment

FILL_S = 120.0  # an engine that would take longer to fill its cache for a row does not get it
_TELLING_LEN = 16  # fewer tokens tell nothing of an engine's speed
READ = "plain read"


@dataclass
class Engine:
    """One way of running an engine, in a process that several may share."""

    name: str
    kind: str
    way: str
    process: PeerProcess
    fill_rate: float = 0.0  # the most tokens/s of a prompt it has shown
    held: list[int] = field(default_factory=list)

    def ask(self, call: str, *given: Any) -> Any:
        return self.process.ask(call, *given, way=self.way)

    def hold(self, ids: list[int]) -> None:
        """Caches a text that begins with the one cached before, or another one."""
        same = len(self.held) if ids[: len(self.held)] == self.held else 0
        new_len = len(ids) - same
        if self.fill_rate and new_len / self.fill_rate > FILL_S:
            raise PeerFailed(f"filling {len(ids)} tokens would take {new_len / self.fill_rate:.0f} s")
        self._timed(new_len, "hold", ids)
        self.held = ids

    def fill(self, ids: list[int], sequences: int) -> None:
        self.ask("fill", ids, sequences)
        self.held = []

    def prefill(self, ids: list[int]) -> float:
        return self._timed(len(ids), "prefill", ids)

    def arrange(self, context_len: int, sequences: int) -> None:
        self.ask("arrange", context_len, sequences)
        self.held = []

    def _timed(self, num_tokens: int, call: str, ids: list[int]) -> Any:
        started = perf_counter()
        value = self.ask(call, ids)
        if num_tokens >= _TELLING_LEN:
            self.fill_rate = max(self.fill_rate, num_tokens / (perf_counter() - started))
        return value


@dataclass(frozen=True)
class Field:
    """Who takes part, on which file. `weights`: how many numbers the file holds."""

    names: tuple[str, ...]
    opening: Opening
    weights: int
    llama_lib: Path | None = None

    def memory_bytes(self, name: str) -> int:
        return KINDS[name].memory(os.path.getsize(self.opening.path), self.weights)

    def environment(self, name: str) -> dict[str, str]:
        return peer_environment(name, self.opening.isa, self.llama_lib)

    def groups(self, available: int) -> list[tuple[str, ...]]:
        """Those that sit in memory together: all, or each alone, without those for whom there is too little."""
        fitting = tuple(name for name in self.names if not self.too_large(name, available))
        # llama.cpp may keep a repacked copy beside the mapped file; and the file is in the system's cache.
        together = sum(self.memory_bytes(name) for name in fitting) + 2 * os.path.getsize(self.opening.path)
        return [fitting] if together < available else [(name,) for name in fitting]

    def too_large(self, name: str, available: int) -> str:
        """Why an engine cannot open the file; empty when it can."""
        needed = self.memory_bytes(name)
        return f"needs {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} are free" if needed > available else ""


@dataclass
class Opened:
    """Engines that are open, and what became of the others: name -> reason. `about`: what peers said of themselves."""

    engines: dict[str, Engine] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def fail(self, name: str, reason: str) -> None:
        """Keeps the reason, and drops an engine whose process has ended."""
        engine = self.engines[name]
        if not engine.process.alive:
            self.failed[name] = reason
            del self.engines[name]


@contextmanager
def opened(entries: Field, names: Sequence[str]) -> Iterator[Opened]:
    """Opens these engines, and a plain read beside them; ends all processes."""
    found = Opened()
    processes: list[PeerProcess] = []
    try:
        for name in (*names, READ):
            process = PeerProcess(name, entries.environment(name))
            processes.append(process)
            try:
                told = process.open(entries.opening)
            except PeerFailed as failed:
                found.failed[name] = str(failed)
                continue
            found.about[name] = told["about"]
            for way in told["ways"]:
                whole = f"{name}, {way}" if way else name
                found.engines[whole] = Engine(whole, name, way, process)
        yield found
    finally:
        for process in processes:
            process.close()


def available_bytes() -> int:
    """Memory that new processes may take without making others swap."""
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) << 10
