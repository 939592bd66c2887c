"""From text to token ids and back, for the tokenizer a GGUF file describes.

Two families cover the models headrace runs, and a file says which one it is: byte-level BPE with a list of merges
(`gpt2`) and SentencePiece BPE with scores (`llama`). What both share is here: ids that begin and end a text, what is
shown and what is not, and the way back, which goes through bytes because a token may end inside a character.

`decode(encode(x, add_special=False)) == x` wherever the vocabulary has a token for every byte of x. Exceptions belong
to the vocabularies: some lack tokens for bytes that occur nowhere (control characters), and SentencePiece reads the
character U+2581 as a space.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from headrace.errors import ArgumentError, UnsupportedError
from headrace.text.literals import LiteralFinder
from headrace.text.pretokenizers import find_word_cut
from headrace.text.vocabulary import (
    CONTROL,
    UNKNOWN,
    Vocabulary,
    read_flag,
    read_name,
    read_numbers,
    read_strings,
    read_vocabulary,
)

if TYPE_CHECKING:
    from headrace.text.structured import Forms


class Encoder(Protocol):
    """What a family of tokenizers has to be able to do."""

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Tokenizer:
    """Text to ids and ids to text. Immutable to its users, and may be shared by threads."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        add_space_prefix: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._first_ids = [vocabulary.bos_id] if add_bos and vocabulary.bos_id is not None else []
        self._last_ids = [vocabulary.eos_id] if add_eos and vocabulary.eos_id is not None else []
        self.adds_space_prefix = add_space_prefix
        self._cached_bytes = functools.cache(encoder.token_bytes)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata.

        Raises ModelFileError where the metadata contradicts itself, UnsupportedError for another kind of tokenizer.
        """
        model = read_name(metadata, "model")
        if model == "gpt2":
            return _build_byte_level(metadata)
        if model == "llama":
            return _build_score_merge(metadata)
        raise UnsupportedError(
            f"tokenizer.ggml.model: headrace has no tokenizer of kind {model!r}", hint="supported: gpt2, llama"
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens; ids are below it."""
        return len(self._vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the vocabulary has one."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the vocabulary has one."""
        return self._vocabulary.eos_id

    @property
    def end_ids(self) -> frozenset[int]:
        """All ids after which a model has nothing more to say: end of text, of turn, of message."""
        return self._vocabulary.end_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that are marks and not text; `decode` leaves them out unless told otherwise."""
        return self._vocabulary.special_ids

    @functools.cached_property
    def controls(self) -> LiteralFinder:
        """Finds control tokens in texts that spell them out. Of one character there are none."""
        names = {self._vocabulary.tokens[i]: i for i in reversed(self._vocabulary.ids_of(CONTROL, UNKNOWN))}
        return LiteralFinder({name: i for name, i in names.items() if len(name) > 1})

    @functools.cached_property
    def forms(self) -> Forms:
        """The forms that answers in these tokens can be given; UnsupportedError where llguidance is not installed."""
        from headrace.text.structured import Forms

        return Forms(self)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of `text`.

        add_special: put the begin and end ids around it that the file asks for. Pass False for the output of a chat
            template, which writes its own.
        parse_special: a control token spelled out in the text (`<|im_end|>`) becomes that token. Pass False for text
            that must not be able to do this.
        """
        try:
            text.encode()
        except (UnicodeEncodeError, AttributeError) as error:
            raise ArgumentError(f"text: expected a string of Unicode characters: {error}") from error
        ids = self._encoder.encode(text, parse_special)
        return [*self._first_ids, *ids, *self._last_ids] if add_special else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; so does a character cut off at the end."""
        shown, at_start = [], True
        for token_id in ids:
            piece, at_start = self.shown_bytes(token_id, at_start=at_start, skip_special=skip_special)
            shown.append(piece)
        return b"".join(shown).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token; a control token stands for its name."""
        if not 0 <= token_id < len(self._vocabulary.tokens):
            raise ArgumentError(f"token id: expected 0 to {self.vocab_size - 1}, got {token_id!r}")
        return self._cached_bytes(int(token_id))

    def ids_with(self, text: str) -> list[int]:
        """The ids of all tokens that are ordinary text and have `text` in them, ascending."""
        wanted = text.encode()
        ordinary = (i for i in range(self.vocab_size) if i not in self.special_ids)
        return [i for i in ordinary if wanted in self.token_bytes(i)]

    def shown_bytes(self, token_id: int, *, at_start: bool, skip_special: bool) -> tuple[bytes, bool]:
        """One step of decoding: the bytes the token adds to the text, and whether the next is at the start again.

        The start matters where `encode` put a space before the text (SentencePiece): there it is taken off again.
        """
        if token_id in self._vocabulary.special_ids:
            return (b"" if skip_special else self.token_bytes(token_id)), True
        piece = self.token_bytes(token_id)
        return (piece.removeprefix(b" ") if at_start and self.adds_space_prefix else piece), False


def _build_byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    from headrace.text.byte_level import ByteLevelEncoder

    cut = find_word_cut(read_name(metadata, "pre"))
    vocabulary = read_vocabulary(metadata)
    encoder = ByteLevelEncoder(vocabulary, read_strings(metadata, "merges"), cut)
    return Tokenizer(
        vocabulary,
        encoder,
        add_bos=read_flag(metadata, "add_bos_token", cut.add_bos),
        add_eos=read_flag(metadata, "add_eos_token", False),
    )


def _build_score_merge(metadata: Mapping[str, Any]) -> Tokenizer:
    from headrace.text.score_merge import ScoreMergeEncoder

    vocabulary = read_vocabulary(metadata)
    scores = read_numbers(metadata, "scores", len(vocabulary.tokens))
    add_space_prefix = read_flag(metadata, "add_space_prefix", True)
    return Tokenizer(
        vocabulary,
        ScoreMergeEncoder(vocabulary, scores, add_space_prefix),
        add_bos=read_flag(metadata, "add_bos_token", True),
        add_eos=read_flag(metadata, "add_eos_token", False),
        add_space_prefix=add_space_prefix,
    )
