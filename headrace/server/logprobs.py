"""Log-probabilities as OpenAI's two APIs tell them. The texts of an answer's tokens together are its text.

A token may hold part of a character: then its text is empty, and that of the token which completes the character is
the whole one. `bytes` are always its own.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from headrace.async_llm import AsyncStream, Update
from headrace.engine.logprobs import TokenLogprobs
from headrace.text.stream import TextStream
from headrace.text.tokenizer import Tokenizer


def for_chat(tokenizer: Tokenizer, stream: AsyncStream, update: Update) -> list[dict[str, Any]]:
    """One entry for each token of an update, but for the one that ended the answer and is no text."""
    first = stream.num_tokens - len(update.token_ids)
    told = []
    for i, piece in enumerate(update.pieces):
        said = stream.request.logprobs[first + i]
        top = [_entry(tokenizer, token, logprob, None) for token, logprob in said.top]
        told.append({**_entry(tokenizer, said.token_id, said.logprob, piece), "top_logprobs": top})
    return told


def _entry(tokenizer: Tokenizer, token: int, logprob: float, text: str | None) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": _text(raw) if text is None else text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


class TextLogprobs:
    """Those of an answer's text where calls are taken out of it. A token on the border has the text that is shown."""

    def __init__(self) -> None:
        self._waiting = deque[tuple[int, dict[str, Any]]]()  # where in the answer a token begins, its entry
        self._num_read = self._shown_from = self._shown_to = 0

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Takes those of tokens in the order they came."""
        for entry in entries:
            self._waiting.append((self._num_read, entry))
            self._num_read += len(entry["token"])

    def take(self, text: str, end: int) -> list[dict[str, Any]]:
        """Those of the tokens that end within a text, which ends there in the answer."""
        if self._shown_to != end - len(text):
            self._shown_from = end - len(text)
        self._shown_to = end
        told = []
        while self._waiting and self._waiting[0][0] + len(self._waiting[0][1]["token"]) <= end:
            start, entry = self._waiting.popleft()
            hidden = max(0, self._shown_from - start)
            if not hidden or hidden < len(entry["token"]):
                told.append({**entry, "token": entry["token"][hidden:]})
        return told

    def rest(self) -> list[dict[str, Any]]:
        """That of a token whose end is shown no more."""
        start, entry = self._waiting[0] if self._waiting else (self._shown_to, {})
        if start >= self._shown_to or self._shown_from == self._shown_to:
            return []
        hidden, self._shown_from = max(0, self._shown_from - start), self._shown_to
        return [{**entry, "token": entry["token"][hidden : self._shown_to - start]}]


class CompletionLogprobs:
    """The four lists of the completions API, of the tokens since the last `take`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._offset = tokenizer, 0
        self._lists: dict[str, list[Any]] = _empty()

    def add_prompt(self, stream: AsyncStream) -> str:
        """The prompt's tokens, when they have been computed; their text."""
        text, request = TextStream(self._tokenizer, skip_special=False, continues=True), stream.request
        pieces = [text.push(token) for token in request.prompt_ids]
        pieces[-1] += text.finish()
        scores: list[TokenLogprobs | None] = [*request.prompt_logprobs]
        for piece, said in zip(pieces, scores, strict=True):
            self._add(piece, said)
        return "".join(pieces)

    def add(self, stream: AsyncStream, update: Update) -> None:
        """Those of an update."""
        first = stream.num_tokens - len(update.token_ids)
        for i, piece in enumerate(update.pieces):
            self._add(piece, stream.request.logprobs[first + i])

    def take(self) -> dict[str, list[Any]]:
        """The lists, which begin anew."""
        taken, self._lists = self._lists, _empty()
        return taken

    def _add(self, piece: str, said: TokenLogprobs | None) -> None:
        top = said and {_text(self._tokenizer.token_bytes(token)): logprob for token, logprob in said.top}
        self._lists["tokens"].append(piece)
        self._lists["token_logprobs"].append(None if said is None else max(said.logprob, -9999.0))
        self._lists["top_logprobs"].append(top)
        self._lists["text_offset"].append(self._offset)
        self._offset += len(piece)


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
