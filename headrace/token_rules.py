"""What sampling parameters say in text, as token ids: all the engine goes by. Made by whoever has the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Constraint(Protocol):
    """One answer's form, token by token. Raises ArgumentError where the form costs too much to follow."""

    def restrict(self, row: np.ndarray) -> None:
        """-inf for every token that may not come next, in a row of logits [vocab]."""

    def advance(self, token: int) -> None:
        """Takes the token that came next."""


class Form(Protocol):
    """What answers have to look like."""

    def start(self) -> Constraint:
        """The beginning of an answer. Each has its own."""


@dataclass(frozen=True)
class TokenRules:
    """Ids that end an answer, sequences that never come, ids at which a repeated passage begins anew, the form."""

    end_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    dry_breakers: frozenset[int] = frozenset()
    form: Form | None = None
