"""`headrace bench model --explain`: where a step's time goes, op by op, beside the least the machine allows.

A step is filling the batch, one replay of the recorded program, and taking the token drawn. It is repeated as it is,
the same tokens at the same places. Its ops and itself are averaged over the same steps, the middle half by their time:
medians of ops would not add up. In turns with these run steps that are only timed as a whole: what timing ops costs.

The least time of an op is that of its bytes at the read roof of the model's working set, or that of its arithmetic at
the measured roof, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.bench.model import ModelBench, check_model, greedy, random_ids
from headrace.bench.report import document, table
from headrace.bench.roofline import measured_machine
from headrace.bench.step_parts import NOTHING, Part, StepModel, StepSize, step_model, step_parts
from headrace.engine.request import Request
from headrace.engine.sampler import Row
from headrace.engine.sequence import CachedSequence, NewTokens, run_step
from headrace.errors import UnsupportedError
from headrace.machine import Machine
from headrace.ops.select import Traffic
from headrace.talk import ProgressLine

if TYPE_CHECKING:
    from headrace.llm import LLM

HEADS = ["part", "op", "count", "MB", "GFLOP", "roof ms", "bound by", "measured ms", "of step", "of roof"]


@dataclass(frozen=True)
class Roofs:
    """What binds a model's ops, with the threads it runs on: bytes/s, and FLOP/s by unit."""

    read: float
    products: dict[str, float]

    def seconds(self, traffic: Traffic) -> tuple[float, float]:
        """The least time for the bytes and for the arithmetic."""
        return traffic.num_bytes / self.read, traffic.flops / self.products[traffic.unit]


@dataclass(frozen=True)
class OpTime:
    """One op of a step, what its bytes and its arithmetic take at the roofs, and what it took."""

    part: Part
    memory_s: float
    compute_s: float
    measured_s: float

    @property
    def roof_s(self) -> float:
        return max(self.memory_s, self.compute_s)


@dataclass(frozen=True)
class Group:
    """The ops of a step that are for the same thing."""

    ops: tuple[OpTime, ...]

    @property
    def roof_s(self) -> float:
        return sum(op.roof_s for op in self.ops)

    @property
    def measured_s(self) -> float:
        return sum(op.measured_s for op in self.ops)

    @property
    def roof_fraction(self) -> float | None:
        """None where nothing has to be moved or computed, or no time passed."""
        return self.roof_s / self.measured_s if self.roof_s and self.measured_s else None

    @property
    def bound(self) -> str:
        if not self.roof_s:
            return "-"
        memory_s, compute_s = (sum(getattr(op, side) for op in self.ops) for side in ("memory_s", "compute_s"))
        return "memory" if memory_s >= compute_s else self.unit

    @property
    def unit(self) -> str:
        return "+".join(sorted({op.part.traffic.unit for op in self.ops}))

    def data(self) -> dict[str, Any]:
        first = self.ops[0].part
        return {
            "part": first.role,
            "op": first.op,
            "count": len(self.ops),
            "num_bytes": sum(op.part.traffic.num_bytes for op in self.ops),
            "flops": sum(op.part.traffic.flops for op in self.ops),
            "unit": self.unit,
            "bound": self.bound,
            "roof_s": self.roof_s,
            "measured_s": self.measured_s,
            "roof_fraction": self.roof_fraction,
        }

    def cells(self, wall_s: float) -> list[str]:
        data, fraction = self.data(), self.roof_fraction
        sizes = [f"{data['num_bytes'] / 1e6:.3f}", f"{data['flops'] / 1e9:.3f}"]
        times = [_ms(self.roof_s), self.bound, _ms(self.measured_s), f"{self.measured_s / wall_s:.1%}"]
        return [data["part"], data["op"], str(len(self.ops)), *sizes, *times, f"{fraction:.0%}" if fraction else "-"]


@dataclass(frozen=True)
class ExplainedStep:
    """A step's time, whole and in parts."""

    phase: str  # prefill or decode
    size: StepSize
    ops: tuple[OpTime, ...]
    wall_s: float
    untimed_s: float  # the median of steps that were not timed op by op
    count: int  # steps timed op by op

    @property
    def groups(self) -> list[Group]:
        """Ops by what they are for, in order of first appearance."""
        found: dict[tuple[str, str], list[OpTime]] = {}
        for op in self.ops:
            found.setdefault((op.part.role, op.part.op), []).append(op)
        return [Group(tuple(ops)) for ops in found.values()]

    @property
    def explained_s(self) -> float:
        return sum(op.measured_s for op in self.ops)

    @property
    def roof_s(self) -> float:
        """What the step would take if every op ran at its roof."""
        return sum(op.roof_s for op in self.ops)

    @property
    def title(self) -> str:
        return f"{self.phase} of {self.size.tokens} at depth {self.size.depth}"

    def data(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "depth": self.size.depth,
            "tokens": self.size.tokens,
            "repeat": self.count,
            "wall_s": self.wall_s,
            "untimed_s": self.untimed_s,
            "explained_s": self.explained_s,
            "unexplained_s": self.wall_s - self.explained_s,
            "explained_fraction": self.explained_s / self.wall_s,
            "roof_s": self.roof_s,
            "roof_fraction": self.roof_s / self.wall_s,
            "parts": [group.data() for group in self.groups],
        }

    def __str__(self) -> str:
        rows = [group.cells(self.wall_s) for group in self.groups]
        rest_s, rate = self.wall_s - self.explained_s, self.size.tokens / self.wall_s
        return (
            f"{self.title}: {_ms(self.wall_s)} ms, {rate:.1f} tokens/s ({self.count} steps)\n"
            f"{table(HEADS, rows)}\n"
            f"explained: {_ms(self.explained_s)} ms, {self.explained_s / self.wall_s:.1%} of the step;"
            f" not explained: {_ms(rest_s)} ms; the step without timing its ops: {_ms(self.untimed_s)} ms\n"
            f"at the roof: {_ms(self.roof_s)} ms, {self.size.tokens / self.roof_s:.1f} tokens/s;"
            f" the step reaches {self.roof_s / self.wall_s:.0%}"
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def explain_model(
    model: str, plan: ModelBench, *, threads: int | None, json_only: bool, progress: ProgressLine
) -> dict[str, Any]:
    """Prints each step of the plan explained, then the JSON document (alone when `json_only`), which is returned."""
    from headrace.llm import LLM

    if plan.batches != (1,):
        raise UnsupportedError("batch: expected 1, a step of one sequence is explained", "without --batch")
    llm = LLM(model, threads=threads, context_len=plan.context_len, kv_dtype=plan.kv_dtype, progress=progress)
    machine = measured_machine(llm.bytes_per_token, llm.threads)
    check_model(llm)
    roofs, steps = roofs_of(llm, machine), []
    for step in explained_steps(llm, plan, roofs):
        steps.append(step)
        progress("measuring", len(steps), 2 * len(plan.depths))
        if not json_only:
            print(f"{step}\n", flush=True)
    data = {
        "model": llm.path.name,
        "threads": llm.threads,
        "cpu": machine.cpu_name,
        "read_roof_gb_per_s": roofs.read / 1e9,
        "product_roofs_flop_per_s": roofs.products,
        "steps": [step.data() for step in steps],
    }
    print(document(data))
    return data


def roofs_of(llm: LLM, machine: Machine) -> Roofs:
    """The measured roofs that bind this model."""
    read = machine.roof_for(llm.bytes_per_token, llm.threads)
    products = {unit: machine.product_roof(unit, llm.threads) for unit in ("fp32", "bf16", "int8")}
    assert read and all(products.values()), "the machine is measured before steps are explained"
    return Roofs(read, {unit: float(rate or 0) for unit, rate in products.items()})


def explained_steps(llm: LLM, plan: ModelBench, roofs: Roofs) -> Iterator[ExplainedStep]:
    """A prefill and a decode step at each depth. A prefill step is a chunk at most."""
    chance, model = np.random.default_rng(), step_model(llm)
    for depth in plan.depths:
        before = random_ids(llm, depth, chance)
        chunk = random_ids(llm, min(plan.prompt_len, llm.engine.chunk_len), chance)
        yield _explained(llm, model, roofs, _Replay(llm, before, chunk), plan.repeat)
        yield _explained(llm, model, roofs, _Replay(llm, before, chunk[:1]), plan.new_tokens)


def _explained(llm: LLM, model: StepModel, roofs: Roofs, replay: _Replay, repeat: int) -> ExplainedStep:
    size = StepSize(len(replay.ids), replay.depth)
    replay.untimed(), replay.timed()  # both warm up
    untimed, timed = [], []
    for _ in range(repeat):
        untimed.append(replay.untimed())
        timed.append(replay.timed())
    replay.forget()
    wall_s, python_s, *program_s = middle_means(timed)
    parts = step_parts(llm.engine.runner.program.op_names, model, size)
    measured = [(Part("batch", "Python", NOTHING), python_s), *zip(parts, program_s, strict=True)]
    ops = tuple(OpTime(part, *roofs.seconds(part.traffic), seconds) for part, seconds in measured)
    phase = "decode" if size.tokens == 1 else "prefill"
    return ExplainedStep(phase, size, ops, wall_s, median(untimed), repeat)


def middle_means(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each column over the middle half of the rows, by their first column."""
    cut = len(rows) // 4
    middle = sorted(rows, key=lambda row: row[0])[cut : len(rows) - cut]
    return [fmean(column) for column in zip(*middle, strict=True)]


class _Replay:
    """One step of the engine, over and over: `ids` behind what is cached of `before`."""

    def __init__(self, llm: LLM, before: list[int], ids: list[int]) -> None:
        self.ids, self.depth = ids, len(before)
        llm.engine.clear()
        self.runner, self.pool = llm.engine.runner, llm.engine.pool
        self.sequence = CachedSequence()
        for first in range(0, len(before), llm.engine.chunk_len):
            self._compute(before[first : first + llm.engine.chunk_len])
        self.logits = self._compute(ids)  # of the step that is replayed
        self.rows = [Row(Request([*before, *ids], greedy(1)))]

    def forget(self) -> None:
        """Gives its pages back."""
        self.sequence.forget(0, self.pool, self.runner.batch.page_size)

    def _compute(self, ids: list[int]) -> np.ndarray:
        return run_step(self.runner, self.pool, [NewTokens(self.sequence, ids)])

    def untimed(self) -> float:
        """Seconds of the step."""
        started = perf_counter()
        self._fill()
        self.runner.sampler.drawn(self.runner.run(), self.rows)
        return perf_counter() - started

    def timed(self) -> list[float]:
        """Seconds of the step, of filling the batch and taking the token drawn, and of each op of the program."""
        started = perf_counter()
        self._fill()
        filled = perf_counter()
        program = self.runner.run_timed()
        ran = perf_counter()
        self.runner.sampler.drawn(self.logits, self.rows)
        taken = perf_counter()
        return [taken - started, filled - started + taken - ran, *(seconds for _, seconds in program)]

    def _fill(self) -> None:
        self.runner.batch.clear()
        self.runner.batch.add(self.ids, self.depth, self.sequence.pages, 1)
        self.runner.sampler.prepare(self.rows)
