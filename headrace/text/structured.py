"""Answers of a given form: JSON of a schema, a regular expression, a Lark grammar, one of some texts.

llguidance follows a grammar through the bytes of tokens and says which may come next. It does so on a thread, while the
model computes the step in between, so a mask is there when its row of logits is. An answer ends where its form may end,
and has to where nothing else can follow.

Forms come from strangers. Their length is limited, and so is what following them may take, in steps and states. They
are parsed before anything is computed, on a stack that the deepest text of that length cannot exhaust.
"""

from __future__ import annotations

import functools
import json
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.config import SamplingParams
from headrace.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from headrace.text.tokenizer import Tokenizer

MOST_CHARACTERS = 1 << 16
_STACK_BYTES = 1 << 29  # of addresses; memory is taken as it is used
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 500,  # readings of the text at one place; more make a token cost over 10 ms
    "max_lexer_states": 20_000,  # some 2 KB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_WHITESPACE = r"[ \n\t]{0,32}"  # between JSON's tokens; without an end small models go on with it
_KEPT_FORMS = 32


class Forms:
    """The forms of answers in the tokens of one tokenizer. May be shared by threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UnsupportedError(
                "structured answers need the package llguidance", "pip install 'headrace[structured]'"
            ) from error
        if not tokenizer.end_ids:
            raise UnsupportedError("structured answers need a token that ends an answer, the vocabulary has none")
        self._library = llguidance
        self._vocab_size = tokenizer.vocab_size
        self._tokens = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Spelling(tokenizer)),
            n_vocab=tokenizer.vocab_size,
            eos_token=sorted(tokenizer.end_ids),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace forms")
        self._kept = functools.lru_cache(_KEPT_FORMS)(self._parse)

    def form(self, params: SamplingParams) -> GrammarForm | None:
        """The form that the parameters ask for. Raises ArgumentError where it is none, or costs too much to follow."""
        if not params.structure:
            return None
        name = params.structure[0]
        value = getattr(params, name)
        characters = sum(map(len, value)) if name == "choice" else len(value) if isinstance(value, str) else 0
        if characters > MOST_CHARACTERS:
            raise ArgumentError(f"{name}: expected at most {MOST_CHARACTERS} characters, got {characters}")
        return self._kept(name, value)

    def _parse(self, name: str, value: Any) -> GrammarForm:
        outcome = Future[Any]()

        def parse() -> None:
            try:
                outcome.set_result(self._matcher(name, value))
            except Exception as error:
                outcome.set_exception(error)

        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=parse, name="headrace form").start()
        finally:
            threading.stack_size(before)
        try:
            matcher = outcome.result()
        except ValueError as error:  # text that is no JSON
            raise ArgumentError(f"{name}: {_one_line(str(error))}") from error
        if matcher.is_error():
            raise ArgumentError(f"{name}: {_one_line(matcher.get_error())}")
        return GrammarForm(name, matcher, self._vocab_size, self._thread)

    def _matcher(self, name: str, value: Any) -> Any:
        limits = self._library.LLParserLimits(**_LIMITS)
        return self._library.LLMatcher(self._tokens, self._grammar(name, value), log_level=0, limits=limits)

    def _grammar(self, name: str, value: Any) -> str:
        make = self._library.LLMatcher
        if name == "regex":
            return make.grammar_from_regex(value)
        if name == "grammar":
            return make.grammar_from_lark(value)
        if name == "choice":
            return make.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
        schema = value if name == "json_schema" else '{"type": "object"}'
        return make.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})


class GrammarForm:
    """A form, parsed once; every answer follows a copy of its own."""

    def __init__(self, name: str, matcher: Any, vocab_size: int, thread: ThreadPoolExecutor) -> None:
        self._name, self._matcher, self._vocab_size, self._thread = name, matcher, vocab_size, thread

    def start(self) -> GrammarConstraint:
        """The beginning of an answer."""
        return GrammarConstraint(self._name, self._matcher.deep_copy(), self._vocab_size, self._thread)


class GrammarConstraint:
    """What may come next in one answer. The next mask is in the making from the moment its token is known."""

    def __init__(self, name: str, matcher: Any, vocab_size: int, thread: ThreadPoolExecutor) -> None:
        self._name, self._matcher, self._vocab_size, self._thread = name, matcher, vocab_size, thread
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)
        self._excluded = thread.submit(self._exclude, None)

    def restrict(self, row: np.ndarray) -> None:
        """-inf for every token that may not come next, in a row of logits [vocab]."""
        np.copyto(row, -np.inf, where=self._excluded.result())

    def advance(self, token: int) -> None:
        """Takes the token that came next."""
        self._excluded = self._thread.submit(self._exclude, token)

    def _exclude(self, token: int | None) -> np.ndarray:
        """Which tokens may not follow, after `token`: bool [vocab]."""
        if token is not None:
            self._matcher.consume_token(token)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise ArgumentError(f"{self._name}: {_one_line(self._matcher.get_error())}", "a simpler one")
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        return allowed == 0


class _Spelling:
    """A tokenizer as llguidance asks for it. It must not keep the tokenizer alive, which keeps the forms alive."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.end_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = weakref.ref(tokenizer)

    def __call__(self, text: bytes) -> list[int]:
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "the tokenizer is gone"
        return tokenizer.encode(text.decode(errors="replace"), add_special=False, parse_special=False)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:400]
