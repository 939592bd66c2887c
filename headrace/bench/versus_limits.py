"""What the machine allows for a row of `bench versus`: bytes over a plain read in the same rounds, and arithmetic.

The arithmetic's roofs are those of the machine's best instruction set: a run held to a lower one has no share of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.bench.peers import KINDS
from headrace.bench.roofline import Ceiling, ModelWork, decode_ceiling, prefill_ceiling
from headrace.bench.versus_cases import Case
from headrace.bench.versus_rounds import Found
from headrace.machine import Machine


@dataclass(frozen=True)
class Limits:
    """A model on a machine. `held`: whether the engines are kept at an instruction set."""

    work: ModelWork
    machine: Machine
    threads: int
    held: bool = False

    def ceiling(self, case: Case) -> Ceiling:
        """That of the whole prompt, or of the middle step."""
        if case.phase == "prefill":
            return prefill_ceiling(self.work, self.machine, case.depth, case.tokens, self.threads)
        middle = case.depth + case.tokens // 2
        return decode_ceiling(self.work, self.machine, middle, self.threads, batch=case.sequences)

    def read_bytes(self, case: Case) -> int:
        """What a step of decode reads; 0 for rows that have no such step."""
        return int(self.ceiling(case).num_bytes) if case.phase in ("decode", "batch") else 0

    def shares(self, case: Case, found: Mapping[str, Found]) -> dict[str, Found]:
        """The figures with their shares of the roof, for those who read the file's bytes."""
        return {name: self._share(case, name, each) for name, each in found.items()}

    def _share(self, case: Case, name: str, found: Found) -> Found:
        reads = KINDS[name.partition(",")[0]].reads_file if name.partition(",")[0] in KINDS else True
        if found.spread is None or not reads or (self.held and case.phase == "prefill"):
            return found
        ceiling = self.ceiling(case)
        if found.read:
            ceiling = replace(ceiling, memory_s=ceiling.num_bytes / found.read)
        if self.held:
            ceiling = replace(ceiling, compute_s=0.0)
        return replace(found, roof=found.spread.median / ceiling.tokens_per_s)
