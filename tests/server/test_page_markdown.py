"""Markdown on the chat page, in a real browser: what it becomes, piece by piece as at once, and that it stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest

SHOW = """
(async (text, size) => {
  const { Markdown } = await import("/page/markdown.js");
  const root = document.createElement("div");
  const markdown = new Markdown(root);
  for (let i = 0; i < text.length; i += size) markdown.append(text.slice(i, i + size));
  markdown.finish();
  return root.outerHTML.slice(5, -6);
})(%s, %d)
"""
TIMED = """
(async (unit, count, size) => {
  const { Markdown } = await import("/page/markdown.js");
  const root = document.createElement("div");
  const markdown = new Markdown(root);
  const text = unit.repeat(count);
  const began = performance.now();
  for (let i = 0; i < text.length; i += size) markdown.append(text.slice(i, i + size));
  markdown.finish();
  return [performance.now() - began, root.textContent.length];
})(%s, %d, %d)
"""
LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer nofollow">{1}</a>'
BECOMES = {
    "plain": "<p>plain</p>",
    "two\nlines": "<p>two<br>lines</p>",
    "two\r\nlines": "<p>two<br>lines</p>",
    "one\n\ntwo": "<p>one</p><p>two</p>",
    "*em* **strong** ***both*** ~~gone~~": (
        "<p><em>em</em> <strong>strong</strong> <em><strong>both</strong></em> <del>gone</del></p>"
    ),
    "snake_case_name 2*3*4": "<p>snake_case_name 2<em>3</em>4</p>",
    "open *star and **stars": "<p>open *star and **stars</p>",
    "a `code *x* <b>` b": "<p>a <code>code *x* &lt;b&gt;</code> b</p>",
    "``a ` b`` and ` alone": "<p><code>a ` b</code> and ` alone</p>",
    r"\*not\* \\ \<b>": "<p>*not* \\ &lt;b&gt;</p>",
    "&lt;b&gt; &amp; &unknown;": "<p>&lt;b&gt; &amp; &amp;unknown;</p>",
    "# One\n###### Six ##": "<h3>One</h3><h6>Six</h6>",
    "#hash": "<p>#hash</p>",
    "---": "<hr>",
    "- a\n- b\n  - c\n- d": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li><li><p>d</p></li></ul>",
    "1. a\n2. b\n\n   more": "<ol><li><p>a</p></li><li><p>b</p><p>more</p></li></ol>",
    "7) a": '<ol start="7"><li><p>a</p></li></ol>',
    "- [ ] open\n- [x] done": "<ul><li><p>☐ open</p></li><li><p>☑ done</p></li></ul>",
    "> a\nb\n\nc": "<blockquote><p>a<br>b</p></blockquote><p>c</p>",
    "https://a.example/(d). End": "<p>" + LINK.format("https://a.example/(d)", "https://a.example/(d)") + ". End</p>",
    "[*a* b](https://c.example/ 'title')": "<p>" + LINK.format("https://c.example/", "<em>a</em> b") + "</p>",
    "<https://a.example/> <mailto:a@b.example>": (
        "<p>" + LINK.format("https://a.example/", "https://a.example/") + " "
        + LINK.format("mailto:a@b.example", "mailto:a@b.example") + "</p>"
    ),
    "![alt](https://a.example/x.png)": "<p>" + LINK.format("https://a.example/x.png", "picture: alt") + "</p>",
    "[x](/relative) [y](javascript:alert(1)) [z](data:text/html,x)": (
        "<p>[x](/relative) [y](javascript:alert(1)) [z](data:text/html,x)</p>"
    ),
    "a<br>b": "<p>a<br>b</p>",
}  # fmt: skip
SCRIPT, IMAGE = "<script>alert(1)</script>", "<img src=x onerror=alert(1)>"
HOSTILE = {
    "tags": f"{SCRIPT}{IMAGE}<iframe srcdoc='{SCRIPT}'></iframe>",
    "svg": "<svg/onload=alert(1)><math><mtext></mtext></math><style>*{display:none}</style><base href=//evil.example>",
    "links": "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](\tjava\nscript:alert(1)) [d](blob:x)",
    "autolinks": f"<javascript:alert(1)> <data:text/html,{SCRIPT}> javascript:alert(1)",
    "attributes": '[a](https://b.example/"onmouseover="alert(1) "x\\" onclick=alert(1) y")',
    "title": '![" onerror="alert(1)](https://c.example/ "\' onload=alert(1)")',
    "entities": "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    "code": f'```">{SCRIPT}\n</code></pre>{SCRIPT}\n```\n`{IMAGE}`',
    "table": f"| {IMAGE} | b |\n|---|:-:|\n| [x](javascript:alert(1)) | {SCRIPT} |",
    "nested": f"[![a](javascript:alert(1))](javascript:alert(1)) [{IMAGE}](https://a.example)",
    "lists": f"- {SCRIPT}\n  > <iframe src=//evil.example>\n    1. <object data=x>\n",
    "null": "<scr\x00ipt>alert(1)</scr\x00ipt> \u202e\ufeff\ud83d<img\u00a0src=x onerror=alert(1)>",
    "trusted": "<a href='javascript:alert(1)' style='position:fixed;inset:0'>x</a><input autofocus onfocus=alert(1)>",
}
ALLOWED = "a blockquote br button code del div em h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul"
ATTRIBUTES = "class href title target rel type aria-label role tabindex scope start"
CHECK = """
(() => {
  const root = document.createElement("div");
  document.body.append(root);
  return import("/page/markdown.js").then(({ Markdown }) => {
    const markdown = new Markdown(root);
    const text = %s;
    for (const letter of text) markdown.append(letter);
    markdown.finish();
    const nodes = [...root.querySelectorAll("*")];
    const found = nodes.map((node) => [node.localName, ...node.getAttributeNames(), node.href ?? ""]);
    const words = root.textContent;
    root.remove();
    return [found, words];
  });
})()
"""
DEPTH = """
(async (text) => {
  const { Markdown } = await import("/page/markdown.js");
  const root = document.createElement("div");
  const markdown = new Markdown(root);
  markdown.append(text);
  markdown.finish();
  let deepest = 0;
  for (let node of root.querySelectorAll("*")) {
    let depth = 0;
    for (; node !== root; node = node.parentNode) depth++;
    deepest = Math.max(deepest, depth);
  }
  return deepest;
})(%s)
"""
LENGTHY = (
    *(
        "word ",
        "*a ",
        "*a* ",
        "**a",
        "_a_b",
        "~~",
        "[",
        "[a](",
        "](",
        "![[",
        "[a](https://b.example/(",
        "https://a",
        "(",
    ),
    *("`", "`` ` ", "<", "&", "\\", "> ", "- ", "1. ", "-", " ", "\t"),
    *("\n", "a\n", "* a\n", "> a\n", "# a\n", "|a|b|\n", "|-|\n", "```\n"),
)
TEXT_LEN = 10_000


@pytest.fixture(scope="module")
def page(scripted: Any, open_page: Any) -> Any:
    page = open_page()
    page.go(scripted.url)
    return page


@pytest.mark.parametrize("text", BECOMES)
def test_what_it_becomes(page: Any, text: str) -> None:
    assert page.evaluate(SHOW % (json.dumps(text), len(text))) == BECOMES[text]


def test_a_code_block_has_its_language_and_text(page: Any) -> None:
    shown = page.evaluate(SHOW % (json.dumps("1. x\n\n   ```python\n\n   if a < b:\n       pass\n   ```\nend"), 500))
    assert '<div class="code-head"><span>python</span><button type="button" class="quiet copy"' in shown
    assert 'aria-label="Code, python"><code>\nif a &lt; b:\n    pass</code></pre>' in shown
    assert shown.endswith("<p>end</p>")


def test_a_table_has_heads_and_alignments(page: Any) -> None:
    shown = page.evaluate(
        SHOW % (json.dumps("before\n| a | b |\n|---|--:|\n| **1** | x \\| y |\n| only\n\nafter"), 500)
    )
    assert shown.startswith("<p>before</p>") and shown.endswith("<p>after</p>")
    assert '<thead><tr><th scope="col">a</th><th class="right" scope="col">b</th></tr></thead>' in shown
    assert '<td><strong>1</strong></td><td class="right">x | y</td>' in shown
    assert '<td>only</td><td class="right"></td>' in shown


@pytest.mark.parametrize("size", [1, 2, 7])
def test_piece_by_piece_is_as_at_once(page: Any, size: int) -> None:
    texts = [
        *BECOMES,
        *HOSTILE.values(),
        "\n\n".join(BECOMES),
        "- a\n\n  ```\n  x\n  ```\n- b",
        "| a |\n|---|\n| b |\n\nc",
    ]
    for text in texts:
        whole = page.evaluate(SHOW % (json.dumps(text), len(text)))
        assert page.evaluate(SHOW % (json.dumps(text), size)) == whole, text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_stays_text(page: Any, name: str) -> None:
    page.complaints.clear()
    page.requests.clear()
    found, words = page.evaluate(CHECK % json.dumps(HOSTILE[name]))
    for tag, *rest in found:
        names, address = rest[:-1], rest[-1]
        assert tag in ALLOWED.split()
        assert set(names) <= {
            "class",
            "href",
            "title",
            "target",
            "rel",
            "type",
            "aria-label",
            "role",
            "tabindex",
            "scope",
            "start",
        }
        assert address.startswith(("https://", "http://", "mailto:")) or tag != "a"
    if name in ("tags", "code", "links"):
        assert "alert(1)" in words, "what a model wrote is shown, not hidden"
    page.browser.listen(0.1)
    assert page.complaints == []
    assert [url for url in page.requests if not url.endswith(".js")] == []


@pytest.mark.slow
@pytest.mark.parametrize("unit", LENGTHY)
def test_a_long_answer_takes_time_in_proportion(page: Any, unit: str) -> None:
    """Eight times the text takes about eight times the time, however it is built; 64 times would be the square."""

    def milliseconds(length: int) -> float:
        return float(page.evaluate(TIMED % (json.dumps(unit), length // len(unit), 200))[0])

    short = min(milliseconds(TEXT_LEN) for _ in range(3))
    assert any(milliseconds(8 * TEXT_LEN) < 24 * short + 100 for _ in range(3))  # others may want the machine


def test_levels_are_bounded(page: Any) -> None:
    opened, linked = "*a _b " * 5000 + "c_ d* " * 5000, "[" * 5000 + "x" + "](https://a.example)" * 5000
    for text in ("> " * 5000 + "x", "- " * 5000 + "x", opened, linked):
        assert 0 < page.evaluate(DEPTH % json.dumps(text)) < 60
