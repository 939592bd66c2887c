"""Errors as clients of the OpenAI and Anthropic APIs expect them: every status, one JSON shape each.

A Problem is a client's mistake or the server's state; HeadraceErrors become Problems in one place, `problem_of`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from headrace.errors import (
    ArgumentError,
    CapacityError,
    HeadraceError,
    NotFiniteError,
    PromptTooLongError,
    SourceError,
    TemplateError,
    UnsupportedError,
)

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_TYPES = ("str", "int", "float", "bool", "dict")
_NOT_JSON_BODY = "expected a JSON object with Content-Type: application/json"
_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
    "refused": "unsupported_parameter",
    **dict.fromkeys(
        (
            "literal_error",
            "value_error",
            "greater_than_equal",
            "less_than_equal",
            "too_short",
            "too_long",
            "string_pattern_mismatch",
        ),
        "invalid_value",
    ),
}


class Problem(HTTPException):
    """Ends a request with this status and error. param: the field at fault. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status_code == 401:
            return "authentication_error"
        if self.status_code == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status_code < 500 else "server_error"


def unsupported(param: str, why: str) -> Problem:
    """The refusal of a field that means something this server cannot do."""
    return Problem(400, f"{param}: not supported: {why}", param=param, code="unsupported_parameter")


def problem_of(error: BaseException) -> Problem:
    """The Problem that an error of headrace is to a client; anything else is an internal error without details."""
    if isinstance(error, Problem):
        return error
    if not isinstance(error, HeadraceError):
        return Problem(500, "internal error", code="internal_error")
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    if isinstance(error, (PromptTooLongError, CapacityError)):
        return Problem(400, message, param=_param(error.message), code="context_length_exceeded")
    if isinstance(error, (ArgumentError, TemplateError, UnsupportedError)):
        return Problem(400, message, param=_param(error.message), code="invalid_value")
    if isinstance(error, NotFiniteError):
        return Problem(500, message, code="not_finite")
    if isinstance(error, SourceError):
        return Problem(503, message, code="model_unavailable")
    return Problem(503, message, code="unavailable", headers={"Retry-After": "1"})


def renamed(problem: Problem, names: Mapping[str, str]) -> Problem:
    """The same problem, of the field that a client knows. names: theirs by ours."""
    theirs = names.get(problem.param or "")
    if theirs is not None:
        problem.message = f"{theirs}: {problem.message.removeprefix(f'{problem.param}: ')}"
        problem.param = theirs
    return problem


def _param(message: str) -> str | None:
    match = re.match(r"([a-z_]+(?:\[\d+\])?): ", message)
    return match[1] if match else None


def validation_problem(errors: list[Any]) -> Problem:
    """What is wrong with a body, by name: of several things the deepest, where an alternative was right so far."""
    first = max(errors, key=lambda error: len(error["loc"]))
    param = _path(first["loc"][1:])
    kind = str(first["type"])
    if kind == "json_invalid":
        message, param = f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    elif kind == "extra_forbidden":
        message = f"{param}: unknown field"
    elif param is None:
        message = _NOT_JSON_BODY
    elif kind == "refused":
        message = f"{param}: not supported: {first['msg']}"
    else:
        message = f"{param}: {_expected(errors, param)}"
    return Problem(400, message, param=param, code=_CODES.get(kind, "invalid_type"))


def _expected(errors: list[Any], param: str) -> str:
    """What each of the alternatives of a field would have been."""
    told = [each["msg"].removeprefix("Value error, ") for each in errors if _path(each["loc"][1:]) == param]
    first, *others = dict.fromkeys(told)
    return " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])


def _path(parts: Sequence[Any]) -> str | None:
    """messages[0].content, of what pydantic says; the names of alternatives that were tried are left out."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[a-z_][A-Za-z0-9_]*", part) and part not in _TYPES:
            path += f".{part}" if path else part
    return path or None


def body_of(problem: Problem, anthropic: bool = False) -> dict[str, Any]:
    """The JSON of an error."""
    if anthropic:
        kind = _ANTHROPIC_TYPES.get(problem.status_code)
        kind = kind or ("invalid_request_error" if problem.status_code < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": problem.message}}
    error = {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}
    return {"error": error}


def response_of(problem: Problem, path: str) -> Response:
    """The response to a request for `path`."""
    content = json.dumps(body_of(problem, path.startswith("/v1/messages")))
    return Response(content, problem.status_code, headers=problem.headers, media_type="application/json")


async def on_error(request: Request, error: Exception) -> Response:
    """FastAPI's exception handler for all of them."""
    if isinstance(error, RequestValidationError):
        error = validation_problem(list(error.errors()))
    elif isinstance(error, HTTPException) and not isinstance(error, Problem):
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{error.detail}: {request.method} {request.url.path}"
        error = Problem(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)
    return response_of(problem_of(error), request.url.path)
