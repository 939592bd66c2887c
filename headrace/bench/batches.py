"""`headrace bench model --batch 1,8,32`: many sequences decoded together, beside the most the machine allows.

A step gives each sequence its next token: the weights are read once for all of them, keys and values for each. Every
sequence has pages of its own. What lies before (`depth`) is computed for one and copied to the others, for how long
attention takes does not depend on what it reads. Batches take turns, and batch 1 is always among them. Rows are printed
only after sequences in a batch answered as they do alone. Where answers may depend on the batch, a second engine on the
same weights, with `batch_invariant`, takes turns with the first: what its promise costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.bench.model import ModelBench, check_model, document_of, greedy, random_ids, work_of
from headrace.bench.report import document, table
from headrace.bench.roofline import Ceiling, ModelWork, decode_ceiling, measured_machine
from headrace.bench.step_parts import step_model
from headrace.bench.timing import Spread, alternate
from headrace.engine.engine import Engine
from headrace.engine.sampler import Row
from headrace.engine.sequence import CachedSequence, NewTokens, run_step
from headrace.errors import HeadraceError
from headrace.kv_cache.storage import LayerPages
from headrace.machine import Machine, this_machine
from headrace.models.layers import is_in_order
from headrace.ops import linear
from headrace.ops.select import Kernel, Request, choose
from headrace.talk import ProgressLine

if TYPE_CHECKING:
    from headrace.llm import LLM

_CHECK_LEN = 8  # tokens of the answers, and most tokens of the prompts, that are compared
HEADS = [
    *("batch", "depth", "tokens/s (min-max, n)", "over batch 1", "ms/step", "GB/s", "of roof", "bound by"),
    "batch-invariant",
]


@dataclass(frozen=True)
class BatchRow:
    """A measured line: tokens/s of all sequences together. `alone` is that of batch 1, `invariant` that of an engine
    whose answers do not depend on the batch, None where every engine is one."""

    batch: int
    depth: int
    tokens: int  # decoded by each sequence in a measurement
    ceiling: Ceiling
    speed: Spread
    alone: float
    invariant: Spread | None = None

    @property
    def factor(self) -> float:
        return self.speed.median / self.alone

    @property
    def step_s(self) -> float:
        return self.batch / self.speed.median

    @property
    def gb_per_s(self) -> float:
        return self.ceiling.num_bytes / self.step_s / 1e9

    @property
    def roof_fraction(self) -> float:
        return self.speed.median / self.ceiling.tokens_per_s

    def cells(self) -> list[str]:
        sizes = [str(self.batch), str(self.depth), str(self.speed), f"{self.factor:.2f} x", f"{self.step_s * 1e3:.2f}"]
        rates = [f"{self.gb_per_s:.1f}", f"{self.roof_fraction:.0%}", self.ceiling.bound]
        return [*sizes, *rates, _beside(self.speed, self.invariant)]

    def data(self) -> dict[str, Any]:
        ceiling = {"tokens_per_s": self.ceiling.tokens_per_s, "bound": self.ceiling.bound, **asdict(self.ceiling)}
        speed = {f"tokens_per_s_{key}": value for key, value in asdict(self.speed).items() if key != "count"}
        row = {"phase": "decode", "batch": self.batch, "depth": self.depth, "tokens": self.tokens, **speed}
        rates = {"factor": self.factor, "gb_per_s": self.gb_per_s, "roof_fraction": self.roof_fraction}
        invariant = {"batch_invariant": None if self.invariant is None else asdict(self.invariant)}
        return {**row, "repeat": self.speed.count, "ceiling": ceiling, **rates, **invariant}


def _beside(speed: Spread, invariant: Spread | None) -> str:
    """Tokens/s of a batch-invariant engine, and how much longer it takes."""
    if invariant is None:
        return "the same"
    return f"{invariant.median:.1f} ({speed.median / invariant.median - 1:+.1%} time)"


@dataclass(frozen=True)
class _Limits:
    """What bounds a model on a machine while each sequence decodes `tokens`."""

    work: ModelWork
    machine: Machine
    threads: int
    tokens: int

    def at(self, batch: int, depth: int) -> Ceiling:
        """That of the middle step."""
        return decode_ceiling(self.work, self.machine, depth + self.tokens // 2, self.threads, batch=batch)

    def table(self, depths: Sequence[int], batches: Sequence[int]) -> str:
        rows = []
        for depth, batch in product(depths, batches):
            ceiling = self.at(batch, depth)
            most = ceiling.tokens_per_s
            rows.append([str(batch), str(depth), f"{most:.0f}", ceiling.rate_text(most), ceiling.bound])
        return table(["batch", "depth", "tokens/s at most", "roof", "bound by"], rows)


def bench_batches(
    model: str, plan: ModelBench, *, threads: int | None, json_only: bool, progress: ProgressLine
) -> dict[str, Any]:
    """Prints ceilings, then rows, then the JSON document (alone when `json_only`), which is also returned."""
    from headrace.llm import LLM

    batches = sorted({1, *plan.batches})
    options: dict[str, Any] = {"context_len": plan.context_len, "kv_dtype": plan.kv_dtype}
    llm = LLM(model, threads=threads, max_requests=batches[-1], progress=progress, **options)
    machine = measured_machine(llm.bytes_per_token, llm.threads)
    work = work_of(llm)
    check_model(llm)
    same, engines = check_batches(llm, batches), engines_of(llm, batches)
    show = (lambda text: None) if json_only else (lambda text: print(text, flush=True))
    limits = _Limits(work, machine, llm.threads, plan.new_tokens)
    show(limits.table(plan.depths, batches))
    rows: list[BatchRow] = []
    for depth in plan.depths:
        progress(f"measuring at depth {depth}", len(rows), len(plan.depths) * len(batches))
        rows += _rows(llm, engines, plan, depth, {batch: limits.at(batch, depth) for batch in batches})
    show("\n" + table(HEADS, [row.cells() for row in rows]))
    prefill = _prefill(llm, engines, plan) if len(engines) > 1 else []
    show(_said(same, varying_parts(llm)))
    if prefill:
        show(f"prefill of {plan.prompt_len}: {prefill[0]} tokens/s, batch-invariant {_beside(*prefill)}")
    data = {**document_of(llm, machine, plan, [row.data() for row in rows]), "same_as_alone": same}
    data["prefill"] = [asdict(speed) for speed in prefill]
    print(document(data))
    return data


def _said(same: bool, varying: Sequence[str]) -> str:
    if not varying:
        return "each sequence answers in a batch as it does alone"
    what = "did" if same else "did not"
    return f"sequences {what} answer in a batch as they do alone; bits may depend on it: {', '.join(varying)}"


def varying_parts(llm: LLM) -> list[str]:
    """What of a step may compute a token otherwise beside other tokens than by itself."""
    found = []
    requests = [linear.request(llm.engine.chunk_len, [matrix]) for matrix in step_model(llm).matrices.values()]
    chosen = [(choose(linear.kernels(), request), request) for request in requests]
    if names := {kernel.name for kernel, request in chosen if not _row_by_row(kernel, request)}:
        found.append(f"linear by {', '.join(sorted(names))}")
    pages = llm.engine.runner.storage.layers[0]
    if not is_in_order(pages, llm.config):
        found.append("attention over " + ("keys with scales" if pages.key_scales is not None else "long heads"))
    return found


def _row_by_row(kernel: Kernel, request: Request) -> bool:
    return kernel.planned(request, this_machine()).batch_invariant


def check_batches(llm: LLM, batches: Sequence[int]) -> bool:
    """Whether sequences answer in batches of these sizes as they do alone. HeadraceError where they must and do not."""
    found = _difference(llm, llm.engine, batches)
    if found and not varying_parts(llm):
        raise HeadraceError(f"{found}: no speed is printed")
    return not found


def engines_of(llm: LLM, batches: Sequence[int]) -> list[Engine]:
    """The model's engine, and a batch-invariant one on the same weights where that one is not.

    HeadraceError where it is not either.
    """
    if not varying_parts(llm):
        return [llm.engine]
    invariant = llm.engine.again(batch_invariant=True)
    if found := _difference(llm, invariant, batches):
        raise HeadraceError(f"with batch_invariant, {found}: no speed is printed")
    return [llm.engine, invariant]


def _difference(llm: LLM, engine: Engine, batches: Sequence[int]) -> str:
    """Where a sequence answers in a batch otherwise than alone, in words; empty: nowhere."""
    chance, together = np.random.default_rng(1), Together(engine)
    prompts = [random_ids(llm, 1 + i % _CHECK_LEN, chance) for i in range(max(batches))]
    alone = [together.answers([prompt], _CHECK_LEN)[0] for prompt in prompts]
    for batch in batches:
        for got, expected in zip(together.answers(prompts[:batch], _CHECK_LEN), alone, strict=False):
            if got != expected:
                return f"an answer in a batch of {batch} is {got}, alone {expected}"
    return ""


class Together:
    """Sequences of one engine that are decoded together. What it has cached is dropped."""

    def __init__(self, engine: Engine) -> None:
        engine.clear()
        self.runner, self.pool, self.chunk_len = engine.runner, engine.pool, engine.chunk_len
        self._drawing = Row(engine.request([0], greedy(1)))

    def filled(self, ids: list[int]) -> CachedSequence:
        """A sequence of these tokens, computed in chunks."""
        sequence = CachedSequence()
        self.runner.sampler.prepare([])
        for first in range(0, len(ids), self.chunk_len):
            run_step(self.runner, self.pool, [NewTokens(sequence, ids[first : first + self.chunk_len], 0)])
        return sequence

    def copied(self, sequence: CachedSequence) -> CachedSequence:
        """The same tokens on other pages."""
        pages = self.pool.allocate(len(sequence.pages))
        for layer in self.runner.storage.layers:
            _copy_pages(layer, sequence.pages, pages)
        return CachedSequence(list(sequence.ids), pages)

    def decode(self, sequences: Sequence[CachedSequence], first: Sequence[int], steps: int) -> list[list[int]]:
        """Each sequence's greedy tokens behind its `first`, all sequences in one step."""
        tokens, answers, rows = list(first), list[list[int]](), [self._drawing] * len(first)
        for _ in range(steps):
            parts = [NewTokens(sequence, [token]) for sequence, token in zip(sequences, tokens, strict=True)]
            self.runner.sampler.prepare(rows)
            tokens = self.runner.sampler.drawn(run_step(self.runner, self.pool, parts), rows)
            answers.append(tokens)
        return [list(answer) for answer in zip(*answers, strict=True)]

    def answers(self, prompts: Sequence[list[int]], steps: int) -> list[list[int]]:
        """Each prompt's greedy tokens, decoded together; nothing stays cached."""
        sequences = [self.filled(prompt[:-1]) for prompt in prompts]
        answers = self.decode(sequences, [prompt[-1] for prompt in prompts], steps)
        self.forget(sequences, 0)
        return answers

    def forget(self, sequences: Sequence[CachedSequence], keep_len: int) -> None:
        """Drops what is cached of each beyond so many tokens."""
        for sequence in sequences:
            sequence.forget(keep_len, self.pool, self.runner.batch.page_size)


def _copy_pages(layer: LayerPages, source: list[int], target: list[int]) -> None:
    for part in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
        if part is not None:
            pages = part.numpy()
            pages[target] = pages[source]


class _Decoding:
    """Sequences of one engine at a depth, and how fast some of them are decoded together."""

    def __init__(self, llm: LLM, engine: Engine, plan: ModelBench, depth: int, largest: int) -> None:
        self._llm, self._depth, self._steps = llm, depth, plan.new_tokens
        self._chance, self._together = np.random.default_rng(), Together(engine)
        one = self._together.filled(random_ids(llm, depth, self._chance))
        self._sequences = [one, *(self._together.copied(one) for _ in range(largest - 1))]

    def tokens_per_s(self, batch: int) -> float:
        chosen, first = self._sequences[:batch], random_ids(self._llm, batch, self._chance)
        started = perf_counter()
        self._together.decode(chosen, first, self._steps)
        seconds = perf_counter() - started
        self._together.forget(chosen, self._depth)
        return batch * self._steps / seconds

    def close(self) -> None:
        self._together.forget(self._sequences, 0)


def _rows(
    llm: LLM, engines: Sequence[Engine], plan: ModelBench, depth: int, ceilings: dict[int, Ceiling]
) -> Iterator[BatchRow]:
    decodings = [_Decoding(llm, engine, plan, depth, max(ceilings)) for engine in engines]
    samplers = {
        f"{number} {batch}": partial(decoding.tokens_per_s, batch)
        for number, decoding in enumerate(decodings)
        for batch in ceilings
    }
    alternate(samplers, 1)  # warms up
    samples = {name: Spread.of(taken) for name, taken in alternate(samplers, plan.repeat).items()}
    for decoding in decodings:
        decoding.close()
    for batch, ceiling in ceilings.items():
        speeds = samples[f"0 {batch}"], samples["0 1"].median, samples.get(f"1 {batch}")
        yield BatchRow(batch, depth, plan.new_tokens, ceiling, *speeds)


def _prefill(llm: LLM, engines: Sequence[Engine], plan: ModelBench) -> list[Spread]:
    """Tokens/s of computing a prompt by itself, of each engine."""
    chance, togethers = np.random.default_rng(), [Together(engine) for engine in engines]

    def tokens_per_s(together: Together) -> float:
        ids, started = random_ids(llm, plan.prompt_len, chance), perf_counter()
        sequence = together.filled(ids)
        seconds = perf_counter() - started
        together.forget([sequence], 0)
        return plan.prompt_len / seconds

    samplers = {str(number): partial(tokens_per_s, together) for number, together in enumerate(togethers)}
    alternate(samplers, 1)  # warms up
    return [Spread.of(taken) for taken in alternate(samplers, plan.repeat).values()]
