"""Counters of arrivals: what tells the last of several programs that it is the last, without a launch to clear them.

They are zero between launches, for who arrives last sets them back. Launches on one stream follow each other and share
counters; a captured launch may be replayed beside any other and gets counters that no other has.
"""

from __future__ import annotations

import torch

_POOL = 1 << 16
_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_of_captures: dict[torch.device, list[torch.Tensor]] = {}  # what is left of a pool


def arrival_counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """int32 zeros [at least count] on the device of `like`, for one launch on the current stream."""
    device = like.device
    if not like.is_cuda:
        return _kept(device, 0, count)
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(device, count)
    return _kept(device, torch.cuda.current_stream(device).cuda_stream, count)


def _kept(device: torch.device, stream: int, count: int) -> torch.Tensor:
    found = _by_stream.get((device, stream))
    if found is None or len(found) < count:
        found = _by_stream[device, stream] = torch.zeros(max(count, _POOL), dtype=torch.int32, device=device)
    return found


def _of_capture(device: torch.device, count: int) -> torch.Tensor:
    """NOTE: a pool made while capturing is cleared by the graph that made it, each time it is replayed."""
    left = _of_captures.setdefault(device, [])
    if not left or len(left[0]) < count:
        left[:] = [torch.zeros(max(count, 16 * _POOL), dtype=torch.int32, device=device)]
    taken, left[0] = left[0][:count], left[0][count:]
    return taken
