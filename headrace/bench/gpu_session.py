"""The parent of `headrace bench gpu`'s worker: asks it for rows, and goes on without it where it ends.

A worker that ends or hangs has told before which candidate it was at: that one is left out with the reason, a new
worker is started, and the row is asked for once more. So one bad kernel costs its own line, never the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from headrace.bench.asked_process import AskedProcess, ProcessFailed, module_command
from headrace.bench.gpu_rows import GpuRow
from headrace.bench.gpu_targets import OUT_OF_TIME

WORKER = "headrace.bench.gpu_worker"
# Torch would start as many processes as there are cores for what it compiles, in each of several workers.
_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
_TRIES = 4  # of a row, each without one more candidate, or with one more that no graph holds
_READY_SHARE = 0.6  # of a row's time, after which no further candidate is made ready
# That a new worker may take to import torch and find the device, beside what a row may take. On a machine that has just
# been started its files come over a network.
_START_S = 150.0


@dataclass
class Budget:
    """Seconds that a run may take."""

    seconds: float
    begin: float = field(default_factory=monotonic)

    @property
    def spent(self) -> float:
        return monotonic() - self.begin

    @property
    def left(self) -> float:
        return self.seconds - self.spent


class Session:
    """Workers, one at a time. `asking`: what every row is measured with (gpu_measure.Asking)."""

    def __init__(self, device: str, asking: Mapping[str, Any], worker: str = WORKER) -> None:
        self._device, self._asking, self._worker = device, dict(asking), worker
        self._process: AskedProcess | None = None
        self._eager: list[str] = []  # what no graph can hold, as one row after the other found

    def ask(self, call: str, timeout_s: float, **given: Any) -> Any:
        """What a worker answers. ProcessFailed where it does not."""
        return self._running().ask({"call": call, "device": self._device, **given}, timeout_s)

    def row(self, row: GpuRow, left_s: float) -> dict[str, Any]:
        """A row's results, or {"error"}; never raises for what a kernel does."""
        budget = Budget(left_s)
        without: dict[str, str] = {}
        for _ in range(_TRIES):
            watched = _Watched()
            try:
                return self._ask_row(
                    row, {"without": without, "eager": self._eager}, min(row.limit_s, budget.left), watched
                )
            except ProcessFailed as failure:
                if not watched.at:
                    return {"error": str(failure), "failed": without}
                if watched.eager and watched.eager not in self._eager:
                    self._eager.append(watched.eager)
                else:
                    without[watched.at] = watched.failed.get(watched.at, str(failure))
            if budget.left <= 0:
                return {"error": f"{OUT_OF_TIME} after {watched.at} failed", "failed": without}
        return {"error": f"{_TRIES} kernels ended the process", "failed": without}

    def _ask_row(self, row: GpuRow, retry: Mapping[str, Any], limit_s: float, watched: _Watched) -> dict[str, Any]:
        process = self._running()
        asking = {**self._asking, **retry, "device": self._device, "seconds": _READY_SHARE * limit_s}
        request = {"call": "row", "device": self._device, "row": row_data(row), "asking": asking}
        found: dict[str, Any] = process.ask(request, limit_s, watched.hear)
        return found

    def _running(self) -> AskedProcess:
        if self._process is None or not self._process.alive:
            self.close()
            command, environment = module_command(self._worker)
            self._process = AskedProcess(command, _ENVIRONMENT | environment)
            self._process.ask({"call": "describe", "device": self._device}, _START_S)
        return self._process

    def close(self) -> None:
        """Ends the worker."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Watched:
    """What a worker has told of the row it is at."""

    def __init__(self) -> None:
        self.at = self.eager = ""
        self.failed: dict[str, str] = {}

    def hear(self, note: Mapping[str, str]) -> None:
        if "at" in note:
            self.at = note["at"]
        elif "eager" in note:
            self.eager = note["eager"]
        else:
            self.failed[note["failed"]] = note["why"]


def row_data(row: GpuRow) -> dict[str, Any]:
    """What a worker needs to know of a row."""
    return {"work": row.work, "sizes": dict(row.sizes)}


def warm_up(rows: Sequence[GpuRow], device: str, seconds: float, processes: int, worker: str = WORKER) -> int:
    """Compiles what rows need, in several processes at once, into caches on disk; gives how many were done in time.

    What fails here fails again when it is measured, and is said there.
    """
    budget, waiting = Budget(seconds), list(reversed(rows))

    def work_off(_: int) -> int:
        done = 0
        with Session(device, {}, worker) as session:
            while waiting and budget.left > 0:
                row = waiting.pop()
                try:
                    session.ask("warm", min(row.limit_s, budget.left), row=row_data(row))
                    done += 1
                except (ProcessFailed, IndexError):
                    continue
        return done

    with ThreadPoolExecutor(processes) as pool:
        return sum(pool.map(work_off, range(processes)))
