"""Command-line options out of dataclasses: a field is an option, its type and default included.

`with_options(verb)` gives a verb that takes a SamplingParams (or another dataclass) the fields of that class as
options, and calls it with the dataclass built from them. A field without a help text here is an option all the same.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

HELP = {
    "max_tokens": "Tokens to answer with, at most.",
    "temperature": "0 always takes the likeliest token; higher is more varied.",
    "top_k": "Draw from the k likeliest tokens; 0: from all.",
    "top_p": "Draw from the likeliest tokens that together have this probability.",
    "min_p": "Leave out tokens less likely than this times the likeliest.",
    "repetition_penalty": "Divides the odds of tokens that already occurred.",
    "presence_penalty": "Subtracted once from tokens already in the answer.",
    "frequency_penalty": "Subtracted for each time a token is in the answer.",
    "seed": "One seed, one text.",
    "ignore_eos": "Go on after the end of the answer.",
    "stop": "End before this text; may be given several times.",
    "threads": "Threads to compute with; all usable cores when not given.",
    "context_len": "Tokens to keep room for; the model's own when not given.",
    "kv_dtype": "What the cache of keys and values holds: float16, bfloat16 or float32.",
    "chunk_len": "Tokens of a prompt computed in one step.",
}


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, as far as the command line goes; `headrace.LLM` checks the values."""

    threads: int | None = None
    context_len: int | None = None


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
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        return verb(**values)

    called.__name__, called.__doc__ = verb.__name__, verb.__doc__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called


def _field_options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group)
    return [_option(field, hints[field.name]) for field in dataclasses.fields(group)]


def _option(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    flag = "--" + field.name.replace("_", "-")
    default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if get_origin(hint) is tuple:
        hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
    annotation = Annotated[hint, typer.Option(flag, help=HELP.get(field.name, ""))]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
