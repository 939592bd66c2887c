"""A model's vocabulary as its file states it: tokens, what kind each one is, and which of them mean something.

A GGUF file keeps its tokenizer as plain metadata. Three arrays run side by side, one entry per token id:
the token's spelling, its kind (an ordinary piece of text, a control mark such as `<|im_end|>`, a raw byte, ...)
and, for some tokenizers, a score. Beside them stand single numbers: the ids that begin and end a text.

Files are not trusted: every array and every id is checked here, once, and used without checks above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import ModelFileError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""The kinds of token, by the numbers `tokenizer.ggml.token_type` uses."""

END_NAMES = frozenset(
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "</s>"]
)
"""Control tokens that end an answer wherever they occur: files often name only one of those a model uses."""

_TURN_NAMES = END_NAMES | {"<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"}
"""Control tokens whatever a file calls them: some have Gemma's among the words that are matched whole."""

_LLAMA_DEFAULT_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # what SentencePiece assigns unless told otherwise


@dataclass(frozen=True)
class Vocabulary:
    """Token spellings and kinds, indexed by token id, and the ids with a meaning of their own."""

    tokens: list[str]
    kinds: np.ndarray
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    special_ids: frozenset[int]  # never part of the text: control tokens, unknown, and the ends
    end_ids: frozenset[int]

    def ids_of(self, *kinds: int) -> list[int]:
        """The ids of all tokens of these kinds, ascending."""
        return [int(i) for i in np.flatnonzero(np.isin(self.kinds, kinds))]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a file's metadata; ModelFileError where it contradicts itself."""
    tokens = read_strings(metadata, "tokens")
    kinds = read_numbers(metadata, "token_type", len(tokens), default=NORMAL).copy()
    kinds[[i for i in np.flatnonzero(kinds == USER_DEFINED) if tokens[i] in _TURN_NAMES]] = CONTROL
    ids = {name: special_token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "unknown", "eot", "eom")}
    marks = {name: i for name, i in ids.items() if i is not None and name != "unknown"}
    ends = {i for name, i in marks.items() if name != "bos"}
    controls = np.flatnonzero(np.isin(kinds, (CONTROL, UNKNOWN))).tolist()
    named_ends = {i for i in controls if tokens[i] in END_NAMES}
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unknown_id=ids["unknown"],
        special_ids=frozenset(controls) | frozenset(marks.values()),
        end_ids=frozenset(ends | named_ends),
    )


def special_token_id(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    """The id the file gives for "bos", "eos", "unknown", "padding", "eot" or "eom"; None where it has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in metadata:
        default = _LLAMA_DEFAULT_IDS.get(name) if read_name(metadata, "model") == "llama" else None
        return default if default is not None and default < num_tokens else None
    value = metadata[key]
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < num_tokens:
        raise ModelFileError(f"{key}: expected a token id below {num_tokens}, got {value!r}")
    return int(value)


def read_name(metadata: Mapping[str, Any], name: str) -> str | None:
    """The text under `tokenizer.ggml.<name>`; None where the file has none."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, str):
        raise ModelFileError(f"tokenizer.ggml.{name}: expected a name, got {value!r:.80}")
    return value


def read_flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    """The yes or no under `tokenizer.ggml.<name>`."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, (bool, np.bool_)):
        raise ModelFileError(f"tokenizer.ggml.{name}: expected true or false, got {value!r}")
    return bool(value)


def read_strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    """The non-empty list of strings under `tokenizer.ggml.<name>`."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise ModelFileError(f"tokenizer.ggml.{name} is missing", hint="The file carries no usable tokenizer.")
    if not isinstance(value, (list, tuple)) or set(map(type, value)) != {str}:
        raise ModelFileError(f"tokenizer.ggml.{name}: expected a non-empty list of strings")
    return list(value)


def read_numbers(metadata: Mapping[str, Any], name: str, count: int, default: float | None = None) -> np.ndarray:
    """The `count` numbers under `tokenizer.ggml.<name>`; all `default` where the file has none."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None and default is not None:
        return np.full(count, default)
    if value is None:
        raise ModelFileError(f"tokenizer.ggml.{name} is missing")
    numbers = np.asarray(value)
    if numbers.shape != (count,) or numbers.dtype.kind not in "iuf" or np.isnan(numbers).any():
        raise ModelFileError(f"tokenizer.ggml.{name}: expected one number for each of the {count} tokens")
    return numbers
