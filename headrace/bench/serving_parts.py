"""Where the time of a step goes while many answer at once: computing, the engine's Python, text and HTTP.

Two readings of counters and what lies between them. Computing is what the native program took, text and HTTP what the
event loop's thread had of a core: it works while the program runs, on a core that then lacks there, so its share is an
upper bound of what it costs. The rest of a step is the engine's Python, waiting for the interpreter included.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.engine.engine import Engine

# The server's metrics, by what they are here.
_METRICS = {
    "at_s": "headrace:clock_seconds",
    "steps": "headrace:engine_steps_total",
    "step_s": "headrace:engine_step_seconds_total",
    "native_s": "headrace:engine_native_seconds_total",
    "loop_s": "headrace:event_loop_cpu_seconds_total",
}


@dataclass(frozen=True)
class Reading:
    """Counters at a moment: steps, their seconds, those of the native program, and CPU of the event loop's thread."""

    at_s: float
    steps: int
    step_s: float
    native_s: float
    loop_s: float = 0.0

    @classmethod
    def of(cls, engine: Engine, *, on_loop: bool) -> Reading:
        """Those of an engine in this process; on_loop: this thread is the event loop's."""
        loop_s = thread_time() if on_loop else 0.0
        return cls(perf_counter(), engine.num_steps, engine.busy_s, engine.runner.native_s, loop_s)


@dataclass(frozen=True)
class StepParts:
    """The mean step between two readings, in seconds. wall_s: from the beginning of one to that of the next."""

    steps: int
    wall_s: float
    native_s: float
    engine_s: float
    between_s: float
    loop_s: float

    @classmethod
    def between(cls, first: Reading, last: Reading) -> StepParts | None:
        """None where there was no step."""
        steps = last.steps - first.steps
        if steps <= 0:
            return None
        wall_s, step_s = (last.at_s - first.at_s) / steps, (last.step_s - first.step_s) / steps
        native_s, loop_s = (last.native_s - first.native_s) / steps, (last.loop_s - first.loop_s) / steps
        return cls(steps, wall_s, native_s, step_s - native_s, wall_s - step_s, loop_s)

    @property
    def overhead(self) -> float:
        """What is not computing, as a share of the step; text and HTTP by their share of a core."""
        return (self.engine_s + self.between_s + self.loop_s) / self.wall_s

    def data(self) -> dict[str, Any]:
        return {**asdict(self), "overhead": self.overhead}

    def __str__(self) -> str:
        native, engine, between, loop = (
            f"{seconds * 1e3:.2f} ms ({seconds / self.wall_s:.1%})"
            for seconds in (self.native_s, self.engine_s, self.between_s, self.loop_s)
        )
        return (
            f"of a step of {self.wall_s * 1e3:.2f} ms: computing {native}, scheduler and sampler {engine}, "
            f"between steps {between}; beside it text and HTTP {loop}: {self.overhead:.1%} is not computing"
        )


def read_metrics(text: str) -> Reading | None:
    """A Reading of a server's metrics; None where it is not headrace's, or another version's."""
    values = _values(text)
    if not all(name in values for name in _METRICS.values()):
        return None
    found = {field: values[name] for field, name in _METRICS.items()}
    return Reading(found["at_s"], int(found["steps"]), found["step_s"], found["native_s"], found["loop_s"])


def _values(text: str) -> dict[str, float]:
    """Metric -> value, of all models together."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values
