"""Command-line options out of dataclasses: a field is an option, its type and default included.

`with_options(verb)` gives a verb that takes a SamplingParams (or another dataclass) the fields of that class as
options, and calls it with the dataclass built from them. A field without a help text here is an option all the same.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from headrace.config import EngineConfig
from headrace.errors import ArgumentError

HELP = {
    "max_tokens": "Tokens to answer with, at most.",
    "temperature": "0 always takes the likeliest token; higher is more varied.",
    "top_k": "Draw from the k likeliest tokens; 0: from all.",
    "top_p": "Draw from the likeliest tokens that together have this probability.",
    "min_p": "Leave out tokens less likely than this times the likeliest.",
    "typical_p": "Draw from the tokens nearest to the expected surprise that together have this probability.",
    "repetition_penalty": "Divides the odds of tokens that already occurred.",
    "presence_penalty": "Subtracted once from tokens already in the answer.",
    "frequency_penalty": "Subtracted for each time a token is in the answer.",
    "dry_multiplier": "Subtracted from tokens that would repeat a passage; 0: no DRY penalty.",
    "dry_base": "The DRY penalty grows by this for each token the passage is longer.",
    "dry_allowed_len": "Repeated passages up to this many tokens cost nothing.",
    "dry_breakers": "Text at which a repeated passage begins anew; may be given several times.",
    "seed": "One seed, one text.",
    "min_tokens": "Tokens to answer with, at least.",
    "ignore_eos": "Go on after the end of the answer.",
    "stop": "End before this text; may be given several times.",
    "stop_token_ids": "End with this token; may be given several times.",
    "bad_words": "Never write this; may be given several times.",
    "json_schema": "Answer in JSON of this schema.",
    "json_object": "Answer with a JSON object.",
    "regex": "Answer with text of this regular expression.",
    "grammar": "Answer with text of this Lark grammar.",
    "choice": "Answer with one of these; given several times.",
    "threads": "Threads to compute with; all usable cores when not given.",
    "context_len": "Tokens to keep room for; the model's own when not given.",
    "kv_dtype": "What the cache of keys and values holds: float32, float16, bfloat16, float8_e4m3fn, int8 or int4.",
    "chunk_len": "Tokens of a prompt computed in one step.",
    "packed": "Weights kept by `headrace pack`: auto uses them where there, never, require.",
    "batch_invariant": "The same answer bit for bit, alone and among any others; slower where that costs something.",
    "draft_model": "A smaller model with the same tokens, which guesses for answers that ask to speculate.",
    "host": "Address to listen on.",
    "port": "Port to listen on.",
    "unix_socket": "Listen on this socket in place of an address.",
    "api_key": "A key that clients must give; also seen in the list of processes.",
    "api_key_file": "A file with such keys, one a line.",
    "max_concurrency": "Requests that are computed at once.",
    "max_queue": "Requests that may wait; others get 429.",
    "stream_interval": "Tokens per event of a stream, after the first: more take less of the CPU.",
    "kv_cache_memory": "What all requests share, such as 4GiB; by default their contexts, at most half of the memory.",
    "cors_origin": "A site whose pages may ask, or *; may be given several times.",
    "tls_cert": "Certificate chain, PEM.",
    "tls_key": "Its private key, PEM.",
    "drain_timeout": "Seconds that what runs may take after SIGTERM.",
    "idle_unload": "Seconds without requests after which a model is unloaded; 0: never.",
    "header_timeout": "Seconds that the headers of a request may take to arrive; 0: any.",
    "body_timeout": "Seconds that its body may take to arrive; 0: any.",
    "max_body": "The largest request, such as 4MiB.",
    "log_prompts": "Write prompts into the log.",
    "url": "Measure the server at this address, http://host:port; without it `headrace serve` is started.",
    "rate": "Requests per second, at random; without it clients send the next request when they have the last answer.",
    "concurrency": "Clients, and requests that a server started here computes at once.",
    "requests": "Requests to send.",
    "prompt_len": "Tokens of a prompt, as far as common words are one each.",
    "answer_len": "Tokens of an answer.",
    "lengths": "How both are spread: fixed, uniform from 1 to twice as many, or lognormal.",
    "chat": "Ask /v1/chat/completions in place of /v1/completions.",
    "plain": "Send no field that OpenAI does not have: answers may then end early.",
    "timeout": "Seconds after which an answer counts as failed.",
    "slo_ttft_ms": "Good requests have their first token within so many milliseconds,",
    "slo_tpot_ms": "and then one every so many.",
    "peer": "Measure beside the server, in turns: engine, async, llama.cpp; a list with commas.",
    "repeat": "Turns of each, with --peer.",
    "llama_lib": "A folder with another build of libllama.so.",
    "plot": "An .svg, .png or .pdf file to draw latencies and rates to.",
    "tokens": "linear, rms_norm: rows of activations.",
    "dim": "linear, rms_norm: elements of a row.",
    "rows": "linear: rows of the weight.",
    "weight": "linear: format of the weight.",
    "batch": "Attention: requests, all alike.",
    "query_len": "Attention: queries of each request.",
    "kv_len": "Attention: keys of each request, the new ones included.",
    "query_heads": "Attention: heads of the query.",
    "kv_heads": "Attention: heads of keys and values.",
    "head_dim": "Attention: elements of a head; mla_attention: latent and rotated ones together.",
    "value_dim": "Attention: elements of a value; as head_dim when 0, for mla_attention 64 fewer.",
    "page_size": "paged_attention, mla_attention: tokens of a page.",
    "dtype": "Attention: fp32, fp16, bf16 or fp64 (or float32, ...).",
    "full": "attention: every query sees every key, in place of those up to its own.",
    "window_left": "Attention: keys seen before a query's own; -1: all.",
    "precision": "auto, exact or fast.",
    "deterministic": "Attention: bits that depend on neither neighbours, chunking nor threads.",
    "device": "Where the arrays are: cpu, cuda or hip; a GPU need not be here.",
    "arch": "Of a GPU, its generation: sm_80, sm_90, gfx942; by default that of this machine's, or the usual one.",
    "require": "A property the kernel must have; may be given several times.",
}

# Fields of SamplingParams that ask for more than one text, which is all that a command shows.
LEFT_OUT = frozenset({"logit_bias", "n", "best_of", "logprobs", "prompt_logprobs"})


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, as far as the command line goes; `headrace.LLM` checks the values."""

    threads: int | None = None
    context_len: int | None = None
    kv_dtype: str = EngineConfig.kv_dtype
    packed: str = EngineConfig.packed
    batch_invariant: bool = EngineConfig.batch_invariant
    draft_model: str | None = None


@dataclasses.dataclass(frozen=True)
class ExplainOptions:
    """What `headrace explain` asks about; `headrace.explained` checks the values."""

    tokens: int = 1
    dim: int = 576
    rows: int = 576
    weight: str = "Q4_1"
    batch: int = 1
    query_len: int = 1
    kv_len: int = 4096
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    value_dim: int = 0
    page_size: int = 16
    dtype: str = "bf16"
    kv_dtype: str = ""
    full: bool = False
    window_left: int = -1
    precision: str = "auto"
    deterministic: bool = False
    device: str = "cpu"
    arch: str = ""
    require: tuple[str, ...] = ()


def with_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`verb` as typer wants it: every parameter that is a dataclass replaced by its fields."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        given = _field_options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]
        parameters += [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in given]

    def called(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in _shown_fields(group)})
        return verb(**values)

    called.__name__, called.__doc__ = verb.__name__, verb.__doc__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called


def _field_options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group)
    return [_option(field, hints[field.name]) for field in _shown_fields(group)]


def _shown_fields(group: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(group) if field.name not in LEFT_OUT]


def _option(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    flag = "--" + field.name.replace("_", "-")
    default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if get_origin(hint) is tuple:
        hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
    elif str in get_args(hint):  # text, whatever else the field takes from Python
        hint = str | None
    annotation = Annotated[hint, typer.Option(flag, help=HELP.get(field.name, ""))]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_NAMES_SHOWN = 24  # in an error that lists what there is

Model = Annotated[str, typer.Option("-m", "--model", help="A known name, a file, hf:... or pypi:...")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Threads = Annotated[int | None, typer.Option(help=HELP["threads"])]
KVDtype = Annotated[str, typer.Option("--kv-dtype", help=HELP["kv_dtype"])]


def numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    """The whole numbers of a list with commas, which is what `option` was given."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(
            f"{option}: expected whole numbers with commas, got {text!r}", f"{option} {example}"
        ) from None


def words(text: str) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def begun_with(option: str, asked: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that begin with one of those that `option` was given; all when it was not. ArgumentError for one that
    fits nothing."""
    for beginning in asked:
        if not any(name.startswith(beginning) for name in names):
            few = [*names[:_NAMES_SHOWN], "..."] if len(names) > _NAMES_SHOWN else names
            raise ArgumentError(f"{option}: expected some of {', '.join(few)}, got {beginning!r}")
    return {name for name in names if not asked or name.startswith(tuple(asked))}
