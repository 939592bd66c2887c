"""A plain read of memory in the place of an engine: what the machine gives in the minute in which the others run."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from headrace.bench.peers import Opening
from headrace.kernels.cpu.roof import plain_read

_MOST_BYTES = 1 << 30  # no cache holds it: larger buffers read just as slowly
_SAMPLE_S = 0.1


def open_peers(opening: Opening) -> dict[str, PlainRead]:
    return {"": PlainRead(opening.threads)}


class PlainRead:
    """Reads a buffer again and again, as many bytes as a step of a model would read."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._num_bytes = 0
        self._read: Callable[[], float] = lambda: 0.0

    def read(self, num_bytes: int) -> float:
        """Bytes/s, over a tenth of a second and 3 passes at least."""
        num_bytes = min(num_bytes, _MOST_BYTES)
        if num_bytes != self._num_bytes:
            self._read, self._num_bytes = plain_read(num_bytes, self._threads), num_bytes
            self._read()
        passes, seconds, deadline = 0, 0.0, perf_counter() + _SAMPLE_S
        while passes < 3 or perf_counter() < deadline:
            seconds += self._read()
            passes += 1
        return passes * num_bytes / seconds
