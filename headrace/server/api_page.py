"""GET /docs: what the server answers, as one page of plain HTML out of the OpenAPI document.

FastAPI's own page loads scripts from other people's servers. This one needs no script, and nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; }
h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid #8884; }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_api_page(app: FastAPI) -> None:
    """Adds the page at /docs."""

    def show(request: Request) -> HTMLResponse:
        return HTMLResponse(page_of(app.openapi()), headers=_HEADERS)

    app.add_api_route("/docs", show, include_in_schema=False)


def page_of(document: dict[str, Any]) -> str:
    """The page of an OpenAPI document."""
    schemas = document.get("components", {}).get("schemas", {})
    routes = [
        (method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    listed = "".join(
        f'<li><a href="#{_anchor(method, path)}"><code>{method.upper()} {escape(path)}</code></a></li>'
        for method, path, _ in routes
    )
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
            f'<h1>{title}</h1><p>The same for programs: <a href="/openapi.json">/openapi.json</a>.</p>',
            f"<ul>{listed}</ul>",
            *(_section(method, path, operation, schemas) for method, path, operation in routes),
            "</body></html>",
        ]
    )


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    head = f'<h2 id="{_anchor(method, path)}"><code>{method.upper()} {escape(path)}</code></h2>'
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    schema = schemas.get(_name_of(body), body)
    return f"{head}<p>{escape(operation.get('description', ''))}</p>{''.join(_table(schema))}"


def _table(schema: dict[str, Any]) -> Iterator[str]:
    if not schema.get("properties"):
        return
    yield f"<p>{escape(schema.get('description', ''))}</p>"
    yield "<table><thead><tr><th>Field</th><th>Type</th><th>Needed</th></tr></thead><tbody>"
    for name, field in schema["properties"].items():
        needed = "yes" if name in schema.get("required", ()) else ""
        yield f"<tr><td><code>{escape(name)}</code></td><td>{escape(type_of(field))}</td><td>{needed}</td></tr>"
    yield "</tbody></table>"


def type_of(field: dict[str, Any]) -> str:
    """The type of a field, in words."""
    for together in ("anyOf", "oneOf"):
        if together in field:
            kinds = [type_of(each) for each in field[together] if each.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "$ref" in field:
        return _name_of(field)
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {type_of(field.get('items', {}))}"
    return str(field.get("type", "any"))


def _name_of(schema: dict[str, Any]) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _anchor(method: str, path: str) -> str:
    return escape(f"{method}{path}".replace("/", "-").replace("{", "").replace("}", "").replace(":", "-"))
