"""An engine in a process of its own, asked over a pipe; and that process itself (`python -m` this module).

A request is a line of JSON, {"call", "way", "given"}, and so is its answer, {"value"} or {"error"}. Other runtimes let
threads spin on for some time after the work: a process that is not asked anything is stopped, so that none takes the
cores from the one that is. A process that ends, or does not answer in time, is said so and nothing hangs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from time import monotonic, perf_counter
from typing import Any

from headrace.bench.peers import KINDS, Opening

TIMEOUT_S = 900.0  # of one request: loading a large model from a cold disk is the longest


class PeerFailed(Exception):
    """An engine did not do what it was asked; the text says why in a few words."""


class PeerProcess:
    """The parent's side."""

    def __init__(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        self._kind = KINDS[name]
        self._talk = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._buffer = b""
        self._ended = ""  # why the process is no more
        command, inherited = module_command("headrace.bench.peer_process")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._talk,
            env={**inherited, **(environment or {})},
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def open(self, opening: Opening, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Loads the model; gives "ways" (their names), "load_s" and "about"."""
        return self.ask("open", self._kind.module, self._kind.packages, asdict(opening), timeout_s=timeout_s)

    def ask(self, call: str, *given: Any, way: str = "", timeout_s: float = TIMEOUT_S) -> Any:
        """What the call returns. PeerFailed where it raises, ends the process, or takes too long, which kills it."""
        request = json.dumps({"call": call, "way": way, "given": given}) + "\n"
        assert self._process.stdin
        try:
            self._signal(signal.SIGCONT)
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
            answer = json.loads(self._line(monotonic() + timeout_s, timeout_s))
        except (BrokenPipeError, ValueError):
            raise PeerFailed(self._end()) from None
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer["value"]

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        assert self._process.stdout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], max(0.0, deadline - monotonic()))[0]:
                self._ended = f"no answer in {timeout_s:.0f} s"
                self.close()
                raise PeerFailed(self._ended)
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise PeerFailed(self._end())
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _end(self) -> str:
        """How the process ended, with the last line that it said."""
        if self._ended:
            return self._ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        self._talk.seek(0)
        said = self._talk.read().decode(errors="replace").strip().rpartition("\n")[2]
        self._ended = f"it ended with {how}: {said[:200]}".removesuffix(": ")
        self.close()
        return self._ended

    def _signal(self, number: int) -> None:
        if self.alive:
            self._process.send_signal(number)

    def close(self) -> None:
        """Ends the process; again does nothing."""
        self._process.kill()  # a stopped one, too
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe
                pipe.close()
        self._talk.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def module_command(*arguments: str, code: str = "") -> tuple[list[str], dict[str, str]]:
    """Command line and environment of this Python running a module or code with the packages that this process sees."""
    plain = ["-S"] if sys.flags.no_site else []
    what = ["-c", code] if code else ["-m"]
    places = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    # NOTE: without bytecode a checkout is compiled at every start, which installed packages never are.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return [sys.executable, *plain, *what, *arguments], {**inherited, "PYTHONPATH": places}


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


def serve() -> None:
    """Answers requests from stdin until it ends."""
    # NOTE: a group of its own, for Ctrl-C is the parent's; and should the parent be killed, the system ends a stopped
    # process only where the parent's end leaves its group without anyone.
    os.setpgrp()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what engines print is no answer
        server = Server()
        for line in sys.stdin:
            try:
                answer = {"value": server.answer(**json.loads(line))}
            except Exception as error:  # whatever an engine raises is what the parent has to be told
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    serve()
