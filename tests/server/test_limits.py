"""What a server in a process of its own does with slow, silent and wrong connections; and ways to reach it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
HEADERS = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient(tiny_path: Path, tmp_path_factory: Any, start_process: Callable[..., Any]) -> Iterator[Any]:
    """A server that waits for nobody longer than a second and a half."""
    times = ("--header-timeout", "1.5", "--body-timeout", "1.5")
    running = start_process("-m", f"tiny={tiny_path}", *times, folder=tmp_path_factory.mktemp("log"))
    try:
        yield running.ready()
    finally:
        running.popen.kill()


def connect(server: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=25)  # before a patient server would answer


def rest_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    pieces = list[bytes]()
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def closed_soon(server: Any, wait: Callable[[socket.socket], None]) -> bool:
    """Whether a connection is closed long before the usual ten seconds; on a busy machine it may be one in five."""

    def seconds() -> float:
        with connect(server) as connection:
            started = time.monotonic()
            wait(connection)
            return time.monotonic() - started

    return any(seconds() < 6 for _ in range(5))


def closed_by_the_other_side(connection: socket.socket) -> None:
    assert rest_of(connection) == b""


def test_headers_that_do_not_come_close_the_connection(impatient: Any) -> None:
    assert closed_soon(impatient, closed_by_the_other_side)


def test_headers_that_never_end_close_the_connection(impatient: Any) -> None:
    def wait(connection: socket.socket) -> None:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(ConnectionError):
            for _ in range(200):  # a byte now and then buys no time
                time.sleep(0.05)
                connection.sendall(b"x")

    assert closed_soon(impatient, wait)


def test_headers_without_end_close_the_connection(impatient: Any) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        try:
            for i in range(200):
                connection.sendall(b"X-%d: %s\r\n" % (i, b"y" * 1000))
            assert not rest_of(connection).startswith(b"HTTP/1.1 200")
        except ConnectionError:
            pass  # it was closed while we wrote


def test_a_body_that_does_not_come_is_said_to_be_late(impatient: Any) -> None:
    with connect(impatient) as connection:
        connection.sendall(HEADERS + b'Content-Length: 100\r\n\r\n{"model"')
        answer = b""
        while b"}}" not in answer:
            piece = connection.recv(1 << 16)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408") and b'"code": "timeout"' in answer


@pytest.mark.slow  # it rests for five seconds
def test_a_connection_is_used_again_and_one_that_rests_is_closed(impatient: Any) -> None:
    with connect(impatient) as connection:
        for _ in range(3):
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                piece = connection.recv(1 << 16)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200")
        closed_by_the_other_side(connection)


def test_an_answer_may_take_longer_than_its_request(impatient: Any) -> None:
    """The limits are those of what comes in."""
    body = {**CHAT, "max_tokens": 900, "ignore_eos": True}
    with httpx.Client(timeout=300) as client:
        for _ in range(2):
            answer = client.post(impatient.url + "/v1/chat/completions", json=body).json()
            assert answer["usage"]["completion_tokens"] == 900


def test_tls(tiny_path: Path, tmp_path: Path, start_process: Callable[..., Any]) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    files = ("--tls-cert", str(certificate), "--tls-key", str(key))
    running = start_process("-m", f"tiny={tiny_path}", *files, folder=tmp_path)
    try:
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate)), timeout=60)
        url = running.url.replace("http:", "https:")
        answer = until_answered(running, lambda: trusting.post(url + "/v1/chat/completions", json=CHAT))
        assert answer.status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(running.url + "/health", timeout=60)
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(url + "/health", timeout=60)
        assert running.end() == 0
    finally:
        running.popen.kill()


def test_a_unix_socket(tiny_path: Path, tmp_path: Path, start_process: Callable[..., Any]) -> None:
    path = tmp_path / "socket"
    running = start_process("-m", f"tiny={tiny_path}", "--unix-socket", str(path), folder=tmp_path)
    try:
        client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x", timeout=60)
        answer = until_answered(running, lambda: client.post("/v1/chat/completions", json=CHAT))
        assert answer.status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url + "/health", timeout=60)
        assert running.end() == 0 and "no API key" not in running.log.read_text()
    finally:
        running.popen.kill()


EVERYWHERE = ("--host", "0.0.0.0")


@pytest.mark.parametrize(
    ("arguments", "warned"), [(EVERYWHERE, True), ((*EVERYWHERE, "--api-key", "k"), False), ((), False)]
)
def test_an_open_door_is_warned_of(
    tiny_path: Path, tmp_path: Path, start_process: Callable[..., Any], arguments: tuple[str, ...], warned: bool
) -> None:
    running = start_process("-m", f"tiny={tiny_path}", *arguments, folder=tmp_path)
    try:
        running.ready()
        answer = httpx.post(running.url + "/v1/chat/completions", json=CHAT, timeout=60)
        assert answer.status_code == (401 if "--api-key" in arguments else 200)
        assert running.end() == 0
        assert ("anyone who can reach" in running.log.read_text()) is warned
    finally:
        running.popen.kill()


def until_answered(running: Any, ask: Callable[[], httpx.Response]) -> httpx.Response:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert running.popen.poll() is None, running.log.read_text()
        try:
            return ask()
        except httpx.TransportError:
            time.sleep(0.05)
    raise TimeoutError(running.log.read_text())
