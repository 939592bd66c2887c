"""`headrace bench model`: how fast a model runs here, beside the most the machine allows.

Prompts are random tokens, new ones each time, so that nothing is found in a cache that should be computed. What lies
before (`depth`) is computed once and stays cached. A row is printed only for a model that passed `check_model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.bench.report import document, table
from headrace.bench.roofline import Ceiling, ModelWork, decode_ceiling, measured_machine, model_work, prefill_ceiling
from headrace.bench.timing import Spread
from headrace.config import EngineConfig, SamplingParams
from headrace.errors import ArgumentError, HeadraceError
from headrace.machine import Machine
from headrace.talk import ProgressLine

if TYPE_CHECKING:
    from headrace.llm import LLM

_CHECK_LEN = 8  # tokens of the prompt and of the answer that a model is checked with


@dataclass(frozen=True)
class ModelBench:
    """What to measure. Lengths in tokens."""

    prompt_len: int = 512
    new_tokens: int = 128
    depths: tuple[int, ...] = (0, 1024, 4096)
    batches: tuple[int, ...] = (1,)  # sequences at a time
    repeat: int = 5
    kv_dtype: str = EngineConfig.kv_dtype

    def __post_init__(self) -> None:
        for name in ("prompt_len", "new_tokens", "repeat"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected a whole number >= 1, got {getattr(self, name)}")
        if not self.depths or min(self.depths) < 0:
            raise ArgumentError(f"depth: expected whole numbers >= 0, got {list(self.depths)}")
        if not self.batches or min(self.batches) < 1:
            raise ArgumentError(f"batch: expected whole numbers >= 1, got {list(self.batches)}")

    @property
    def context_len(self) -> int:
        """Room for the longest row, and for what `check_model` runs."""
        return max(self.depths) + max(self.prompt_len, self.new_tokens + 1, 2 * _CHECK_LEN) + 2


@dataclass(frozen=True)
class Row:
    """A measured line: tokens/s, and the share of what the binding roof allows."""

    phase: str  # prefill or decode
    depth: int
    tokens: int
    ceiling: Ceiling
    speed: Spread

    @property
    def roof_fraction(self) -> float:
        return self.speed.median / self.ceiling.tokens_per_s

    def cells(self) -> list[str]:
        rate = self.ceiling.rate_text(self.speed.median)
        return [*_name(self.phase, self.depth, self.tokens), str(self.speed), rate, f"{self.roof_fraction:.0%}"]

    def data(self) -> dict[str, Any]:
        ceiling = {"tokens_per_s": self.ceiling.tokens_per_s, "bound": self.ceiling.bound, **asdict(self.ceiling)}
        speed = {f"tokens_per_s_{key}": value for key, value in asdict(self.speed).items() if key != "count"}
        row = {"phase": self.phase, "depth": self.depth, "tokens": self.tokens, **speed, "repeat": self.speed.count}
        return {**row, "ceiling": ceiling, "roof_fraction": self.roof_fraction}


def bench_model(
    model: str, plan: ModelBench, *, threads: int | None, json_only: bool, progress: ProgressLine
) -> dict[str, Any]:
    """Prints ceilings, then rows, then the JSON document (alone when `json_only`), which is also returned."""
    from headrace.llm import LLM

    llm = LLM(model, threads=threads, context_len=plan.context_len, kv_dtype=plan.kv_dtype, progress=progress)
    machine = measured_machine(llm.bytes_per_token, llm.threads)
    work = work_of(llm)
    check_model(llm)
    show = (lambda text: None) if json_only else (lambda text: print(text, flush=True))
    show(_ceilings(work, machine, plan, llm.threads))
    rows = []
    for row in _measure(llm, plan, work, machine):
        rows.append(row)
        progress("measuring", len(rows), 2 * len(plan.depths))
    show(
        "\n"
        + table(["phase", "depth", "tokens", "tokens/s (min-max, n)", "rate", "of roof"], [r.cells() for r in rows])
    )
    data = document_of(llm, machine, plan, [row.data() for row in rows])
    print(document(data))
    return data


def work_of(llm: LLM) -> ModelWork:
    """What the loaded model costs, from its file."""
    from headrace.weights.gguf import open_gguf

    with open_gguf(llm.path) as file:
        return model_work(file, llm.config, llm.bytes_per_token, llm.kv_bytes_per_token)


def check_model(llm: LLM) -> None:
    """Raises HeadraceError unless logits are finite and a greedy answer comes out the same twice."""
    prompt = random_ids(llm, _CHECK_LEN, np.random.default_rng(0))
    if not np.isfinite(llm.logits(prompt)).all():
        raise HeadraceError("the model gives logits that are not finite: no speed is printed", "is the file damaged?")
    first, second = (_computed_anew(llm, prompt) for _ in range(2))
    if first != second:
        raise HeadraceError(f"the same greedy answer came out differently: {first} and {second}")


def _computed_anew(llm: LLM, prompt: list[int]) -> list[int]:
    llm.engine.clear()  # codes of few bits are read by other kernels where a prompt is known
    return llm.generate(prompt, greedy(_CHECK_LEN)).token_ids


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly so many tokens, without chance."""
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def random_ids(llm: LLM, length: int, chance: np.random.Generator) -> list[int]:
    return [int(token) for token in chance.integers(0, llm.config.vocab_size, length)]


def prefill_speed(llm: LLM, before: list[int], ids: list[int]) -> float:
    """Tokens/s of computing `ids` after what is cached of `before`."""
    return llm.generate([*before, *ids], greedy(1)).timings.prefill_tokens_per_s


def decode_speed(llm: LLM, before: list[int], new_tokens: int) -> float:
    """Tokens/s of decoding after `before`."""
    return llm.generate(before, greedy(new_tokens + 1)).timings.decode_tokens_per_s


def _rows(plan: ModelBench) -> Iterator[tuple[str, int, int]]:
    for depth in plan.depths:
        yield "prefill", depth, plan.prompt_len
        yield "decode", depth, plan.new_tokens


def _ceiling(work: ModelWork, machine: Machine, row: tuple[str, int, int], threads: int) -> Ceiling:
    phase, depth, tokens = row
    if phase == "prefill":
        return prefill_ceiling(work, machine, depth, tokens, threads)
    return decode_ceiling(work, machine, depth + tokens // 2, threads)


def _ceilings(work: ModelWork, machine: Machine, plan: ModelBench, threads: int) -> str:
    rows = []
    for row in _rows(plan):
        ceiling = _ceiling(work, machine, row, threads)
        most = ceiling.tokens_per_s
        rows.append([*_name(*row), f"{most:.0f}", ceiling.rate_text(most), ceiling.bound])
    return table(["ceiling", "depth", "tokens", "tokens/s", "roof", "bound by"], rows)


def _name(phase: str, depth: int, tokens: int) -> list[str]:
    return [phase, str(depth), str(tokens)]


def _measure(llm: LLM, plan: ModelBench, work: ModelWork, machine: Machine) -> Iterator[Row]:
    chance = np.random.default_rng()
    for depth in plan.depths:
        before = random_ids(llm, depth, chance)
        for row in ((phase, at, tokens) for phase, at, tokens in _rows(plan) if at == depth):
            samples = [_sample(llm, row, before, chance) for _ in range(plan.repeat + 1)][1:]  # the first one warms up
            yield Row(*row, _ceiling(work, machine, row, llm.threads), Spread.of(samples))


def _sample(llm: LLM, row: tuple[str, int, int], before: list[int], chance: np.random.Generator) -> float:
    phase, _, tokens = row
    if phase == "prefill":
        return prefill_speed(llm, before, random_ids(llm, tokens, chance))
    return decode_speed(llm, before or random_ids(llm, 1, chance), tokens)


def document_of(llm: LLM, machine: Machine, plan: ModelBench, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What ends the bench: the model, the machine, the plan, and the data of the rows."""
    return {
        "model": llm.path.name,
        "threads": llm.threads,
        "cpu": machine.cpu_name,
        "read_roof_gb_per_s": (machine.roof_for(llm.bytes_per_token, llm.threads) or math.nan) / 1e9,
        "bytes_per_token": llm.bytes_per_token,
        "kv_bytes_per_token": llm.kv_bytes_per_token,
        "plan": asdict(plan),
        "rows": rows,
    }
