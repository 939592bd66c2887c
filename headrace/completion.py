"""What an answer has come to: its text and tokens, how sure the model was, how fast it went."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.engine.logprobs import TokenLogprobs
from headrace.engine.request import Request
from headrace.text.stream import TextStream


@dataclass(frozen=True)
class Timings:
    """Seconds, and tokens per second. Prefill counts the tokens it computed; decode leaves the first token out."""

    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float

    @classmethod
    def of(cls, load_s: float, request: Request) -> Timings:
        """Those of a request."""
        prefilled = len(request.prompt_ids) - request.reused_len
        decoded = len(request.token_ids) - 1
        return cls(
            load_s=load_s,
            prefill_s=request.prefill_s,
            decode_s=request.decode_s,
            prefill_tokens_per_s=prefilled / request.prefill_s if request.prefill_s else 0.0,
            decode_tokens_per_s=decoded / request.decode_s if request.decode_s else 0.0,
        )


@dataclass(frozen=True)
class Choice:
    """One of the answers to a prompt. `logprobs`: one for each token, where the parameters asked for them."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop", "length", "cancelled" or "error"
    logprobs: list[TokenLogprobs] | None = None

    @classmethod
    def of(cls, request: Request, text: str, *, logprobs: bool) -> Choice:
        """What a request has come to."""
        told = list(request.logprobs) if logprobs else None
        return cls(text, list(request.token_ids), request.finish_reason or "length", told)


@dataclass(frozen=True)
class Completion:
    """An answer and how it was made. `roof_fraction` is None where the machine's roof was never measured.

    choices: all n answers; text, token_ids, finish_reason, logprobs and timings are those of the first.
    prompt_logprobs: one for each token of the prompt, None for the first, where the parameters asked for them.
    """

    model: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str  # "stop", "length", "cancelled" or "error"
    timings: Timings
    bytes_per_token: int
    gb_per_s: float
    roof_fraction: float | None
    logits_hash: str
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    choices: list[Choice] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A token and the text it completes, which may be empty: characters are never split."""

    text: str
    token_id: int


class Answer:
    """A request and the text of its tokens, one after the other."""

    def __init__(self, request: Request, stream: TextStream) -> None:
        self.request = request
        self.stopped = False  # by a stop string
        self._stream = stream
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._shown)

    @property
    def num_tokens(self) -> int:
        """Tokens that have become text so far."""
        return len(self._shown)

    def push(self) -> Piece:
        """The next of the request's tokens, and the text that can be shown now; at the end also what was held back.

        A token that ends the answer has no text.
        """
        request, place = self.request, len(self._shown)
        token, last = request.token_ids[place], place + 1 == len(request.token_ids)
        text = "" if last and request.finish_reason == "stop" else self._stream.push(token)
        self.stopped = self._stream.stopped
        if last and request.finish_reason and not self.stopped:
            text += self._stream.finish()
        self._shown.append(text)
        return Piece(text, token)

    def cut(self) -> None:
        """Forgets tokens behind the stop string: some may have been drawn in the same step."""
        del self.request.token_ids[self.num_tokens :], self.request.logprobs[self.num_tokens :]
