"""The process of `headrace bench gpu` that holds the GPU (`python -m` this module): asked for one row at a time.

{"call": "describe"}               what the device is
{"call": "roofs"}                  what it reaches: gpu_roofs.py; kept for later choices of kernels
{"call": "warm", "row": ..}        runs every kernel of a row once, so that its compiled code is on disk
{"call": "row", "row": .., ..}     a row's results: gpu_measure.py

It knows neither targets nor budgets. A kernel that hangs or breaks the device takes this process with it, not the
bench.
"""

from __future__ import annotations

import gc
from typing import Any

from headrace.bench import gpu_roofs
from headrace.bench.asked_process import Note, error_text, serve
from headrace.bench.gpu_measure import Asking, measure, warm
from headrace.bench.gpu_work import build


def answer(request: dict[str, Any], note: Note) -> Any:
    """What is asked for."""
    call, device = request["call"], request.get("device", "cuda")
    if call == "describe":
        return gpu_roofs.describe(device)
    if call == "roofs":
        return gpu_roofs.measure(device)
    try:
        found = _of_row(request, device, note)
    except Exception:
        _forget(device)
        raise
    _forget(device)
    return found


def _of_row(request: dict[str, Any], device: str, note: Note) -> Any:
    work = build(request["row"]["work"], request["row"]["sizes"], device)
    return warm(work, device) if request["call"] == "warm" else measure(work, Asking(**request["asking"]), note)


def _forget(device: str) -> None:
    """Gives a row's memory back; ends the process where the device is lost."""
    gc.collect()
    if device == "cpu":
        return
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise SystemExit(f"the device is lost: {error_text(error)}") from error


if __name__ == "__main__":
    serve(answer)
