"""An engine in a process of its own: what it answers, how it may fail, and that it rests while nobody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.bench import peers
from headrace.bench.peer_process import PeerFailed, PeerProcess
from headrace.bench.peers import Opening, PeerKind


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = PeerKind((), "fake_peer", lambda file, weights: 0)
    monkeypatch.setitem(peers.KINDS, "fake", kind)  # type: ignore[arg-type]
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def process() -> Iterator[PeerProcess]:
    with PeerProcess("fake", {"A_VARIABLE": "set"}) as process:
        yield process


def state(process: PeerProcess) -> str:
    return Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_it_answers_in_the_way_that_is_asked(process: PeerProcess) -> None:
    told = process.open(Opening("model", 1))
    assert told["ways"] == ["slow way", "fast way"] and told["about"] == "made of paper" and told["load_s"] >= 0
    assert process.ask("prefill", [1, 2], way="fast way") == 2 * process.ask("prefill", [3], way="slow way") == 200
    assert process.ask("calls", way="fast way") == [["prefill", [1, 2]]]
    assert process.ask("environment", "A_VARIABLE", way="fast way") == "set"
    assert process.ask("peak_bytes") > 1 << 20


def test_it_is_stopped_while_nobody_asks(process: PeerProcess) -> None:
    process.open(Opening("model", 1))
    deadline = time.monotonic() + 120
    while state(process) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(process) == "T"
    assert process.ask("state", way="fast way") == '"R"'


def test_an_engine_that_raises_stays(process: PeerProcess) -> None:
    process.open(Opening("raises", 1))
    with pytest.raises(PeerFailed, match="MemoryError: no room"):
        process.ask("prefill", [1], way="fast way")
    assert process.alive and process.ask("decode", [1], 1.0, way="fast way") == 200


def test_an_engine_that_dies_is_said_with_its_last_words(process: PeerProcess) -> None:
    process.open(Opening("dies", 1))
    for _ in range(2):  # asked again it is still dead, and for the same reason
        with pytest.raises(PeerFailed, match="it ended with exit code 7: the last words"):
            process.ask("prefill", [1], way="fast way")
    assert not process.alive


def test_an_engine_that_hangs_is_ended(process: PeerProcess) -> None:
    process.open(Opening("hangs", 1))
    with pytest.raises(PeerFailed, match="no answer in 0 s"):
        process.ask("prefill", [1], way="fast way", timeout_s=0.05)
    assert not process.alive
    with pytest.raises(PeerFailed, match="no answer in 0 s"):
        process.ask("prefill", [1], way="fast way")


def test_a_model_it_does_not_open_is_said(process: PeerProcess) -> None:
    with pytest.raises(PeerFailed, match="ValueError: no such model"):
        process.open(Opening("refuses", 1))
