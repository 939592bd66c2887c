"""The clock of `bench gpu`, on a device made of paper: what is between the events, in which order, per call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from headrace.bench import gpu_clock  # noqa: E402

CALL_S = 1e-4


class Device:
    """Every call takes 0.1 ms of its time, whether it is made at once or replayed."""

    def __init__(self) -> None:
        self.now, self.log, self.calls = 0.0, [], []
        self.capturing = False

    def call(self, number: int) -> None:
        self.calls.append(number)
        if not self.capturing:
            self.now += CALL_S

    def event(self, enable_timing: bool) -> Any:
        device = self

        class Event:
            at = 0.0

            def record(self) -> None:
                device.log.append("event")
                self.at = device.now

            def synchronize(self) -> None:
                device.log.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()

    def graph(self) -> Any:
        device = self

        class Graph:
            calls = 0

            def replay(self) -> None:
                device.log.append("replay")
                device.now += CALL_S * self.calls

        return Graph()

    @contextlib.contextmanager
    def captured(self, graph: Any) -> Iterator[None]:
        self.capturing, before = True, len(self.calls)
        yield
        self.capturing, graph.calls = False, len(self.calls) - before

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.now += cycles / 2e9


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.graph)
    monkeypatch.setattr(torch.cuda, "graph", made.captured)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_a_sample_is_a_replay_between_two_events_while_the_host_is_ahead(device: Device) -> None:
    ready = gpu_clock.timed(device.call, 5, "cuda")
    captured = device.calls[10:]  # after two rounds of every set, warming up
    assert ready.way == "graph" and captured == [0, 1, 2, 3, 4] * 6  # 30 calls of 0.1 ms
    device.log.clear()
    assert ready.sample() == pytest.approx(CALL_S)
    assert device.log == ["sleep", "event", "replay", "event", "wait"]


def test_what_no_graph_holds_is_queued_while_the_device_waits(device: Device) -> None:
    ready = gpu_clock.timed(device.call, 2, "cuda", eager=True)
    device.log.clear()
    device.calls.clear()
    assert ready.way == "eager" and ready.sample() == pytest.approx(CALL_S)
    assert device.log == ["sleep", "event", "event", "wait"] and device.calls == [0, 1] * 15


def test_a_call_that_a_graph_does_not_take_is_said(device: Device) -> None:
    def call(number: int) -> None:
        if device.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(gpu_clock.CaptureFailed, match="not permitted"):
        gpu_clock.timed(call, 1, "cuda")


def test_what_a_call_raises_is_not_hidden(device: Device) -> None:
    def call(number: int) -> None:
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        gpu_clock.timed(call, 1, "cuda")


def test_calls_of_a_sample_use_every_set_equally() -> None:
    assert gpu_clock._num_calls(15, 1e-5, 3e-3) == 300
    assert gpu_clock._num_calls(4, 1.0, 3e-3) == 4
    assert gpu_clock._num_calls(7, 1e-9, 3e-3) == 1022
