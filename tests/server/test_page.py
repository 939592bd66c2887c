"""The chat page as it is served: known files, a policy under which nothing foreign runs, nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from headrace.server.page_files import FOLDER, MEDIA_TYPES

FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
# What would make text into HTML or code.
SINKS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|setHTML"
    r"|\beval\b|new Function|import\(|javascript:|setTimeout\(\s*[\"'`]|\.on[a-z]+ ="
)
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def test_there_is_a_page_of_small_files() -> None:
    assert len(SCRIPTS) > 10
    for path in FILES:
        assert path.suffix in MEDIA_TYPES, f"{path.name} would not be served"
        assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_served_as_it_is(client: TestClient, path: Path) -> None:
    response = client.get(f"/page/{path.name}")
    assert response.status_code == 200 and response.content == path.read_bytes()
    assert response.headers["content-type"].partition(";")[0] == MEDIA_TYPES[path.suffix]
    check_headers(response.headers)


def test_the_page_is_at_the_root(client: TestClient) -> None:
    response = client.get("/")
    assert response.content == (FOLDER / "index.html").read_bytes()
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    check_headers(response.headers)
    head = client.head("/")
    assert head.status_code == 200 and head.content == b""
    assert client.post("/").status_code == 405


def check_headers(headers: Any) -> None:
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-cache"


def test_a_browser_that_has_a_file_is_not_sent_it_again(client: TestClient) -> None:
    tags = {client.get(f"/page/{path.name}").headers["etag"] for path in FILES}
    assert len(tags) == len(FILES)
    tag = client.get("/").headers["etag"]
    again = client.get("/", headers={"If-None-Match": f'W/"x", {tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    check_headers(again.headers)
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["../app.py", "..%2fapp.py", "%2e%2e/app.py", ".", "", "page.py", "index.html%00", "/etc/passwd", "x" * 999],
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_the_page_needs_no_key_and_the_rest_does(open_client: Any) -> None:
    client = open_client(api_keys=("secret",))
    assert client.get("/").status_code == 200
    assert all(client.get(f"/page/{path.name}").status_code == 200 for path in FILES)
    assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_place(path: Path) -> None:
    text = path.read_text().replace(SVG_NAMESPACE, "")
    assert re.findall(r"(?:https?:|wss?:|[\"'(])//[^\s/*]", text) == []
    assert "@import" not in text and "url(" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_text_into_html_or_code(path: Path) -> None:
    assert SINKS.findall(path.read_text()) == []


@pytest.mark.parametrize("bad", ["x.innerHTML = y", "eval(x)", "setTimeout('x', 1)", "a.onclick = b", "import(x)"])
def test_the_watch_for_sinks_sees_them(bad: str) -> None:
    assert SINKS.search(bad)


class Outline(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def test_the_page_has_landmarks_labels_and_only_its_own_scripts() -> None:
    tags = Outline((FOLDER / "index.html").read_text()).tags
    names = [tag for tag, _ in tags]
    for landmark in ("header", "main", "footer", "nav", "aside", "h1"):
        assert names.count(landmark) == 1, landmark
    assert dict(tags)["html"]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    for tag, attributes in tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        refers = [attributes.get(name) for name in ("aria-labelledby", "aria-describedby", "aria-controls", "for")]
        assert {each for each in refers if each} <= set(ids)
        if tag in ("input", "textarea", "select"):
            assert attributes["id"] in labelled or attributes.get("type") == "checkbox"
        if tag in ("script", "link"):
            address = attributes.get("src") or attributes.get("href") or ""
            assert (FOLDER / address.removeprefix("page/")).is_file(), "relative: the page may live below another path"


def test_scripts_import_what_is_there() -> None:
    for path in SCRIPTS:
        for name in re.findall(r'from "\./([^"]+)"', path.read_text()):
            assert (FOLDER / name).is_file(), f"{path.name} imports {name}"
