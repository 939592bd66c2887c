"""What only a fresh process shows: seconds to a first token, seconds to load a file, and the most memory it took.

Files are in the system's cache: an unmeasured round reads them. The start is that of the program its users run, from
the start of the process to the first byte of the answer; load and memory are taken without it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter

from headrace.bench.asked_process import module_command
from headrace.bench.engines import READ, Field
from headrace.bench.peer_process import PeerFailed, PeerProcess
from headrace.bench.peers import KINDS
from headrace.bench.timing import Spread
from headrace.bench.versus_cases import Case
from headrace.bench.versus_rounds import Found, Row, Sampler, rounds

START_TIMEOUT_S = 300.0
_PROMPT = list(range(10, 18))  # some tokens, so that memory includes what a step needs
_CONTEXT_LEN = 512
_PIECE_BYTES = 1 << 24


def measure_starts(entries: Field) -> dict[str, Found]:
    """Seconds from process start to the first byte of an answer."""
    return rounds({name: partial(start_s, entries, name) for name in entries.names}).found()


def start_s(entries: Field, name: str) -> float:
    opening = entries.opening
    code = importlib.import_module(KINDS[name].module).start_code(opening)
    command, environment = module_command(opening.path, str(opening.threads), code=code)
    begin = perf_counter()
    with _running(command, environment | entries.environment(name)) as process:
        assert process.stdout
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        if not ready or not os.read(process.stdout.fileno(), 1):
            said = f"no first token in {START_TIMEOUT_S:.0f} s" if not ready else "it ended without a first token"
            raise PeerFailed(said)
        return perf_counter() - begin


@contextlib.contextmanager
def _running(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdin=nowhere, stdout=subprocess.PIPE, stderr=nowhere)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def measure_loads(entries: Field) -> dict[Case, dict[str, Found]]:
    """Seconds to load, beside those of reading the file once; MB that a process had at most, a first step included."""
    peaks: dict[str, list[float]] = {}

    def load_s(name: str) -> float:
        seconds, peak_bytes = _load(entries, name)
        peaks.setdefault(name, []).append(peak_bytes / 1e6)
        return seconds

    samplers: dict[str, Sampler] = {name: partial(load_s, name) for name in entries.names}
    samplers[READ] = partial(_read_file_s, entries.opening.path)
    row: Row = rounds(samplers)
    read = Spread.of(row.samples[READ]).median
    loads = {
        name: Found(found.spread, found.why_not, roof=read / found.spread.median if found.spread else None)
        for name, found in row.found().items()
    }
    memory = {
        name: Found(Spread.of(peaks[name])) if found.spread else Found(why_not=found.why_not)
        for name, found in loads.items()
    }
    return {Case("load"): loads, Case("memory"): memory}


def _load(entries: Field, name: str) -> tuple[float, int]:
    """Seconds to load the file and compute a few tokens, without imports; and the most bytes of that process."""
    given = entries.opening
    opening = replace(given, context_len=min(given.context_len, _CONTEXT_LEN))
    with PeerProcess(name, entries.environment(name)) as process:
        told = process.open(opening)
        begin = perf_counter()
        process.ask("prefill", _PROMPT, way=told["ways"][0])  # who maps a file reads it only now
        return told["load_s"] + perf_counter() - begin, process.ask("peak_bytes")


def _read_file_s(path: str) -> float:
    """Seconds to read the file once, into memory that is used again and again."""
    piece = memoryview(bytearray(_PIECE_BYTES))
    begin = perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return perf_counter() - begin
