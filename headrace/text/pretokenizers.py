"""How a byte-level BPE cuts text into words before it merges: a table, one entry per kind of tokenizer.

Merges were learned inside words only, so the same merges with other word borders give other tokens, and a model
that was trained on the ones answers worse on the others. A GGUF file names its way of cutting in
`tokenizer.ggml.pre`; the patterns themselves belong to the models' own tokenizers and are listed here.

A cut is a list of steps. Each step isolates what its pattern matches and leaves the rest to the next step.
A name that is not in the table is refused: guessing would give plausible text of lower quality.
"""

# ruff: noqa: RUF001 - the characters that look like others are meant

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers


@dataclass(frozen=True)
class WordCut:
    """The steps of one way of cutting, and what else files that name it imply."""

    steps: tuple[str, ...]
    whole_words_first: bool = False  # a word that is a token is taken as it is, without merging
    add_bos: bool = False  # where the file does not say


EACH_DIGIT = "each digit"
"""The step that isolates every numeric character. Not a pattern: the pattern engine knows fewer digits."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIX}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SUFFIX}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_UPPER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_LOWER_WORD}|{_UPPER_WORD}|\p{{N}}|{_SIGNS_SLASH}|{_SPACES}"
_GPT4O = rf"{_LOWER_WORD}{_SUFFIX}?|{_UPPER_WORD}{_SUFFIX}?|\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_SPACES}"

_CJK = "[一-龥ࠀ-一가-퟿]+"
_CASED = (  # the letters with an upper and a lower case, as DeepSeek's tokenizer lists them
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK3_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_CUT_LLAMA3 = WordCut((_LLAMA3,), whole_words_first=True, add_bos=True)
_CUT_DIGITS = WordCut((EACH_DIGIT, _GPT2))

WORD_CUTS: dict[tuple[str, ...], WordCut] = {
    ("default",): WordCut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum"): WordCut((_GPT2,)),
    ("a.x-4.0", "granite-docling", "modern-bert"): WordCut((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): _CUT_DIGITS,
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): _CUT_LLAMA3,
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): WordCut((_LLAMA3,)),
    ("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan"): WordCut((_QWEN2,)),
    ("solar-open", "grok-2"): WordCut((_QWEN2,)),
    ("qwen35",): WordCut((_QWEN35,)),
    ("tekken",): WordCut((_TEKKEN,), whole_words_first=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): WordCut((_GPT4O,)),
    ("falcon",): WordCut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    ("deepseek-llm",): WordCut(
        (r"[\r\n]", rf"\s?{_CASED}", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, EACH_DIGIT)
    ),
    ("deepseek-coder",): WordCut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, EACH_DIGIT)),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): WordCut((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3_WORD)),
    ("bloom", "poro-chat", "gpt3-finnish"): WordCut((_BLOOM,)),
    ("viking",): WordCut((_BLOOM, r"\p{N}")),
}


@functools.cache
def supported_names() -> tuple[str, ...]:
    """The names `find_word_cut` knows, sorted."""
    return tuple(sorted(name for names in WORD_CUTS for name in names))


def find_word_cut(name: str | None) -> WordCut:
    """The way of cutting that a file calls `name`; files older than the field mean "default"."""
    for names, cut in WORD_CUTS.items():
        if (name or "default") in names:
            return cut
    raise UnsupportedError(
        f"tokenizer.ggml.pre: headrace does not know how {name!r} cuts text into words",
        hint=f"supported: {', '.join(supported_names())}",
    )


def build_pre_tokenizer(cut: WordCut) -> pre_tokenizers.PreTokenizer:
    """The cut as an object of the tokenizers library, which also spells bytes as the vocabulary does."""
    from tokenizers import Regex, pre_tokenizers

    def build_step(step: str) -> Any:
        if step == EACH_DIGIT:
            return pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Split(Regex(step), behavior="isolated")

    spell_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*map(build_step, cut.steps), spell_bytes])
