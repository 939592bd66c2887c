"""The tables of docs/server.md, out of the code: endpoints, fields that are taken and refused, options, limits.

python -m headrace.check.server_docs           prints them
python -m headrace.check.server_docs --write   puts them into docs/server.md

A test compares the two.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.check.layout import ROOT

if TYPE_CHECKING:
    from headrace.server.protocol import Body

PAGE = ROOT / "docs" / "server.md"


def sections() -> dict[str, str]:
    """The generated parts of the page, by the names of their marks."""
    return {
        "endpoints": "\n".join(_endpoints()),
        "fields": "\n".join(_fields()),
        "options": "\n".join(_options()),
        "errors": "\n".join(_errors()),
    }


def filled(page: str) -> str:
    """The page with its generated parts as they should be."""
    for name, text in sections().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"docs/server.md has no marks for {name}"
        page = f"{before}{begin}{text}\n{end}{after}"
    return page


def _endpoints() -> Iterator[str]:
    from headrace.server.app import create_app

    document = create_app(["model"], lambda source: None).openapi()  # type: ignore[arg-type, return-value]
    yield "| | |"
    yield "|---|---|"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"| `{method.upper()} {path}` | {' '.join(operation['description'].split())} |"
    yield "| `GET /` | The chat page. |"
    yield "| `GET /docs`, `/openapi.json` | All endpoints and fields, for people and for programs. |"


def _bodies() -> dict[str, type[Body]]:
    from headrace.server import chat, completions, embeddings, messages, responses, status

    return {
        "/v1/chat/completions": chat.ChatRequest,
        "/v1/completions": completions.CompletionRequest,
        "/v1/responses": responses.ResponseRequest,
        "/v1/embeddings": embeddings.EmbeddingRequest,
        "/v1/messages": messages.MessagesRequest,
        "/v1/messages/count_tokens": messages.CountRequest,
        "/tokenize": status.TokenizeRequest,
        "/detokenize": status.DetokenizeRequest,
        "/apply-template": status.TemplateRequest,
    }


def _fields() -> Iterator[str]:
    from headrace.server.protocol import Sampling

    drawn = Sampling.model_fields.keys()
    yield f"*Sampling fields* are {_names(sorted(drawn))}."
    for path, body in _bodies().items():
        own = [name for name in body.model_fields if name not in drawn]
        also = ", and the sampling fields" if drawn <= body.model_fields.keys() else ""
        yield f"\n**`POST {path}`** takes {_names(own)}{also}."
        if body.refused:
            yield "\n| refused | why | taken where it asks for nothing |"
            yield "|---|---|---|"
            for name, (why, neutral) in sorted(body.refused.items()):
                yield f"| `{name}` | {why} | {', '.join(f'`{json.dumps(each)}`' for each in neutral)} |"


def _options() -> Iterator[str]:
    from headrace.options import HELP, LoadOptions
    from headrace.server.settings import ServeOptions

    yield "| option | by default | |"
    yield "|---|---|---|"
    yield "| `-m`, `--model` | `smollm2` | A model; may be given several times, also as NAME=... |"
    for group in (ServeOptions, LoadOptions):
        for field in dataclasses.fields(group):
            default = "" if field.default in (None, (), False) else f"`{field.default}`"
            yield f"| `--{field.name.replace('_', '-')}` | {default} | {HELP[field.name]} |"


def _errors() -> Iterator[str]:
    """Status and code of every error there is, from the source."""
    found: dict[tuple[str, str], None] = {}
    for path in sorted((ROOT / "headrace" / "server").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"Problem\(\s*(\d{3}),.{0,300}?code=\"([a-z_]+)\"", text, re.DOTALL):
            found[(match[1], match[2])] = None
    found[("400", "unsupported_parameter")] = found[("400", "unknown_parameter")] = None
    by_status: dict[str, list[str]] = {}
    for status, code in sorted(found):
        by_status.setdefault(status, []).append(code)
    yield "| status | `code` |"
    yield "|---|---|"
    for status, codes in by_status.items():
        yield f"| {status} | {_names(sorted(set(codes)))} |"


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(sections().values()))


if __name__ == "__main__":
    main(sys.argv[1:])
