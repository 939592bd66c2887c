"""An engine in a process of its own, asked over a pipe; and that process itself (`python -m` this module).

A request is {"call", "way", "given"}. Other runtimes let threads spin on for some time after the work: a process that
is not asked anything is stopped, so that none takes the cores from the one that is. A process that ends, or does not
answer in time, is said so and nothing hangs (`asked_process`).
"""

from __future__ import annotations

import importlib
import signal
from collections.abc import Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any

from headrace.bench.asked_process import AskedProcess, Note, ProcessFailed, module_command, serve
from headrace.bench.peers import KINDS, Opening

TIMEOUT_S = 900.0  # of one request: loading a large model from a cold disk is the longest

PeerFailed = ProcessFailed  # an engine did not do what it was asked; the text says why in a few words


class PeerProcess:
    """The parent's side."""

    def __init__(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        self._kind = KINDS[name]
        command, inherited = module_command("headrace.bench.peer_process")
        self._process = AskedProcess(command, {**inherited, **(environment or {})})

    @property
    def alive(self) -> bool:
        return self._process.alive

    def open(self, opening: Opening, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Loads the model; gives "ways" (their names), "load_s" and "about"."""
        return self.ask("open", self._kind.module, self._kind.packages, asdict(opening), timeout_s=timeout_s)

    def ask(self, call: str, *given: Any, way: str = "", timeout_s: float = TIMEOUT_S) -> Any:
        """What the call returns. PeerFailed where it raises, ends the process, or takes too long, which kills it."""
        try:
            self._process.signal(signal.SIGCONT)
            return self._process.ask({"call": call, "way": way, "given": given}, timeout_s)
        finally:
            self._process.signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the process; again does nothing."""
        self._process.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """The process's side: engines by the name of their way."""

    def __init__(self) -> None:
        self._peers: dict[str, Any] = {}

    def open(self, name: str, packages: list[str], opening: dict[str, Any]) -> dict[str, Any]:
        for package in packages:
            importlib.import_module(package)
        module = importlib.import_module(name)
        started = perf_counter()
        self._peers = module.open_peers(Opening(**opening))
        load_s = perf_counter() - started
        about = module.about() if hasattr(module, "about") else ""
        return {"ways": list(self._peers), "load_s": load_s, "about": about}

    def peak_bytes(self) -> int:
        """The most memory this process has had resident, mapped files included."""
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmHWM"].split()[0]) << 10

    def answer(self, call: str, way: str, given: list[Any]) -> Any:
        if call in ("open", "peak_bytes"):
            return getattr(self, call)(*given)
        return getattr(self._peers[way], call)(*given)


if __name__ == "__main__":
    server = Server()

    def answered(request: dict[str, Any], note: Note) -> Any:
        return server.answer(**request)

    serve(answered)
