"""`headrace bench ops --calibrate`: what each kernel makes of this machine's roofs, measured and kept.

Every kernel is timed on every subject that it can run, small ones and large ones. Its speed (`KernelSpeed`) is the one
whose predictions are closest in the mean of |log(predicted / measured)|, in which one disturbed sample counts little.
The cost model is fitted, not solved: from the default, one constant at a time is moved up and down by ever smaller
factors for as long as that helps. Leaving the default costs a little, so what no subject tells apart stays near it.
A call costs kernels that compete (that were timed on the same subject) the same, for it is Python and the waking of
threads: the cost with which all of them together are predicted best. Of repeated samples the shortest counts: what else
runs only ever makes them longer.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from headrace.bench.subjects import Subject
from headrace.bench.timing import Spread, call_seconds
from headrace.machine import KernelSpeed, Machine
from headrace.ops.per_isa import DEFAULT_SPEEDS
from headrace.ops.select import Kernel

LONGEST_CALL_S = 0.2  # what is predicted to take longer teaches nothing that a shorter case does not
_FACTORS = (4.0, 2.0, 1.4, 1.1, 1.03)
_CALL_STEPS = tuple(1.15**step for step in range(-6, 9))  # times the quickest sample
_LEAVING = 1e-3  # what a factor of e away from the default costs, beside a mean error of as much
_SEEDS_S = {"tile_s": 1e-7, "segment_s": 1e-6, "merge_s": 1e-6}  # where a constant that starts at 0 begins


@dataclass(frozen=True)
class Sample:
    """One kernel on one subject: what it had to do, and how long it took."""

    subject: str
    memory_s: float
    compute_s: float
    seconds: float
    tiles: float = 0.0
    segments: float = 0.0
    merges: float = 0.0

    def predicted(self, speed: KernelSpeed) -> float:
        """What a kernel of that speed would take."""
        planned = self.tiles * speed.tile_s + self.segments * speed.segment_s + self.merges * speed.merge_s
        return speed.seconds(self.memory_s, self.compute_s) + planned


def measure(subjects: Iterable[Subject], machine: Machine, repeat: int) -> dict[str, list[Sample]]:
    """Samples of every kernel, by "op/kernel/unit"."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    for subject in subjects:
        for kernel in subject.kernels:
            if kernel.name in subject.able() and kernel.cost(subject.request, machine) <= LONGEST_CALL_S:
                call = functools.partial(subject.run, kernel.name)
                seconds = min(call_seconds(call) for _ in range(repeat))
                key, sample = sample_of(subject, kernel, machine, seconds)
                samples[key].append(sample)
    return dict(samples)


def sample_of(subject: Subject, kernel: Kernel, machine: Machine, seconds: float) -> tuple[str, Sample]:
    """The key a sample belongs to, and the sample."""
    plan, traffic = kernel.planned(subject.request, machine), subject.request.traffic
    unit = plan.arithmetic or traffic.unit
    memory_s, compute_s = machine.seconds(traffic.num_bytes, traffic.flops, unit)
    counts = (plan.tiles, plan.segments, plan.merges)
    return f"{subject.request.op}/{kernel.name}/{unit}", Sample(subject.name, memory_s, compute_s, seconds, *counts)


def fit(samples: Sequence[Sample], default: KernelSpeed) -> KernelSpeed:
    """The speed that predicts the samples best, a call costing what it does by default."""
    names = ["arithmetic", "read"]
    names += [f"{name[:-1]}_s" for name in ("tiles", "segments", "merges") if any(getattr(s, name) for s in samples)]
    speed, error = default, error_of(samples, default)
    for factor in _FACTORS:
        improved = True
        while improved:
            before = error
            for name in names:
                speed, error = _moved(samples, (speed, default), name, factor)
            improved = error < before * (1 - 1e-6)
    return speed


def error_of(samples: Sequence[Sample], speed: KernelSpeed) -> float:
    """The mean of |log(predicted / measured)|."""
    return sum(abs(math.log(sample.predicted(speed) / sample.seconds)) for sample in samples) / len(samples)


def _moved(
    samples: Sequence[Sample], from_default: tuple[KernelSpeed, KernelSpeed], name: str, factor: float
) -> tuple[KernelSpeed, float]:
    """The speed with one constant changed by the factor, up or down, if that is better; and its error."""
    speed, default = from_default
    now = getattr(speed, name)
    values = [now, now * factor, now / factor] if now else [0.0, _SEEDS_S[name]]
    tried = [replace(speed, **{name: value}) for value in values]
    errors = [error_of(samples, candidate) + _LEAVING * _distance(candidate, default) for candidate in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    return tried[best], errors[best]


def _distance(speed: KernelSpeed, default: KernelSpeed) -> float:
    """How far the shares are from the default's, in factors of e."""
    ratios = (speed.arithmetic / default.arithmetic, speed.read / default.read)
    return sum(abs(math.log(ratio)) for ratio in ratios)


def fitted(samples: Mapping[str, Sequence[Sample]]) -> dict[str, KernelSpeed]:
    """The speed of each "op/kernel/unit"."""
    found: dict[str, KernelSpeed] = {}
    for keys in competing(samples):
        quickest = min(sample.seconds for key in keys for sample in samples[key])
        tried = [_fitted_with(samples, keys, quickest * step) for step in _CALL_STEPS]
        found |= min(tried, key=functools.partial(_total_error, samples))
    return {key: found[key] for key in samples}


def _total_error(samples: Mapping[str, Sequence[Sample]], speeds: Mapping[str, KernelSpeed]) -> float:
    return sum(error_of(samples[key], speed) for key, speed in speeds.items())


def competing(samples: Mapping[str, Sequence[Sample]]) -> list[list[str]]:
    """The keys in groups; in a group are those that share a subject with another of it."""
    groups: list[tuple[set[str], list[str]]] = []
    for key, found in samples.items():
        subjects, keys = {sample.subject for sample in found}, [key]
        for group in [group for group in groups if group[0] & subjects]:
            groups.remove(group)
            subjects, keys = subjects | group[0], group[1] + keys
        groups.append((subjects, keys))
    return [keys for _, keys in groups]


def _fitted_with(samples: Mapping[str, Sequence[Sample]], keys: Sequence[str], call_s: float) -> dict[str, KernelSpeed]:
    return {key: fit(samples[key], replace(_default(key), call_s=call_s)) for key in keys}


def _default(key: str) -> KernelSpeed:
    isa = key.split("/")[1].removeprefix("cpu_")
    return DEFAULT_SPEEDS.get(isa, DEFAULT_SPEEDS["avx2"])


HEADS = ["op/kernel/unit", "cases", "call, us", "arithmetic, of roof", "read, of roof", "off by, median case"]


def rows(samples: Mapping[str, Sequence[Sample]], speeds: Mapping[str, KernelSpeed]) -> list[list[str]]:
    """A line for each kernel: its speed, and by which factor the median case is mispredicted."""
    found = []
    for key, speed in speeds.items():
        off = Spread.of([math.exp(error_of([sample], speed)) for sample in samples[key]]).median
        numbers = [f"{speed.call_s * 1e6:.1f}", f"{speed.arithmetic:.0%}", f"{speed.read:.0%}", f"{off:.2f} x"]
        found.append([key, str(len(samples[key])), *numbers])
    return found


def data(samples: Mapping[str, Sequence[Sample]], speeds: Mapping[str, KernelSpeed]) -> dict[str, Any]:
    """The same for JSON."""
    return {key: asdict(speed) | {"cases": len(samples[key])} for key, speed in speeds.items()}
