"""Sampling parameters that are text, in the tokens of a tokenizer: words that are banned, breakers of repetition."""

from __future__ import annotations

from headrace.config import SamplingParams
from headrace.text.tokenizer import Tokenizer
from headrace.token_rules import TokenRules

_BEFORE = "\n"  # what a word's spelling does not merge with


def token_rules(tokenizer: Tokenizer, params: SamplingParams) -> TokenRules:
    """What the engine needs to know beside `params`. Raises ArgumentError for a form that is none."""
    words = [spelling for word in params.bad_words for spelling in _spellings(tokenizer, word)]
    return TokenRules(
        end_ids=tokenizer.end_ids,
        bad_words=tuple(dict.fromkeys(words)),
        dry_breakers=_breakers(tokenizer, params.dry_breakers) if params.dry_multiplier else frozenset(),
        form=tokenizer.forms.form(params) if params.structure else None,
    )


def _spellings(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    """The word's tokens at the beginning of a line and behind a space."""
    bare = word.lstrip(" ")
    found = [_tokens_behind(tokenizer, text) for text in (bare, " " + bare)] if word.strip() else []
    return [ids for ids in found if ids] or [tuple(tokenizer.encode(word, add_special=False, parse_special=False))]


def _tokens_behind(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The tokens of `text` behind another; none where a token spans both."""
    ids = tokenizer.encode(_BEFORE + text, add_special=False, parse_special=False)
    wanted, num_bytes = len(text.encode()), 0
    for i in range(len(ids) - 1, -1, -1):
        num_bytes += len(tokenizer.token_bytes(ids[i]))
        if num_bytes >= wanted:
            return tuple(ids[i:]) if num_bytes == wanted else ()
    return ()


def _breakers(tokenizer: Tokenizer, texts: tuple[str, ...]) -> frozenset[int]:
    """All tokens with one of the texts in them; of a text that no token holds, the last of its own."""
    breakers = set[int]()
    for text in texts:
        holding = tokenizer.ids_with(text)
        breakers.update(holding or tokenizer.encode(text, add_special=False)[-1:])
    return frozenset(breakers)
