"""Seconds of a call on a GPU: events around replays of a CUDA graph that holds many calls in a row.

A graph leaves out Python and most of the launch, which an engine that records its steps does not pay either. What
cannot be captured is called from Python and marked "eager". Before each sample the GPU waits for some microseconds,
in which everything is queued up: the host is not in the number. Without a GPU calls are timed by the wall: that is
for tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.bench.gpu_work import Call

SAMPLE_S = 3e-3  # of one sample, at least
_WARM_UP_CALLS = 3
_MOST_CALLS = 1024  # in one graph or queue
_HEAD_START_CYCLES = 200_000  # about 0.1 ms: a graph's launch
_CYCLES_PER_S = 2e9


@dataclass(frozen=True)
class Timed:
    """A call that is ready to be timed. sample: seconds of one call, over as many as take a few milliseconds."""

    sample: Callable[[], float]
    way: str  # "graph", "eager" or "wall"


class CaptureFailed(Exception):
    """A call did what a graph cannot hold. NOTE: torch's allocator does not recover from that: time it as eager, in
    another process."""


def timed(call: Call, sets: int, device: str, *, eager: bool = False, sample_s: float = SAMPLE_S) -> Timed:
    """The call, warmed up with every set of buffers. Raises what the call raises, and CaptureFailed unless eager."""
    if device == "cpu":
        call(0)
        return Timed(_by_wall(call, sets), "wall")
    host_s, device_s = _warmed_up(call, sets)
    calls = _num_calls(sets, device_s, sample_s)
    if eager:
        return Timed(_queued(call, sets, calls, host_s), "eager")
    try:
        return Timed(_of_graph(call, sets, calls), "graph")
    except Exception as error:
        raise CaptureFailed(str(error)) from error


def synchronize(device: str) -> None:
    """Waits for the device; raises what has gone wrong on it."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _by_wall(call: Call, sets: int) -> Callable[[], float]:
    def sample() -> float:
        begin = time.perf_counter()
        for number in range(sets):
            call(number)
        return (time.perf_counter() - begin) / sets

    return sample


def _num_calls(sets: int, device_s: float, sample_s: float) -> int:
    """Calls of one sample: each set of buffers as often as the others."""
    rounds = max(1, round(sample_s / max(device_s, 1e-9) / sets))
    return min(rounds, max(1, _MOST_CALLS // sets)) * sets


def _warmed_up(call: Call, sets: int) -> tuple[float, float]:
    """Seconds of a call on the host and on the device, after each set was used."""
    import torch

    calls = max(sets, _WARM_UP_CALLS)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(calls):
        call(number % sets)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    for number in range(calls):
        call(number % sets)
    end.record()
    host_s = (time.perf_counter() - begin) / calls
    end.synchronize()
    return host_s, start.elapsed_time(end) / 1e3 / calls


def _of_graph(call: Call, sets: int, calls: int) -> Callable[[], float]:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number % sets)
    graph.replay()
    torch.cuda.synchronize()
    return _between_events(graph.replay, calls, _HEAD_START_CYCLES)


def _queued(call: Call, sets: int, calls: int, host_s: float) -> Callable[[], float]:
    """The calls from Python, queued while the GPU waits."""
    few = max(sets, min(calls, 32 * sets))

    def run() -> None:
        for number in range(few):
            call(number % sets)

    run()
    return _between_events(run, few, _HEAD_START_CYCLES + int(1.5 * host_s * few * _CYCLES_PER_S))


def _between_events(run: Callable[[], Any], calls: int, cycles: int) -> Callable[[], float]:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    return sample
