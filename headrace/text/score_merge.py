"""SentencePiece BPE: the tokenizer of Llama 2, Mistral 7B and Gemma, from a vocabulary with scores and no merges.

Text starts as single characters. Again and again the two neighbours whose union is the token with the best score are
joined, the leftmost where scores are equal, until no union is a token. What then is no token is written byte by byte.

The merges could be written out as a list for the tokenizers library, but a list has an order and equal scores have
none: runs such as "aaaaa" would come out differently from the tokenizer the model was trained with, and finding all
splits of 150 000 tokens takes a second. The algorithm itself is short, exact, and needs nothing but the scores.
Words repeat, so each word is worked out once and remembered.
"""

from __future__ import annotations

import heapq
import re

import numpy as np

from headrace.errors import ModelFileError
from headrace.text.literals import LiteralFinder
from headrace.text.vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

SPACE = "\u2581"
"""How a space is spelled in these vocabularies; it is not an underscore."""

_MAX_REMEMBERED_WORDS = 1 << 16
_MAX_REMEMBERED_LEN = 64


class ScoreMergeEncoder:
    """Text to token ids and single ids back to bytes, for vocabularies with scores."""

    def __init__(self, vocabulary: Vocabulary, scores: np.ndarray, add_space_prefix: bool) -> None:
        self._vocabulary = vocabulary
        self._prefix = SPACE if add_space_prefix else ""
        self._specials = LiteralFinder(_ids_by_spelling(vocabulary, vocabulary.ids_of(CONTROL, UNKNOWN)))
        users = _ids_by_spelling(vocabulary, vocabulary.ids_of(USER_DEFINED))
        self._users = LiteralFinder({name.replace(" ", SPACE): i for name, i in users.items()})
        self._byte_ids = _find_byte_ids(vocabulary)
        self._merger = _Merger(vocabulary, scores)
        self._remembered: dict[str, list[int]] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of `text`; control tokens spelled out in it become their ids only if `parse_special`."""
        ids: list[int] = []
        for part, special_id in self._specials.split(text) if parse_special else [(text, None)]:
            if special_id is not None:
                ids.append(special_id)
            elif part:
                ids += self._encode_plain(self._prefix + part.replace(" ", SPACE))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token stands for; a control token stands for its name."""
        token = self._vocabulary.tokens[token_id]
        kind = self._vocabulary.kinds[token_id]
        if kind == BYTE:
            return bytes([_byte_value(token)])
        return token.encode() if kind in (CONTROL, UNKNOWN) else token.replace(SPACE, " ").encode()

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        unknown = self._vocabulary.unknown_id
        for part, user_id in self._users.split(text):
            if user_id is not None:
                ids.append(user_id)
                continue
            for word in self._merger.cut(part):
                for token_id in self._encode_word(word):
                    # As SentencePiece has it, neighbours that are unknown are one unknown.
                    if token_id != unknown or ids[-1:] != [unknown]:
                        ids.append(token_id)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = self._remembered.get(word)
        if ids is None:
            ids = [i for piece in self._merger.merge(word) for i in self._ids_of_piece(piece)]
            if len(word) <= _MAX_REMEMBERED_LEN:
                if len(self._remembered) >= _MAX_REMEMBERED_WORDS:
                    self._remembered = {}
                self._remembered[word] = ids
        return ids

    def _ids_of_piece(self, piece: str) -> list[int]:
        known = self._merger.ids.get(piece)
        if known is not None:
            return [known]
        if self._byte_ids:
            return [self._byte_ids[byte] for byte in piece.encode()]
        return [] if self._vocabulary.unknown_id is None else [self._vocabulary.unknown_id]


class _Merger:
    """The score-ordered joining of neighbours, within one word."""

    def __init__(self, vocabulary: Vocabulary, scores: np.ndarray) -> None:
        plain = ~np.isin(vocabulary.kinds, (CONTROL, UNKNOWN, BYTE))
        self.ids = _ids_by_spelling(vocabulary, np.flatnonzero(plain).tolist())
        self._cost = dict(zip(self.ids, (-scores[list(self.ids.values())]).tolist(), strict=True))
        self._unused = frozenset(vocabulary.tokens[i] for i in vocabulary.ids_of(UNUSED))
        has_inner_space = re.compile(f"[^{SPACE}]{SPACE}").search
        self._can_cut = not any(SPACE in token[1:] and has_inner_space(token) for token in self.ids)

    def cut(self, text: str) -> list[str]:
        """Words that no merge can cross: where no token has a space inside, every space begins one."""
        return re.findall(f"{SPACE}*[^{SPACE}]+|{SPACE}+", text) if self._can_cut else [text]

    def merge(self, word: str) -> list[str]:
        """The pieces `word` ends up as. A heap of candidate pairs: n log n for a word of n characters."""
        pieces = list(word)
        before, after = list(range(-1, len(word) - 1)), [*range(1, len(word)), -1]
        candidates: list[tuple[float, int, int, str]] = []
        halves: dict[str, tuple[str, str]] = {}

        def offer(left: int, right: int) -> None:
            union = pieces[left] + pieces[right]
            cost = self._cost.get(union)
            if cost is None:
                return
            heapq.heappush(candidates, (cost, left, right, union))
            if union in self._unused:
                halves[union] = (pieces[left], pieces[right])

        for left in range(len(word) - 1):
            offer(left, left + 1)
        while candidates:
            _, left, right, union = heapq.heappop(candidates)
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != union:
                continue  # one of the two has been joined with another neighbour since
            pieces[left], pieces[right] = union, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [part for piece in pieces if piece for part in _undo_unused(piece, halves)]


def _undo_unused(piece: str, halves: dict[str, tuple[str, str]]) -> list[str]:
    """Take apart pieces that may be passed through while merging but not be given out."""
    parts, waiting = [], [piece]
    while waiting:
        part = waiting.pop()
        if part in halves:
            waiting += reversed(halves[part])
        else:
            parts.append(part)
    return parts


def _ids_by_spelling(vocabulary: Vocabulary, ids: list[int]) -> dict[str, int]:
    return {vocabulary.tokens[i]: i for i in reversed(ids)}  # of two equal spellings the first id counts


def _find_byte_ids(vocabulary: Vocabulary) -> dict[int, int]:
    """The id of each byte's token, or nothing unless all 256 are there."""
    ids = {_byte_value(vocabulary.tokens[i]): i for i in vocabulary.ids_of(BYTE)}
    return ids if len(ids) == 256 else {}


def _byte_value(token: str) -> int:
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    if not match:
        raise ModelFileError(f"tokenizer.ggml.tokens: a byte token is spelled <0xNN>, got {token!r}")
    return int(match[1], 16)
