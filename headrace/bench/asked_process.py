"""A process that is asked over a pipe, a line of JSON each way; it may end or hang, and then that is the answer.

The parent's side is `AskedProcess`, the process's own side `serve`. Before its answer {"value"} or {"error"} a
process may send any number of notes {"note"}: how far it has come, for whoever has to say where it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

LONGEST_TEXT = 300  # of an error
_END_S = 20.0  # that a killed process may take to end


class ProcessFailed(Exception):
    """A process did not do what it was asked; the text says why in a few words."""


def _ignored(note: Any) -> None:
    """What becomes of notes that nobody wants."""


class AskedProcess:
    """The parent's side."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._talk = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._buffer = b""
        self._ended = ""  # why the process is no more
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._talk, env=dict(environment)
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], timeout_s: float, on_note: Callable[[Any], None] = _ignored) -> Any:
        """What the process answers. ProcessFailed where it says an error, ends, or takes too long, which kills it."""
        assert self._process.stdin
        deadline = monotonic() + timeout_s
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
            answer = json.loads(self._line(deadline, timeout_s))
            while "note" in answer:
                on_note(answer["note"])
                answer = json.loads(self._line(deadline, timeout_s))
        except (BrokenPipeError, ValueError):
            raise ProcessFailed(self._end()) from None
        if "error" in answer:
            raise ProcessFailed(answer["error"])
        return answer["value"]

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        assert self._process.stdout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], max(0.0, deadline - monotonic()))[0]:
                self._ended = f"no answer in {timeout_s:.0f} s"
                self.close()
                raise ProcessFailed(self._ended)
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise ProcessFailed(self._end())
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

    def signal(self, number: int) -> None:
        """Sends a signal, if there is still a process."""
        if self.alive:
            self._process.send_signal(number)

    def close(self) -> None:
        """Ends the process; again does nothing."""
        self._process.kill()  # a stopped one, too
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it for as long as it likes
            self._process.wait(_END_S)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe
                pipe.close()
        self._talk.close()

    def __enter__(self) -> AskedProcess:
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


Note = Callable[[Any], None]


def serve(answer: Callable[[dict[str, Any], Note], Any]) -> None:
    """Answers requests from stdin until it ends: what `answer(request, note)` returns or raises."""
    # NOTE: a group of its own, for Ctrl-C is the parent's; and should the parent be killed, the system ends a stopped
    # process only where the parent's end leaves its group without anyone.
    os.setpgrp()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what others print is no answer

        def send(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        for line in sys.stdin:
            try:
                found = {"value": answer(json.loads(line), lambda note: send({"note": note}))}
            except Exception as error:  # whatever is raised is what the parent has to be told
                found = {"error": error_text(error)}
            send(found)


def error_text(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_TEXT]}"
