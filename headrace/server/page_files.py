"""The chat page's files, with headers under which nothing runs that is not one of them.

The page is static and built from nothing: what lies in `page/` is what browsers get. The policy lets it load its own
scripts and styles and talk to its own server, and lets no text become HTML, whoever wrote it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from headrace.server.problems import Problem

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # to be asked for each time: a file that is unchanged answers 304
}


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent. tag: changes with its content."""

    content: bytes
    media_type: str
    tag: str

    @classmethod
    def read(cls, path: Path) -> PageFile:
        content = path.read_bytes()
        return cls(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:20]}"')

    def response(self, request: Request) -> Response:
        """The file, or that the browser has it."""
        headers = HEADERS | {"ETag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def page_router(folder: Path = FOLDER) -> APIRouter:
    """The page at /, and its parts below /page/. Files are known by name from the start: no other path is looked at."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: PageFile.read(path) for path in sorted(folder.iterdir()) if path.suffix in MEDIA_TYPES}

    @router.api_route("/", methods=["GET", "HEAD"])
    def index(request: Request) -> Response:
        return files["index.html"].response(request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    def part(name: str, request: Request) -> Response:
        if name not in files:
            raise Problem(404, f"the chat page has no part {name[:60]!r}", code="not_found")
        return files[name].response(request)

    return router
