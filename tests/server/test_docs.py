"""What is written about the server is so: its page of documentation, and the one it serves at /docs."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from starlette.testclient import TestClient

from headrace.check import server_docs
from headrace.server.api_page import page_of, type_of


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    page = server_docs.PAGE.read_text(encoding="utf-8")
    assert page == server_docs.filled(page), "python -m headrace.check.server_docs --write"
    for name, text in server_docs.sections().items():
        assert len(text.splitlines()) > 5, name


def test_every_metric_that_is_named_there_is_there(client: TestClient) -> None:
    names = re.findall(r"`(vllm:\w+)`", server_docs.PAGE.read_text(encoding="utf-8"))
    told = client.get("/metrics").text
    assert len(names) > 5 and all(f"# HELP {name.removesuffix('_total')}" in told for name in names)


class Links(HTMLParser):
    """Everything a page points to, and the tags it has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "action")]
        self.ids |= {value or "" for name, value in attributes if name == "id"}


def test_the_page_at_docs_needs_nobody_else(client: TestClient) -> None:
    response = client.get("/docs")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    links = Links()
    links.feed(response.text)
    assert not links.tags & {"script", "link", "img", "iframe", "form"}
    assert all(link == "/openapi.json" or link.removeprefix("#") in links.ids for link in links.found)
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in response.text
    assert client.get("/redoc").status_code == 404


def test_what_a_document_says_is_shown_as_text() -> None:
    hostile = "<script>alert(1)</script>"
    properties = {"a<b": {"type": "array", "items": {"anyOf": [{"const": "<i>"}, {"type": "null"}]}}}
    schema = {"schema": {"properties": properties, "description": hostile}}
    operation = {"description": hostile, "requestBody": {"content": {"application/json": schema}}}
    document = {"info": {"title": hostile, "version": "1"}, "paths": {"/" + hostile: {"post": operation}}}
    assert "<script" not in page_of(document) and "<i>" not in page_of(document)
    assert type_of(properties["a<b"]) == "list of <i>"


def test_docs_need_no_key(open_client: object) -> None:
    client = open_client(api_keys=("k",))  # type: ignore[operator]
    assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/metrics")] == [200, 200, 401]
