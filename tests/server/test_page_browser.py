"""The chat page in a real browser: asking, stopping, coming back, what goes wrong, and nothing of a model's is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LONG = " ".join(f"word{i}" for i in range(400))
HOSTILE = """# <img src=x onerror="window.stolen=1">
<script>window.stolen=1</script> <iframe srcdoc="<script>parent.stolen=1</script>"></iframe>
[click](javascript:window.stolen=1) [ok](https://example.org/?q=1) ![pixel](https://example.org/pixel.png)
| <svg onload=window.stolen=1> | b |
|---|---|
| <style>*{display:none}</style> | <form action=//example.org><input autofocus onfocus=window.stolen=1> |
```html"><script>window.stolen=1</script>
</code></pre><script>window.stolen=1</script>
```
<think> <base href=//example.org> <meta http-equiv=refresh content="0;url=//example.org">
"""
ANSWERS = {
    "hi": "**Hello** there.\n\n- one\n- two\n\n```python\nprint(1)\n```",
    "long": LONG,
    "hostile": HOSTILE,
    "thoughtful": "<think>\nFirst this.\n</think>\n\nThen *that*.",
    "silent": "",
    HOSTILE: "Fine.",
}
DONE = (
    "document.querySelectorAll('.assistant').length === {0}"
    " && !document.querySelector('[aria-busy=true]') && !send.hidden"
)
STORAGES = {
    "absent": """Object.defineProperty(window, "localStorage", {
      get() { throw new DOMException("no", "SecurityError"); }
    })""",
    "full": 'Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); }',
    "broken": """
      for (const name of ["conversation.x", "sampling", "theme", "system"]) {
        localStorage["headrace." + name] = '{"messages": [1';
      }
      localStorage["headrace.conversation.y"] = '{"id": "y", "messages": [null, {"role": "king"}]}';
    """,
}


@pytest.fixture(scope="module")
def server(serve_script: Any) -> Any:
    return serve_script(ANSWERS)


@pytest.fixture
def page(open_page: Any, server: Any) -> Any:
    server.llm.piece_s = 0.0
    page = open_page()
    load(page, server.url)
    yield page
    page.close()


def load(page: Any, url: str) -> None:
    page.go(url)
    page.until("model.value")


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    before = page.evaluate("document.querySelectorAll('.assistant').length")
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")
    if wait:
        page.until(DONE.format(before + 1))


def answer(page: Any) -> str:
    return str(page.evaluate("[...document.querySelectorAll('.assistant .text')].at(-1).innerText"))


def test_a_chat(page: Any, server: Any) -> None:
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.evaluate("document.getElementById('welcome').hidden") is False
    ask(page, "hi")
    assert answer(page).split() == ["Hello", "there.", "one", "two", "python", "Copy", "print(1)"]
    assert page.evaluate("document.querySelector('.answer strong').textContent") == "Hello"
    assert page.evaluate("document.getElementById('welcome').hidden") is True
    note = page.text(".assistant .note")
    assert "123 tokens/s, 56 % of the roof" in note and "7 of them known before" in note, note
    assert page.text("#said").startswith("Answer: Hello there.") and "Copy" not in page.text("#said")
    assert page.text("#title") == "hi" and page.evaluate("document.title") == "hi · headrace"
    ask(page, "and now?")
    assert answer(page) == "AND NOW?"
    assert server.llm.asked[-1][0].startswith("user: hi\nassistant: **Hello** there.")
    assert page.complaints == []
    assert all(url.startswith(server.url) for url in page.requests)


def test_an_answer_comes_in_pieces_with_its_speed(page: Any, server: Any) -> None:
    server.llm.piece_s = 0.01
    ask(page, "long", wait=False)
    page.until("document.querySelector('.answer')?.textContent.includes('word3')")
    assert page.evaluate("document.querySelector('.assistant').ariaBusy") == "true"
    assert page.text("#said") == "Answering."
    assert page.evaluate("[send.hidden, document.getElementById('stop').hidden]") == [True, False]
    page.until("rate.textContent === '123 tokens/s, 56 % of the roof'")
    assert page.evaluate("share.style.width") == "56%"
    assert page.evaluate("document.querySelector('[aria-busy=true]') !== null"), "while it still came"
    page.press("Escape")
    page.until(DONE.format(1))


def test_stop_continue_and_regenerate(page: Any, server: Any) -> None:
    server.llm.piece_s = 0.01
    ask(page, "long", wait=False)
    page.until("document.querySelector('.answer')?.textContent.includes('word5')")
    cancelled = server.llm.num_cancelled
    page.press("Escape")
    page.until(DONE.format(1))
    page.wait(lambda: server.llm.num_cancelled == cancelled + 1)
    stopped = answer(page)
    assert "word5" in stopped and len(stopped) < len(LONG) and "Stopped by you." in page.text(".assistant .foot")
    server.llm.piece_s = 0.0
    page.click_button("Continue")
    page.until(DONE.format(1))
    assert answer(page).replace(" ", "") == LONG.replace(" ", "")
    page.click_button("Regenerate")
    page.until(DONE.format(1))
    assert answer(page) == LONG
    assert server.llm.asked[-1][0] == "user: long\nassistant: "


def test_a_message_is_edited(page: Any, server: Any) -> None:
    ask(page, "first")
    ask(page, "secnd")
    page.click_button("Edit")
    assert page.evaluate("[document.getElementById('prompt').value, editing.hidden]") == ["secnd", False]
    page.press("Escape")
    assert page.evaluate("[document.getElementById('prompt').value, editing.hidden]") == ["", True]
    page.click_button("Edit")
    page.evaluate("document.getElementById('prompt').value = ''")
    ask(page, "second", wait=False)
    page.until("[...document.querySelectorAll('.assistant .text')].at(-1).innerText === 'SECOND'")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 4
    assert server.llm.asked[-1][0] == "user: first\nassistant: FIRST\nuser: second\nassistant: "


def test_a_conversation_is_there_after_a_reload_and_beside_others(page: Any, server: Any) -> None:
    ask(page, "hi")
    before = page.text("#thread")
    page.reload()
    page.until("model.value")
    assert page.text("#thread") == before
    page.click("#new")
    page.until("!document.querySelector('.turn')")
    ask(page, "another")
    titles = "[...document.querySelectorAll('#conversations .open')].map(b => b.textContent)"
    assert page.evaluate(titles) == ["another", "hi"]
    page.evaluate("document.querySelectorAll('#conversations .open')[1].click()")
    page.until("document.querySelector('#title').textContent === 'hi'")
    assert page.text("#thread") == before
    page.evaluate("document.querySelector('#conversations li:nth-child(2) .remove').click()")
    page.until(f"{titles}.length === 1".replace("\n", ""))
    page.click_button("Undo")
    page.until(f"{titles}.length === 2")
    assert page.complaints == []


def test_what_had_come_before_a_reload_is_kept(page: Any, server: Any) -> None:
    server.llm.piece_s = 0.01
    ask(page, "long", wait=False)
    page.until("document.querySelector('.answer')?.textContent.includes('word5')")
    cancelled = server.llm.num_cancelled
    page.reload()
    page.until("document.querySelector('.answer')?.textContent.includes('word5')")
    page.wait(lambda: server.llm.num_cancelled == cancelled + 1)
    assert "The connection was lost here." in page.text(".assistant .foot")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_browser_that_keeps_nothing_is_no_error(open_page: Any, server: Any, storage: str) -> None:
    server.llm.piece_s = 0.0
    page = open_page()
    page.command("Page.addScriptToEvaluateOnNewDocument", source=STORAGES[storage])
    load(page, server.url)
    ask(page, "hi")
    assert "Hello there." in answer(page)
    assert ("no room" in page.text("#notice")) is (storage != "broken")
    assert page.complaints == []


@pytest.mark.parametrize("way", ["answer", "prompt", "system"])
def test_markup_and_scripts_stay_inert(page: Any, server: Any, way: str) -> None:
    if way == "system":
        page.evaluate(f"document.getElementById('system').value = {json.dumps(HOSTILE)}")
        page.evaluate("document.getElementById('system').dispatchEvent(new Event('input'))")
    if way == "prompt":
        page.evaluate(f"document.getElementById('prompt').value = {json.dumps(HOSTILE)}")
    ask(page, {"answer": "hostile", "prompt": "", "system": "hi"}[way])
    page.reload()
    page.until("model.value && document.querySelector('.assistant')")
    page.browser.listen(0.3)
    assert page.evaluate("window.stolen") is None and page.complaints == []
    assert all(url.startswith(server.url) for url in page.requests), page.requests
    foreign = "img, script, iframe, svg, style, form, input, object, embed, base, meta, link, video, audio"
    assert page.evaluate(f"document.querySelectorAll('#thread :is({foreign})').length") == 0
    names = set(page.evaluate("[...document.querySelectorAll('*')].flatMap(n => n.getAttributeNames())"))
    assert not any(name.startswith("on") for name in names)
    links = page.evaluate("[...document.querySelectorAll('#thread a')].map(a => [a.href, a.rel, a.target])")
    safe = ["noopener noreferrer nofollow", "_blank"]
    expected = (
        [["https://example.org/?q=1", *safe], ["https://example.org/pixel.png", *safe]] if way == "answer" else []
    )
    assert links == expected
    if way != "system":
        assert "<script>window.stolen=1</script>" in page.text("#thread")


def test_the_policy_holds_where_a_script_would_break_it(page: Any) -> None:
    """Not the page's own care, but the browser's: HTML from text is refused, and so is what comes from elsewhere."""
    refused = page.evaluate(
        "(() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } })()"
    )
    assert refused is True
    loaded = page.evaluate(
        "new Promise(done => { const image = new Image(); image.onload = () => done('loaded');"
        " image.onerror = () => done('refused'); image.src = 'http://127.0.0.1:9/x.png' })"
    )
    assert loaded == "refused" and any("Content Security Policy" in each for each in page.complaints)


def test_thoughts_are_folded_away(page: Any) -> None:
    ask(page, "thoughtful")
    assert page.evaluate("document.querySelector('details').open") is False
    assert page.evaluate("document.querySelector('.thoughts').textContent") == "First this.\n"
    assert page.evaluate("document.querySelector('.answer em').textContent") == "that"


def test_settings_are_sent_as_they_are(page: Any, server: Any) -> None:
    ask(page, "plain")
    params = server.llm.asked[-1][1]
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 0.9, 2048, None), "as shown"
    shown = page.evaluate(
        "['temperature', 'top_p', 'max_tokens'].map(n => document.getElementById('set-' + n).placeholder)"
    )
    assert shown == ["0.5", "0.9", "2048"]
    page.click("#open-settings")
    given = {"temperature": "0.3", "top_k": "5", "seed": "7", "max_tokens": "1", "min_p": "3", "stop": "END\nSTOP"}
    for name, value in {**given, "top_p": "0.5"}.items():
        page.evaluate(f"document.getElementById('set-{name}').focus()")
        page.type(value)
    page.evaluate("document.getElementById('system').focus()")
    page.type("Be brief.")
    page.evaluate("document.getElementById('settings').close()")
    ask(page, "told")
    prompt, params = server.llm.asked[-1]
    assert prompt.startswith("system: Be brief.\nuser: plain\n")
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.3, 5, 0.5, 7)
    assert params.max_tokens == 1 and params.stop == ("END", "STOP")
    assert params.min_p == 0.0, "what is out of range is not sent"
    assert page.evaluate("document.getElementById('set-min_p').value") == "", "nor left standing"
    assert "as many tokens as were allowed" in page.text(".turn:last-child .foot")
    page.reload()
    page.until("model.value")
    ask(page, "again")
    assert server.llm.asked[-1][1] == params and server.llm.asked[-1][0].startswith("system: Be brief.")


def test_export_is_the_conversation(page: Any, tmp_path: Path) -> None:
    ask(page, "hi")
    page.browser.command(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), browserContextId=page.context
    )
    page.click("#export")
    page.wait((tmp_path / "conversation.json").exists)
    page.browser.listen(0.2)
    saved = json.loads((tmp_path / "conversation.json").read_text())
    assert saved["format"] == "headrace conversation" and saved["model"] == "scripted"
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][1]["content"] == ANSWERS["hi"]


def test_a_key_is_asked_for_and_stays_out_of_addresses(open_page: Any, serve_script: Any) -> None:
    server = serve_script(api_keys=("right",))
    page = open_page()
    page.go(server.url)
    page.until("document.querySelector('#key-dialog[open]')")
    for key, keep in (("wrong", False), ("right", True)):
        page.evaluate("key.focus()")
        page.type(key)
        if keep:
            page.evaluate("document.getElementById('keep-key').checked = true")
        page.press("Enter")
        if key == "wrong":
            page.until("document.querySelector('#key-dialog[open]') && key.value === '' && notice.textContent")
    page.until("model.value")
    ask(page, "hi")
    assert answer(page) == "HI"
    page.reload()
    page.until("model.value")
    assert not any("right" in url for url in page.requests)
    assert page.evaluate("JSON.stringify(localStorage).includes('right')") is False
    assert page.complaints == []


def test_what_goes_wrong_is_said_and_can_be_tried_again(page: Any, server: Any) -> None:
    server.llm.num_requests = 1000
    ask(page, "hi", wait=False)
    page.until("document.querySelector('.problem')")
    assert "The server is busy. Try again in" in page.text(".problem")
    server.llm.num_requests = 0
    page.click_button("Try again")
    page.until(DONE.format(1))
    assert "Hello there." in answer(page) and page.evaluate("document.querySelectorAll('.problem').length") == 0
    ask(page, "too long", wait=False)
    page.until("document.querySelector('.problem')")
    assert "The conversation is too long for this model." in page.text(".problem")
    ask(page, "silent", wait=False)
    page.until("!send.hidden && document.querySelectorAll('.user').length === 3 && !document.querySelector('.problem')")
    assert "without a word" in page.text(".turn:last-child")


def test_a_server_that_is_gone_is_named(open_page: Any, serve_script: Any) -> None:
    server = serve_script(ANSWERS)
    page = open_page()
    load(page, server.url)
    server.llm.piece_s = 0.01
    ask(page, "long", wait=False)
    page.until("document.querySelector('.answer')?.textContent.includes('word5')")
    server.close()
    page.until("document.querySelector('.problem')")
    assert "The connection was lost in the middle of the answer." in page.text(".problem")
    ask(page, "still there?", wait=False)
    page.until("document.querySelector('#thread').textContent.includes('The server does not answer.')")


def test_loading_is_waited_for(open_page: Any, serve_script: Any) -> None:
    server = serve_script(waits=True)
    page = open_page()
    page.go(server.url)
    page.until("notice.textContent.includes('The model is being loaded')")
    server.loaded.set()
    page.until("notice.textContent === ''")
    ask(page, "hi")
    assert answer(page) == "HI"


def test_the_reader_stays_where_the_reader_is(page: Any, server: Any) -> None:
    page.size(900, 400)
    server.llm.piece_s = 0.002
    at_end = "main.scrollHeight - main.scrollTop - main.clientHeight < 3"
    ask(page, "long")
    page.until(at_end)
    ask(page, "long", wait=False)
    page.until("document.querySelectorAll('.answer')[1]?.textContent.includes('word30')")
    page.evaluate("main.scrollTop = 10")
    page.until("!document.getElementById('to-end').hidden")
    page.until(DONE.format(2))
    assert page.evaluate("main.scrollTop") == 10
    page.click("#to-end")
    page.until(at_end)


def test_a_real_model_answers(open_page: Any, process: Any) -> None:
    page = open_page()
    load(page, process.url)
    page.click("#open-settings")
    page.evaluate("document.getElementById('set-max_tokens').focus()")
    page.type("48")
    page.press("Enter")
    ask(page, "A mill <b>needs</b> water.")
    foot = page.text(".assistant .foot")
    words = page.evaluate(
        "JSON.parse(localStorage[Object.keys(localStorage).find(k => k.includes('conversation.'))]).messages"
    )
    assert [each["role"] for each in words] == ["user", "assistant"]
    count = words[1]["usage"]["completion_tokens"]  # drawn at random, an answer may end before
    assert 0 < count <= 48 and f"{count} tokens" in foot and "tokens/s" in foot
    assert page.complaints == []
