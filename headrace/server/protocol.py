"""What bodies of requests have in common: strict JSON, known fields only, and how tokens are drawn.

A field is honoured or refused by name. Those of `SamplingParams` are fields of every request that makes text, under
their own names; what OpenAI has and we have not is in a class's `refused`, with the values that ask for nothing.
"""

from __future__ import annotations

import dataclasses
import json
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from headrace.config import SamplingParams
from headrace.server.problems import Problem

MOST_CHOICES = 128
MOST_STOPS = 64
# What requests have in a form of their own.
_OWN_NAMES = {"max_tokens", "temperature", "stop", "n", "best_of", "logprobs", "prompt_logprobs", "logit_bias"}
_OWN_NAMES |= {"json_schema", "json_object"}  # response_format

Refused = dict[str, tuple[str, tuple[Any, ...]]]


class Body(BaseModel):
    """A JSON object whose fields are all known. `refused`: field, why, and the values that change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    refused: ClassVar[Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data.keys() & cls.refused.keys():
            why, neutral = cls.refused[name]
            if data[name] is not None and data[name] not in neutral:
                refusal = InitErrorDetails(type=PydanticCustomError("refused", why), loc=(name,), input=None)  # type: ignore[arg-type]
                raise ValidationError.from_exception_data(cls.__name__, [refusal])
        return {name: value for name, value in data.items() if name not in cls.refused}


def _json_type(hint: Any) -> Any:
    """The type of a field as it is in JSON: tuples are lists."""
    if get_origin(hint) is tuple:
        return list[_json_type(get_args(hint)[0])]  # type: ignore[misc]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_json_type(arg) for arg in get_args(hint))]  # noqa: UP007 - of a tuple
    return hint


def _sampling_fields() -> dict[str, Any]:
    hints = get_type_hints(SamplingParams)
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name not in _OWN_NAMES]
    return {name: (_json_type(hints[name]) | None, None) for name in names}


_Drawn: Any = create_model("_Drawn", __base__=Body, **_sampling_fields())


class Sampling(_Drawn):
    """How tokens are drawn: the fields of SamplingParams, as they are called there."""

    temperature: float | None = Field(None, ge=0, le=100)
    stop: str | list[str] | None = Field(None, max_length=MOST_STOPS)
    logit_bias: dict[str, float] | None = None

    def drawn(self, **given: Any) -> SamplingParams:
        """The parameters, with `given` for fields that an API calls otherwise. The temperature is 1 unless told."""
        fields = set(_Drawn.model_fields) & self.model_fields_set
        values = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        values["temperature"] = 1.0 if self.temperature is None else self.temperature
        values["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        values["logit_bias"] = _biases(self.logit_bias or {})
        return SamplingParams(**values | given)


def _biases(biases: dict[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in biases):
        raise Problem(400, "logit_bias: expected token ids for keys", param="logit_bias", code="invalid_value")
    return {int(token): bias for token, bias in biases.items()}


class StreamOptions(Body):
    """What a stream says besides its text. include_speed: a `headrace` object in the last
    chunk, and in those of chats four times a second."""

    refused: ClassVar[Refused] = {"include_obfuscation": ("chunks are sent as they are", (False,))}

    include_usage: bool = False
    include_speed: bool = False


class StrictRequest(Request):
    """A request whose body is JSON as RFC 8259 has it: no NaN, UTF-8, no more nesting than can be read."""

    async def json(self) -> Any:
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route that reads its body strictly."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            response: Response = await handle(StrictRequest(request.scope, request.receive))
            return response

        return strictly


def parse_json(raw: bytes) -> Any:
    """A JSON text as a client sent it; a Problem where it is none."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from error
    except RecursionError as error:
        raise Problem(400, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise Problem(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
