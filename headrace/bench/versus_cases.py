"""The rows of `headrace bench versus`: what is measured, in what unit, and which way is better.

A row is asked for by its family ("decode") or alone ("decode@4096"). One that a model has no room for stays, with the
reason in place of figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.errors import ArgumentError

SHARED_DEPTH = 128  # tokens that each of many sequences has cached
_SPARE = 8  # tokens of room that an engine may want beyond what a row computes

# How a ratio is put: speeds and times by how much sooner headrace is done, amounts by how much of the other's it has.
UNITS = {"prefill": "tokens/s", "decode": "tokens/s", "batch": "tokens/s", "start": "s", "load": "s"}
AMOUNTS = {"memory": "MB", "accuracy": "nats"}


@dataclass(frozen=True)
class Case:
    """A row: `tokens` computed at once (prefill) or one by one (decode, batch) behind `depth` cached ones."""

    phase: str
    tokens: int = 0
    depth: int = 0
    sequences: int = 1

    def __str__(self) -> str:
        named = {
            "prefill": f"prefill {self.tokens}",
            "decode": f"decode at {self.depth}",
            "batch": f"decode of {self.sequences} at {self.depth}",
            "start": "start to first token",
            "load": "load and first step",
            "memory": "peak memory",
            "accuracy": "KL from float32 weights",
        }
        return named[self.phase]

    @property
    def number(self) -> int:
        """What tells it from others of its family."""
        return {"prefill": self.tokens, "decode": self.depth, "batch": self.sequences}.get(self.phase, 0)

    @property
    def context_len(self) -> int:
        """Room that one of its sequences needs."""
        return self.depth + self.tokens + _SPARE

    @property
    def unit(self) -> str:
        return UNITS.get(self.phase) or AMOUNTS[self.phase]

    def ratio(self, ours: float, theirs: float) -> float:
        """How many times as fast headrace is; of an amount, how many times the other's it has."""
        return theirs / ours if self.unit == "s" else ours / theirs


FAMILIES: dict[str, tuple[Case, ...]] = {
    "prefill": (Case("prefill", 512), Case("prefill", 2048)),
    "decode": tuple(Case("decode", 64, depth) for depth in (16, 1024, 4096, 8000)),
    "batch": tuple(Case("batch", 16, SHARED_DEPTH, sequences) for sequences in (1, 4, 8, 16, 32)),
    "start": (Case("start"),),
    "load": (Case("load"), Case("memory")),
    "accuracy": (Case("accuracy"),),
}
ROWS = ",".join(FAMILIES)
QUICK = "prefill@512,decode@16,decode@4096"


def chosen_cases(rows: str) -> tuple[Case, ...]:
    """The rows of a list with commas, each a family or family@number, in the order of the table."""
    asked = [name.strip() for name in rows.split(",") if name.strip()]
    known = [case for cases in FAMILIES.values() for case in cases]
    names = {*FAMILIES, *(f"{family}@{case.number}" for family, cases in FAMILIES.items() for case in cases)}
    for name in asked:
        if name not in names:
            raise ArgumentError(f"--rows: expected some of {ROWS}, got {name!r}", f"or single rows: {QUICK}")
    if not asked:
        raise ArgumentError(f"--rows: expected some of {ROWS}, got none")
    return tuple(case for case in known if _is_asked(case, asked))


def _is_asked(case: Case, asked: Sequence[str]) -> bool:
    families = [family for family, cases in FAMILIES.items() if case in cases]
    alone = f"{families[0]}@{case.number}"
    # A batch's factor is over one sequence, which is therefore among them.
    first = case.phase == "batch" and case.sequences == 1 and any(name.startswith("batch") for name in asked)
    return families[0] in asked or alone in asked or first


def why_no_room(case: Case, context_len: int) -> str:
    """The reason why a model with such a context cannot have this row; empty when it can."""
    if case.context_len <= context_len:
        return ""
    return f"context {context_len} too short for {case.context_len} tokens"
