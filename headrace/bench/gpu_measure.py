"""One row of `headrace bench gpu` measured: every kernel that can run it and every peer, checked, then timed in turns.

No speed without a right result. A candidate that raises, or computes something wrong, is said so and the others go
on; one that takes the whole device with it ends the process, and whoever asked leaves it out and asks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from headrace.bench.asked_process import error_text
from headrace.bench.gpu_calibrate import told_of
from headrace.bench.gpu_clock import CaptureFailed, Timed, synchronize, timed
from headrace.bench.gpu_peers import wanted_peers
from headrace.bench.gpu_targets import OUT_OF_TIME
from headrace.bench.gpu_work import Call, GpuWork
from headrace.bench.regret import regret_of
from headrace.bench.timing import Spread, alternate
from headrace.ops.explanation import Explanation, explain_request
from headrace.ops.select import machine_of

_HOPELESS = 8.0  # times slower in the first sample than the fastest: not measured again
_FAR_FETCHED = 20.0  # times slower as predicted than the chosen: not measured at all
Note = Callable[[Any], None]


@dataclass(frozen=True)
class Asking:
    """How a row is measured. without: candidates left out, with the reason; eager: those that no graph can hold;
    seconds: after which no new one is begun."""

    device: str = "cuda"
    repeat: int = 7
    peers: tuple[str, ...] = ()
    with_peers: bool = True
    without: Mapping[str, str] = field(default_factory=dict)
    eager: tuple[str, ...] = ()
    seconds: float = 30.0


@dataclass
class Findings:
    """What has come out of a row so far."""

    timed: dict[str, Timed] = field(default_factory=dict)
    margins: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)  # what compiling, checking and capturing took


def measure(work: GpuWork, asking: Asking, note: Note) -> dict[str, Any]:
    """The row's results as plain values; `note` hears which candidate is next, and which failed."""
    told = explain_request(work.kernels, work.request)
    found = Findings(failed=dict(asking.without))
    deadline = monotonic() + asking.seconds
    candidates = _candidates(work, asking, told)
    for name, ready in candidates.items():
        if name in found.failed:
            continue
        if monotonic() > deadline:
            found.failed[name] = OUT_OF_TIME
            continue
        note({"at": name})
        try:
            _prepare(name, ready, work, asking, found)
        except CaptureFailed as error:
            note({"eager": name})
            raise SystemExit(f"{name} cannot be captured: {error_text(error)}") from error
        except Exception as error:
            found.failed[name] = _why(error)
            note({"failed": name, "why": found.failed[name]})
            _check_device(asking.device, name)
    note({"at": ""})
    samples = _samples(found.timed, asking.repeat, told.chosen.kernel if told.chosen else "")
    return _result(work, told, found, samples)


def _candidates(work: GpuWork, asking: Asking, told: Explanation) -> dict[str, Callable[[], Call]]:
    """Calls by name, the chosen kernel first, then the other kernels as they are predicted, then the peers."""
    able = [each for each in (told.chosen, *told.able) if each]
    near = [each.kernel for each in able if told.chosen and each.predicted_s <= _FAR_FETCHED * told.chosen.predicted_s]
    ours = {name: (lambda name=name: lambda number: work.call(name, number)) for name in near}
    return ours | (wanted_peers(work.peers, asking.peers) if asking.with_peers else {})


def _prepare(name: str, ready: Callable[[], Call], work: GpuWork, asking: Asking, found: Findings) -> None:
    begin = monotonic()
    if name in work.peer_checks:
        found.margins[name] = work.peer_checks[name]()
    elif work.check and name not in work.peers:
        margin = found.margins[name] = work.check(name)
        if margin.wrong:
            raise ArithmeticError(f"the result is wrong: error {margin.error:.3g}, allowed {margin.allowed:.3g}")
    eager = name in (*work.eager, *asking.eager)
    found.timed[name] = timed(ready(), work.sets, asking.device, eager=eager)
    found.ready_s[name] = monotonic() - begin


def _check_device(device: str, name: str) -> None:
    """Ends the process where nothing can be done on the device any more."""
    try:
        synchronize(device)
    except Exception as error:
        raise SystemExit(f"the device is lost after {name}: {error_text(error)}") from error


def _why(error: Exception) -> str:
    return f"not installed: {error.name}" if isinstance(error, ModuleNotFoundError) else error_text(error)


def _samples(ready: Mapping[str, Timed], repeat: int, chosen: str = "") -> dict[str, list[float]]:
    """Seconds in turns; those that are far behind after one sample keep it and leave, but never the chosen one."""
    first = {name: each.sample() for name, each in ready.items()}
    quickest = min(first.values(), default=0.0)
    close = {name: ready[name].sample for name in first if name == chosen or first[name] <= _HOPELESS * quickest}
    turns = alternate(close, repeat)
    return {name: turns.get(name, [first[name]]) for name in first}


def _result(work: GpuWork, told: Explanation, found: Findings, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    chosen = told.chosen.kernel if told.chosen else ""
    predicted = {each.kernel: each.predicted_s for each in (told.chosen, *told.able) if each}
    known = {name: seconds for name, seconds in samples.items() if name in predicted}
    of_name = {kernel.name: kernel for kernel in work.kernels}
    regret = regret_of("", chosen, known) if chosen in known and len(known) > 1 else None
    return {
        "num_bytes": work.num_bytes,
        "flops": work.flops,
        "unit": work.unit,
        "sets": work.sets,
        "chosen": chosen,
        "predicted_s": predicted,
        "predictions": {name: told_of(of_name[name], work.request, machine_of(work.request)) for name in known},
        "by": {name: _one(name, seconds, found) for name, seconds in samples.items()},
        "cannot": _reasons(work, told),
        "failed": found.failed,
        "regret": regret and regret.ratio,
        "fastest": regret and regret.fastest,
        "beyond_noise": bool(regret and regret.beyond_noise),
    }


def _one(name: str, seconds: Sequence[float], found: Findings) -> dict[str, Any]:
    spread, ready, margin = Spread.of(seconds), found.timed[name], found.margins.get(name)
    return {
        "median_s": spread.median,
        "min_s": spread.low,
        "max_s": spread.high,
        "n": spread.count,
        "way": ready.way,
        "ready_s": found.ready_s[name],
        "error": _finite(margin and margin.error),
        "rms_error": _finite(margin and margin.rms),
        "allowed": margin and margin.allowed,
    }


def _finite(number: float | None) -> float | None:
    """As JSON has it: peers are not turned down for NaN."""
    return number if number is not None and math.isfinite(number) else None


def _reasons(work: GpuWork, told: Explanation) -> dict[str, str]:
    """Why each of the device's kernels that cannot run cannot."""
    of_device = {kernel.name for kernel in work.kernels if work.request.device in kernel.devices}
    reasons: dict[str, list[str]] = {}
    for rejected in told.rejected:
        if rejected.kernel in of_device:
            reasons.setdefault(rejected.kernel, []).append(str(rejected.reason))
    return {name: "; ".join(texts) for name, texts in reasons.items()}


def warm(work: GpuWork, device: str) -> list[str]:
    """Runs each kernel that would be measured once; gives the names of those that ran."""
    ran = []
    told = explain_request(work.kernels, work.request)
    for name, ready in _candidates(work, Asking(device, with_peers=False), told).items():
        try:
            ready()(0)
            synchronize(device)
            ran.append(name)
        except Exception as error:  # measuring it will say so
            _check_device(device, name)
            del error
    return ran
