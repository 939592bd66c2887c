"""Byte-level BPE: the tokenizer of GPT-2, Llama 3, Qwen and SmolLM, run by the tokenizers library.

Text becomes UTF-8, every byte is spelled as one printable character (so that a vocabulary is plain text), words are
cut out, and inside each word the pair of neighbours that was learned first is merged until no learned pair is left.

Absent on purpose: a decoder. Token ids become bytes by undoing the spelling, which is exact for any ids a model
produces, also for half a character.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.errors import ModelFileError
from headrace.text.pretokenizers import WordCut, build_pre_tokenizer
from headrace.text.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import models


class ByteLevelEncoder:
    """Text to token ids and single ids back to bytes, for vocabularies spelled byte by byte."""

    def __init__(self, vocabulary: Vocabulary, merges: list[str], cut: WordCut) -> None:
        self._vocabulary = vocabulary
        self._cut = cut
        self._model = _build_model(vocabulary, merges, cut)
        self._verbatim = frozenset(vocabulary.ids_of(CONTROL, UNKNOWN, USER_DEFINED))
        # Two views of one model: the library keeps the tokens it looks for in the text in the tokenizer, and one
        # whose setting is flipped for a call could not be used by two threads.
        self._views = {parse: self._build_view(parse) for parse in (True, False)}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of `text`; control tokens spelled out in it become their ids only if `parse_special`."""
        return self._views[parse_special].encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token stands for; a control or user-defined token stands for its name."""
        token = self._vocabulary.tokens[token_id]
        if token_id in self._verbatim:
            return token.encode()
        return b"".join(_BYTE_OF.get(character) or character.encode() for character in token)

    def _build_view(self, parse_special: bool) -> LibraryTokenizer:
        from tokenizers import AddedToken, Tokenizer

        view = Tokenizer(self._model)
        view.pre_tokenizer = build_pre_tokenizer(self._cut)
        kinds = (CONTROL, UNKNOWN, USER_DEFINED) if parse_special else (USER_DEFINED,)
        names = [self._vocabulary.tokens[i] for i in self._vocabulary.ids_of(*kinds)]
        view.add_tokens([AddedToken(name, normalized=False) for name in names])
        return view


def _build_model(vocabulary: Vocabulary, merges: list[str], cut: WordCut) -> models.BPE:
    from tokenizers import models

    # From the last id to the first, so that of two equal spellings the first id stays.
    num_tokens = len(vocabulary.tokens)
    ids = dict(zip(reversed(vocabulary.tokens), range(num_tokens - 1, -1, -1), strict=True))
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    if set(map(len, pairs)) - {2}:
        wrong = next(" ".join(pair) for pair in pairs if len(pair) != 2)
        raise ModelFileError(f"tokenizer.ggml.merges: expected two pieces with a space between, got {wrong!r}")
    try:
        return models.BPE(vocab=ids, merges=pairs, ignore_merges=cut.whole_words_first)
    except Exception as error:  # the library raises plain Exception, for a merge whose pieces are not tokens
        raise ModelFileError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error


def _spell_bytes() -> dict[str, bytes]:
    """What byte each character of a byte-level vocabulary stands for.

    Bytes that are printable Latin-1 characters are spelled as these; the others, in order, as U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): bytes([byte]) for byte in printable}
    return spelled | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF = _spell_bytes()
