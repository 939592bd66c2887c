"""--prompt-cache FILE: what a command computes begins with what the file holds, and is kept in it at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.talk import say

if TYPE_CHECKING:
    from headrace.llm import LLM


def restore(llm: LLM, file: Path | None) -> None:
    """Takes the file into the model's cache, where there is one."""
    if file is not None and file.exists():
        say(f"{llm.load_cache(file)} tokens from {file}")


def keep(llm: LLM, file: Path | None, token_ids: Sequence[int]) -> None:
    """Writes the file anew, where one is wanted and there is something to keep."""
    if file is not None and token_ids:
        kept = token_ids[: llm.context_len - 1]
        num_bytes = llm.save_cache(file, kept)
        say(f"{len(kept)} tokens kept in {file}, {num_bytes / 1e6:.1f} MB")
