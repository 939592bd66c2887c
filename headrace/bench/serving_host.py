"""A server to be measured: one that is there already, or `headrace serve` in a process of its own; and its client."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from headrace.bench.asked_process import module_command
from headrace.bench.serving_client import Run, Target, run_of
from headrace.bench.serving_load import Sent, ServingOptions, body_of
from headrace.errors import ArgumentError, HeadraceError
from headrace.talk import ProgressLine

_START_S, _STOP_S = 600.0, 60.0
_PATIENCE_S = 0.05
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Host:
    """A server that answers. model: what it calls the one that is asked for."""

    target: Target
    model: str
    is_ours: bool

    def run(self, load: Sequence[Sent], options: ServingOptions, concurrency: int) -> Run:
        """Sends the load from a process of its own, after two short requests."""
        path = "/v1/chat/completions" if options.chat else "/v1/completions"
        target = replace(self.target, path=self.target.path + path)
        warm_up = [replace(sent, answer_len=_WARM_UP_TOKENS, due_s=None) for sent in load[:2]]
        given = {
            "target": asdict(target),
            "warm_up": [self._asked(sent, options) for sent in warm_up],
            "asked": [self._asked(sent, options) for sent in load],
            "concurrency": concurrency,
            "marks": self.is_ours,
        }
        command, environment = module_command("headrace.bench.serving_client")
        done = subprocess.run(command, input=json.dumps(given).encode(), capture_output=True, env=environment)
        if done.returncode:
            raise HeadraceError(f"the client ended with {done.returncode}: {_last_line(done.stderr)}")
        return run_of(json.loads(done.stdout))

    def _asked(self, sent: Sent, options: ServingOptions) -> dict[str, Any]:
        return {"body": body_of(sent, self.model, options), "due_s": sent.due_s}


@contextmanager
def hosted(model: str | None, options: ServingOptions, serve: Sequence[str], progress: ProgressLine) -> Iterator[Host]:
    """The server at options.url, or one that is started for the model with these further arguments and stopped."""
    if options.url is not None:
        target = target_of(options.url, options)
        yield Host(target, model or _first_model(options.url, options), is_ours=False)
        return
    with started(model or "smollm2", options, serve, progress) as url:
        yield Host(target_of(url, options), _first_model(url, options), is_ours=True)


def target_of(url: str, options: ServingOptions) -> Target:
    """Where http://host:port/prefix is; a prefix that ends in /v1 may be given without it or with it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ArgumentError(f"url: expected http://host:port, got {url!r}")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    port = parts.port or (443 if tls else 80)
    return Target(parts.hostname, port, prefix, tls, options.api_key, options.timeout)


@contextmanager
def started(model: str, options: ServingOptions, serve: Sequence[str], progress: ProgressLine) -> Iterator[str]:
    """`headrace serve` on a free port of this machine, its address while it runs."""
    port = _free_port()
    command, environment = module_command("headrace", "serve", "-m", model, "--port", str(port), *serve)
    with tempfile.TemporaryFile() as talk:
        process = subprocess.Popen(command, env=environment, stdout=talk, stderr=talk)
        try:
            url = f"http://127.0.0.1:{port}"
            _await(url, process, talk, progress)
            yield url
            process.terminate()
            process.wait(_STOP_S)
        finally:
            process.kill()
            process.wait()


def _await(url: str, process: subprocess.Popen[bytes], talk: Any, progress: ProgressLine) -> None:
    """Returns when the server is ready."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        talk.seek(0)
        said = talk.read()
        if process.poll() is not None or b"ERROR" in said:  # a model that does not load is no end of the server
            raise HeadraceError(f"headrace serve does not come up: {_last_line(said)}")
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except OSError:  # refused, or 503 while it loads
            progress("starting the server", 0, None)
            time.sleep(_PATIENCE_S)
    raise HeadraceError(f"headrace serve was not ready in {_START_S:.0f} s")


def _first_model(url: str, options: ServingOptions) -> str:
    """The first of the models that a server lists."""
    address = url.rstrip("/").removesuffix("/v1") + "/v1/models"
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise HeadraceError(f"url: {address} does not list models: {error}", "is an OpenAI server there?") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(said: bytes) -> str:
    return said.decode(errors="replace").strip().rpartition("\n")[2][:300]
