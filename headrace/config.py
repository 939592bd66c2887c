"""What a model is, how the engine runs, how tokens are drawn: frozen data, units in the names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any

from headrace.errors import ArgumentError

PACKED = ("auto", "never", "require")  # whether weights kept packed on disk are used
KV_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "int4")  # what pages may hold
STRUCTURES = ("json_schema", "json_object", "regex", "grammar", "choice")
MOST_BIAS = 100.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `interleaved`: pairs (0,1), (2,3)...; otherwise (i, i + rotary_dim/2)."""

    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = True
    scaling: str = "none"  # none, linear, llama3 (factors come with the weights), yarn
    factor: float = 1.0
    original_context_len: int = 0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder. Widths in elements, lengths in tokens."""

    architecture: str
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_len: int
    norm_eps: float
    rope: RopeConfig
    value_head_dim: int = 0
    sliding_window: int | None = None  # keys each query sees, its own included
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    name: str = ""


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. None: decided from the machine and the model.

    kv_dtype: one of KV_DTYPES. int8 and int4 are codes with a scale per token and head (`ops/kv_formats.py`).
    packed: one of PACKED, for weights that `headrace pack` has kept on disk (`weights/packed.py`).
    batch_invariant: answers are the same bit for bit alone and in any company, however prompts are cut and cached.
    """

    threads: int | None = None
    context_len: int | None = None
    page_size: int = 64
    kv_dtype: str = "float16"
    chunk_len: int = 512  # tokens of a prompt computed in one step
    max_requests: int = 16  # in one step
    kv_cache_bytes: int | None = None  # None: a context for each request, but at most half of the machine's memory
    packed: str = "auto"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        _positive(self, "threads", "context_len", "page_size", "chunk_len", "max_requests", "kv_cache_bytes")
        _among(self, "kv_dtype", KV_DTYPES, "names in full, as NumPy's")
        _among(self, "packed", PACKED)
        _flag(self, "batch_invariant")

    @property
    def required(self) -> tuple[str, ...]:
        """What every kernel of a step must have, as `ops/select.py` names it."""
        return ("batch_invariant",) if self.batch_invariant else ()


@dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn. temperature 0 is greedy; a filter at its default does nothing. One seed, one text.

    Order: logit_bias; DRY; what is banned (min_tokens, bad_words, structure); repetition, presence and frequency
    penalties; temperature; top_k; top_p; min_p; typical_p. `repetition_penalty` and DRY look at prompt and answer, the
    other two penalties at the answer alone. logit_bias is stored as pairs of token id and bias, min_tokens holds back
    what ends an answer by id. bad_words are banned in the tokens that the tokenizer itself would write them with.
    n answers, the likeliest of best_of that are drawn. The first draws with `seed`, the others with seeds derived from
    it and their number. logprobs, prompt_logprobs: how many of the likeliest tokens are told beside each token's own;
    of the model's distribution, before all of the above. At most one of json_schema (text or a mapping), json_object,
    regex, grammar (Lark) and choice: the answer then has this form, unless max_tokens cuts it short.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_len: int = 2
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    speculate: int = 0  # tokens guessed from earlier text and verified in one step; the answer stays the same
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "dry_breakers", "choice"):
            object.__setattr__(self, name, _texts(self, name))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        for name, least in (
            ("max_tokens", 1),
            ("top_k", 0),
            ("min_tokens", 0),
            ("dry_allowed_len", 1),
            ("n", 1),
            ("speculate", 0),
        ):
            _whole(self, name, least)
        for name in ("seed", "best_of", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(self, name, 0)
        for name in ("top_p", "min_p", "typical_p"):
            _within(self, name, 0.0, 1.0)
        for name, low in (("temperature", 0.0), ("repetition_penalty", 1e-3), ("dry_multiplier", 0), ("dry_base", 1)):
            _within(self, name, low, math.inf)
        for name in ("presence_penalty", "frequency_penalty"):
            _within(self, name, -math.inf, math.inf)
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0.0:
                raise ArgumentError(f"{name}: expected more than 0 and at most 1, got 0.0", "temperature=0 for greedy")
        for name in ("ignore_eos", "json_object"):
            _flag(self, name)
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), (str, NoneType)):
                raise ArgumentError(f"{name}: expected text, got {getattr(self, name)!r:.80}")

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise ArgumentError(f"best_of: expected at least n = {self.n}, got {self.best_of}")
        if self.min_tokens > self.max_tokens:
            raise ArgumentError(f"min_tokens: expected at most max_tokens = {self.max_tokens}, got {self.min_tokens}")
        if self.structure and self.ignore_eos:
            raise ArgumentError(f"ignore_eos: expected False with {self.structure[0]}, whose end is the answer's")
        if len(self.structure) > 1:
            expected = f"one of {', '.join(STRUCTURES[:-1])} and {STRUCTURES[-1]}"
            raise ArgumentError(f"{self.structure[1]}: expected {expected}, got {' and '.join(self.structure)}")

    @property
    def structure(self) -> list[str]:
        """Which of the fields is set that give the answer a form: one or none."""
        return [name for name in STRUCTURES if getattr(self, name) not in (None, False, ())]


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            _whole(config, name, 1)


def _flag(config: Any, name: str) -> None:
    if not isinstance(getattr(config, name), bool):
        raise ArgumentError(f"{name}: expected True or False, got {getattr(config, name)!r}")


def _among(config: Any, name: str, allowed: tuple[str, ...], hint: str | None = None) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ArgumentError(f"{name}: expected {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}", hint)


def _whole(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value >= 2**63:
        raise ArgumentError(f"{name}: expected a whole number >= {least}, got {value!r}")


def _within(config: Any, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        limits = f"between {low:g} and {high:g}" if math.isfinite(high) else f">= {low:g}"
        raise ArgumentError(f"{name}: expected a finite number {limits}, got {value!r}")


def _texts(config: Any, name: str) -> tuple[str, ...]:
    texts = getattr(config, name)
    if isinstance(texts, str):
        raise ArgumentError(f"{name}: expected a tuple of strings, got the string {texts!r}", f"({texts!r},)")
    if not isinstance(texts, (tuple, list)) or not all(isinstance(text, str) and text for text in texts):
        raise ArgumentError(f"{name}: expected strings of at least one character, got {texts!r:.80}")
    return tuple(texts)


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, (tuple, list, set, frozenset)) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ArgumentError(f"stop_token_ids: expected token ids, got {ids!r:.80}")
    return tuple(sorted(set(ids)))


def _biases(biases: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = sorted(dict(biases).items())
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"logit_bias: expected a mapping from token ids to biases, got {biases!r:.80}") from error
    for token, bias in pairs:
        if type(token) is not int or not 0 <= token < 2**31:
            raise ArgumentError(f"logit_bias: expected token ids, got {token!r}")
        if type(bias) not in (int, float) or not -MOST_BIAS <= bias <= MOST_BIAS:
            raise ArgumentError(
                f"logit_bias: expected biases between {-MOST_BIAS:g} and {MOST_BIAS:g}, got {bias!r} for token {token}",
                f"{-MOST_BIAS:g} as good as bans a token",
            )
    return tuple((token, float(bias)) for token, bias in pairs)


def _schema_text(schema: Any) -> str | None:
    """A JSON schema as text; whether it is one is for the parser of schemas to say."""
    if schema is None or isinstance(schema, str):
        return schema
    try:
        if not isinstance(schema, Mapping):
            raise TypeError("not a mapping")
        return json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"json_schema: expected JSON as text or a mapping: {error}") from error


def field_names(config_class: type) -> tuple[str, ...]:
    """The fields of one of these classes, in order: command lines and servers are built from them."""
    return tuple(item.name for item in fields(config_class))
