"""Comparing engines on one file: who can take part, all in memory at once or one after the other, row by row."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from headrace.bench.accuracy_texts import TEXTS
from headrace.bench.engines import READ, Engine, Field, Opened, available_bytes, opened
from headrace.bench.fresh_start import measure_loads, measure_starts
from headrace.bench.peer_process import PeerFailed, PeerProcess
from headrace.bench.peers import Opening
from headrace.bench.roofline import ModelWork, measured_machine
from headrace.bench.timing import Spread
from headrace.bench.versus_cases import Case, why_no_room
from headrace.bench.versus_limits import Limits
from headrace.bench.versus_rounds import Found, Texts, measure
from headrace.bench.versus_table import OURS
from headrace.errors import HeadraceError
from headrace.talk import say
from headrace.text.tokenizer import Tokenizer
from headrace.weights.gguf import open_gguf
from headrace.weights.load import load_config
from headrace.weights.quantize import quantize_file

_TEXT_LEN = 512  # tokens of each text that answers are compared over, at most
_MOST_EXACT_BYTES = 3 << 30  # of float32 weights written for the exact answers


@dataclass(frozen=True)
class Versus:
    """What to compare. `isa`: the instruction set to hold engines to; `llama_lib`: where llama.cpp is built for it."""

    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    threads: int
    kv_dtype: str = "float16"
    isa: str = ""
    llama_lib: Path | None = None


@dataclass(frozen=True)
class FileFacts:
    """What a file says of itself."""

    context_len: int
    vocab_size: int
    weights: int
    texts: list[list[int]]

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        with open_gguf(path) as file:
            config, tokenizer = load_config(file), Tokenizer.from_metadata(file.metadata)
            weights = sum(prod(info.shape) for info in file.tensors.values())
        longest = min(_TEXT_LEN, config.context_len - 1)
        texts = [tokenizer.encode(text)[:longest] for text in TEXTS.values()]
        return cls(config.context_len, config.vocab_size, weights, texts)


@dataclass
class Comparison:
    """One file's rows, filled in as they are measured."""

    path: Path
    plan: Versus
    facts: FileFacts
    entries: Field
    results: dict[Case, dict[str, Found]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    together: bool = True
    limits: Limits | None = None
    started: float = field(default_factory=perf_counter)

    @classmethod
    def of(cls, path: Path, plan: Versus) -> Comparison:
        facts = FileFacts.of(path)
        context_len = _context_len(plan.cases, facts)
        opening = Opening(str(path), plan.threads, context_len, kv_dtype=plan.kv_dtype, isa=plan.isa)
        entries = Field((OURS, *plan.peers), opening, facts.weights, plan.llama_lib)
        return cls(path, plan, facts, entries, {case: {} for case in plan.cases})

    def run(self) -> None:
        """Measures every row for which there is room; the others say why not."""
        available = available_bytes()
        reasons = {name: self.entries.too_large(name, available) for name in self.entries.names}
        self._add_all({name: Found(why_not=reason) for name, reason in reasons.items() if reason})
        self.entries = replace(self.entries, names=tuple(name for name, reason in reasons.items() if not reason))
        for case in self.plan.cases:
            if reason := why_no_room(case, self.facts.context_len):
                self.results[case] = {OURS: Found(why_not=reason)}
        self._run_fresh()
        groups = self.entries.groups(available)
        self.together = len(groups) == 1
        with tempfile.TemporaryDirectory() as folder:
            exact = self._exact_answers(Path(folder))
            for names in groups:
                self._run_group(names, exact)

    def _say(self, what: str) -> None:
        """A line on stderr per row: a run takes minutes."""
        say(f"{perf_counter() - self.started:6.0f} s  {self.path.name}: {what}")

    def _add_all(self, found: Mapping[str, Found]) -> None:
        for case in self.results:
            self.results[case] |= found

    def _wants(self, *phases: str) -> list[Case]:
        """Rows of these families for which there is room."""
        return [c for c in self.plan.cases if c.phase in phases and not why_no_room(c, self.facts.context_len)]

    def _run_fresh(self) -> None:
        for case in self._wants("start"):
            self._say("start")
            self.results[case] |= measure_starts(self.entries)
        if self._wants("load", "memory"):
            self._say("load")
            for case, found in measure_loads(self.entries).items():
                self.results[case] |= found

    def _run_group(self, names: Sequence[str], exact: list[str]) -> None:
        """Rows of engines that are in memory together."""
        alone, shared = self._wants("prefill", "decode"), self._wants("batch")
        if not (alone or shared or exact):
            return
        self._say(f"opening {', '.join(names)}")
        with opened(self.entries, names) as group:
            self.about |= group.about
            self._learn_limits(group)
            texts = Texts.of(self.facts.vocab_size, self.entries.opening.context_len)
            self._run_rows(group, alone, texts)
            if exact:
                self._run_accuracy(group, exact)
            if shared:
                room = max(case.context_len for case in shared), max(case.sequences for case in shared)
                for engine in _asked(group):
                    _attempt(group, engine, "arrange", *room)
                self._run_rows(group, shared, texts)

    def _learn_limits(self, group: Opened) -> None:
        if OURS in group.engines:
            try:
                work = ModelWork(**group.engines[OURS].ask("work"))
            except PeerFailed as failed:
                raise HeadraceError(f"{failed}: no speed is printed") from failed
            machine = measured_machine(work.weight_bytes, self.plan.threads)
            self.limits = Limits(work, machine, self.plan.threads, bool(self.plan.isa))

    def _run_rows(self, group: Opened, cases: Sequence[Case], texts: Texts) -> None:
        for case in cases:
            self._say(str(case))
            found = measure(group, case, texts, self.limits.read_bytes(case) if self.limits else 0)
            self.results[case] |= self.limits.shares(case, found) if self.limits else found

    def _exact_answers(self, folder: Path) -> list[str]:
        """Files of logits, one per text, of this file's weights in float32."""
        case = next(iter(self._wants("accuracy")), None)
        if case is None or OURS not in self.entries.names:
            return []
        if (needed := 4 * self.facts.weights) > _MOST_EXACT_BYTES:
            self.results[case] |= {OURS: Found(why_not=f"float32 weights would take {needed / 1e9:.0f} GB")}
            return []
        self._say("exact answers")
        whole = folder / "float32.gguf"
        quantize_file(self.path, whole, "f32")
        found = [str(folder / f"{number}.npy") for number in range(len(self.facts.texts))]
        with PeerProcess(OURS) as process:
            try:
                process.open(Opening(str(whole), self.plan.threads, self.entries.opening.context_len, 1, "float32"))
                for ids, target in zip(self.facts.texts, found, strict=True):
                    process.ask("save_logits", ids, target)
            except PeerFailed as failed:
                self.results[case] |= {OURS: Found(why_not=f"no exact answers: {failed}")}
                return []
        whole.unlink()
        return found

    def _run_accuracy(self, group: Opened, exact: list[str]) -> None:
        self._say("accuracy")
        found: dict[str, Found] = {}
        for engine in _asked(group):
            told = [_attempt(group, engine, "divergence", *both) for both in zip(exact, self.facts.texts, strict=True)]
            positions = [x for text in told if isinstance(text, list) for x in text]
            spread = Spread(sum(positions) / max(len(positions), 1), min(positions, default=0.0), 0.0, len(positions))
            failed = next((text for text in told if isinstance(text, str)), "")
            done = Found(replace(spread, high=max(positions, default=0.0)))
            found[engine.name] = Found(why_not=failed) if failed else done
        self.results[Case("accuracy")] |= found

    def conditions(self) -> dict[str, Any]:
        """Under which the figures were taken."""
        return {
            "model": self.path.name,
            "threads": self.plan.threads,
            "KV cache": self.plan.kv_dtype,
            "instruction set": self.plan.isa or "best",
            "engines": "in turns" if self.together else "one after the other, for memory",
            **{name: told for name, told in self.about.items() if told},
        }


def _context_len(cases: Sequence[Case], facts: FileFacts) -> int:
    """Room for the longest row of one sequence, and for the texts."""
    lens = [c.context_len for c in cases if c.sequences == 1 and not why_no_room(c, facts.context_len)]
    return min(facts.context_len, max([_TEXT_LEN + 8, *lens]))


def _asked(group: Opened) -> list[Engine]:
    return [engine for name, engine in group.engines.items() if name != READ]


def _attempt(group: Opened, engine: Engine, call: str, *given: Any) -> Any:
    """What the engine answers; the reason, as text, where it fails."""
    try:
        if call == "arrange":
            return engine.arrange(*given)
        return engine.ask(call, *given)
    except PeerFailed as failed:
        if engine.name in group.engines:
            group.fail(engine.name, str(failed))
        return str(failed)
