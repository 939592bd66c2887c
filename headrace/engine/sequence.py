"""A sequence in the cache, and the step that gives some of many sequences new tokens. Who runs is decided elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from headrace.engine.embedder import Embedder
from headrace.engine.runner import Runner
from headrace.kv_cache.pages import PagePool, pages_needed


@dataclass(eq=False)
class CachedSequence:
    """The tokens whose keys and values lie in these pages, in order. The lists change in place."""

    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def room(self, page_size: int) -> int:
        """How many more tokens its pages hold."""
        return len(self.pages) * page_size - len(self.ids)

    def forget(self, keep_len: int, pool: PagePool, page_size: int) -> None:
        """Drops what is cached beyond the first `keep_len` tokens; pages without any go back to the pool."""
        del self.ids[keep_len:]
        keep = pages_needed(keep_len, page_size)
        pool.free(self.pages[keep:])
        del self.pages[keep:]


@dataclass(slots=True)
class NewTokens:
    """What a sequence gets in a step. The last `num_outputs` of the tokens give logits."""

    sequence: CachedSequence
    ids: Sequence[int]
    num_outputs: int = 1


def run_step(runner: Runner | Embedder, pool: PagePool, parts: Sequence[NewTokens]) -> np.ndarray:
    """Logits [outputs, vocab] of all these sequences' new tokens at once, in order, valid until the next step.

    Sequences grow by their tokens and the pages these need. CapacityError, and no sequence or page changed, when there
    are not enough pages or the batch has no room.
    """
    assert len({id(part.sequence) for part in parts}) == len(parts), "a sequence twice in one step"
    page_size = runner.batch.page_size
    missing = [_pages_missing(part, page_size) for part in parts]
    taken = pool.allocate(sum(missing))
    try:
        logits = _run(runner, parts, missing, taken)
    except BaseException:
        pool.free(taken)
        raise
    rest = iter(taken)
    for part, count in zip(parts, missing, strict=True):
        if count:
            part.sequence.pages += islice(rest, count)
        part.sequence.ids += part.ids
    return logits


def _pages_missing(part: NewTokens, page_size: int) -> int:
    over = len(part.ids) - part.sequence.room(page_size)
    return pages_needed(over, page_size) if over > 0 else 0


def _run(
    runner: Runner | Embedder, parts: Sequence[NewTokens], missing: Sequence[int], taken: Sequence[int]
) -> np.ndarray:
    rest = iter(taken)
    runner.batch.clear()
    for part, count in zip(parts, missing, strict=True):
        sequence = part.sequence
        pages = [*sequence.pages, *islice(rest, count)] if count else sequence.pages
        runner.batch.add(part.ids, len(sequence.ids), pages, part.num_outputs)
    return runner.run()
