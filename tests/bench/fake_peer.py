"""A peer of constant speed, in a process of its own like real ones. What its model is called says how it behaves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench.peers import Opening

SPEED = 100.0


def open_peers(opening: Opening) -> dict[str, FakePeer]:
    print("an engine's own talk")
    if "refuses" in opening.path:
        raise ValueError("no such model")
    return {"slow way": FakePeer(opening, 1.0), "fast way": FakePeer(opening, 2.0)}


def start_code(opening: Opening) -> str:
    return "import sys; print(sys.argv[2])"


def about() -> str:
    return "made of paper"


class FakePeer:
    """Remembers what it was asked."""

    def __init__(self, opening: Opening, factor: float) -> None:
        self._opening, self._factor = opening, factor
        self._calls: list[Any] = []

    def calls(self) -> list[Any]:
        return self._calls

    def arrange(self, context_len: int, sequences: int) -> None:
        self._calls.append(["arrange", context_len, sequences])

    def hold(self, ids: list[int]) -> None:
        self._calls.append(["hold", len(ids)])

    def prefill(self, ids: list[int]) -> float:
        self._calls.append(["prefill", ids])
        if "raises" in self._opening.path:
            raise MemoryError("no room")
        if "dies" in self._opening.path:
            os.write(2, b"first line\nthe last words\n")
            os._exit(7)
        if "hangs" in self._opening.path:
            time.sleep(600)
        return SPEED * self._factor

    def decode(self, ids: list[int], limit_s: float) -> float:
        self._calls.append(["decode", ids])
        return SPEED * self._factor

    def fill(self, ids: list[int], sequences: int) -> None:
        self._calls.append(["fill", len(ids), sequences])

    def decode_batch(self, sequences: int, steps: int, limit_s: float) -> float:
        return SPEED * self._factor * sequences**0.5

    def divergence(self, exact: str, ids: list[int]) -> list[float]:
        assert np.load(exact).shape[0] == len(ids)
        return [0.5 * self._factor] * len(ids)

    def environment(self, name: str) -> str:
        return os.environ.get(name, "")

    def state(self) -> str:
        return json.dumps(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[0])
