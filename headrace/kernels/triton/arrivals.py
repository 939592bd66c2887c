"""Counters of arrivals: what tells the last of several programs that it is the last, without a launch to clear them.

They are zero between launches, for who arrives last sets them back. Launches on one stream follow each other and share
counters; a captured launch may be replayed beside any other and gets counters that no other has.
"""

from __future__ import annotations

import torch

_POOL = 1 << 16
_RESERVE = 16 * _POOL  # that a capture finds: a layer takes some thousands, a graph of a whole model may take all
_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_for_captures: dict[torch.device, torch.Tensor] = {}  # what is left of the newest reserve
# NOTE: a graph knows addresses alone; what it may be replayed on is never given back.
_reserves: list[torch.Tensor] = []


def arrival_counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """int32 zeros [at least count] on the device of `like`, for one launch on the current stream."""
    device = like.device
    if not like.is_cuda:
        return _kept(device, 0, count)
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(device, count)
    if device not in _for_captures or len(_for_captures[device]) < _RESERVE // 2:
        _for_captures[device] = torch.zeros(_RESERVE, dtype=torch.int32, device=device)
        _reserves.append(_for_captures[device])
    return _kept(device, torch.cuda.current_stream(device).cuda_stream, count)


def _kept(device: torch.device, stream: int, count: int) -> torch.Tensor:
    found = _by_stream.get((device, stream))
    if found is None or len(found) < count:
        found = _by_stream[device, stream] = torch.zeros(max(count, _POOL), dtype=torch.int32, device=device)
    return found


def _of_capture(device: torch.device, count: int) -> torch.Tensor:
    """Some of what was set aside before, and is again between captures; where that is too little, zeros that their
    graph makes at each replay, which takes time.

    NOTE: what is made while capturing is zero only once its own graph has run, so no other graph may have a part of it.
    """
    left = _for_captures.get(device)
    if left is None or len(left) < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _for_captures[device] = left[count:]
    return left[:count]
