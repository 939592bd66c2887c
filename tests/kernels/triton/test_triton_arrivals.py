"""Counters of arrivals: shared along a stream, a captured launch's its own and zero without its graph having run."""

from types import SimpleNamespace

import pytest
import torch

from headrace.kernels.triton import arrivals
from headrace.kernels.triton.arrivals import arrival_counters


@pytest.fixture
def stream(monkeypatch):
    """A GPU of paper whose memory is the CPU's: its current stream, and whether that is being captured."""
    now = SimpleNamespace(cuda_stream=1, capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(arrivals, "_by_stream", {})
    monkeypatch.setattr(arrivals, "_for_captures", {})
    monkeypatch.setattr(arrivals, "_reserves", [])
    return now


TENSOR = SimpleNamespace(device=torch.device("cpu"), is_cuda=True)


def places(counters, count):
    return set(range(counters.data_ptr(), counters.data_ptr() + 4 * count, 4))


def test_launches_of_a_stream_share_counters_and_those_of_another_do_not(stream):
    first, second = arrival_counters(TENSOR, 7), arrival_counters(TENSOR, 9)
    assert first.data_ptr() == second.data_ptr()
    stream.cuda_stream = 2
    assert not places(first, 7) & places(arrival_counters(TENSOR, 7), 7)
    assert len(arrival_counters(TENSOR, 1 << 17)) >= 1 << 17


def test_captured_launches_have_counters_of_their_own_made_before(stream):
    eager = arrival_counters(TENSOR, 50)
    stream.capturing = True
    made = torch.zeros
    try:
        torch.zeros = lambda *args, **options: pytest.fail("zeros that only a graph's own replay makes zero")
        captured = [arrival_counters(TENSOR, 50) for _ in range(3)]
    finally:
        torch.zeros = made
    taken = [places(counters, 50) for counters in (eager, *captured)]
    assert sum(map(len, taken)) == len(set.union(*taken))
    assert not any(counters.any() for counters in captured)


def test_what_captures_took_is_set_aside_again_and_stays_theirs(stream):
    arrival_counters(TENSOR, 1)
    stream.capturing = True
    taken = arrival_counters(TENSOR, 15 << 16)
    stream.capturing = False
    arrival_counters(TENSOR, 1)
    stream.capturing = True
    storages = {reserve.untyped_storage().data_ptr() for reserve in arrivals._reserves}
    again = arrival_counters(TENSOR, 15 << 16)
    assert {each.untyped_storage().data_ptr() for each in (taken, again)} == storages and len(storages) == 2


def test_without_a_reserve_each_capture_makes_its_zeros(stream):
    stream.capturing = True
    first, second = arrival_counters(TENSOR, 50), arrival_counters(TENSOR, 50)
    assert not places(first, 50) & places(second, 50)
    stream.capturing = False
    arrival_counters(TENSOR, 1)
    stream.capturing = True
    assert len(arrival_counters(TENSOR, 1 << 21)) == 1 << 21
