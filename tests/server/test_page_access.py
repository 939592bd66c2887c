"""The chat page for everyone: by keyboard alone, read aloud, on a phone, dark and light, with enough contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ANSWER = """Rivers **move**, lakes *rest*. See [a map](https://example.org/map).

## Three things

1. Water `flows` downhill.
2. A mill takes its share:
   - through a *headrace*,
   - over the wheel.
3. The rest goes on.

| water | moves | depth |
|---|:-:|--:|
| river | yes | 4 m |
| lake | hardly | 60 m |

```python
def flow(area_m2: float, speed_m_s: float) -> float:
    return area_m2 * speed_m_s  # cubic metres per second, whatever the shape of the bed may be downstream
```

> Still waters run deep.
"""
CONTROLS = {"button", "link", "textbox", "combobox", "spinbutton", "checkbox", "searchbox", "slider", "switch"}
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
CONTRASTS = """
(() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const paint = (colors) => {
    context.clearRect(0, 0, 1, 1);
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
  };
  const light = (rgb) => rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const texts = [...node.childNodes].filter((n) => n.nodeType === 3);
    const words = texts.map((n) => n.data.trim()).join("") || node.placeholder;
    const isShown = node.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (!words || !isShown || node.closest(".hidden, [inert]")) continue;
    if (node.disabled || node.localName === "option") continue;
    const grounds = [];
    for (let at = node; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const ground = ["white", getComputedStyle(document.body).backgroundColor, ...grounds];
    const style = getComputedStyle(node, node.placeholder && !node.value ? "::placeholder" : null);
    const [a, b] = [light(paint([...ground, style.color])), light(paint(ground))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.localName, words.slice(0, 30)]);
  }
  return found;
})()
"""
FOCUSED = "(() => { const n = document.activeElement; return n.id || n.ariaLabel || n.textContent.trim() })()"
MARKED = """
(() => {
  const node = document.activeElement;
  const box = getComputedStyle(node.closest(".box") ?? node);
  const isMarked = getComputedStyle(node).outlineStyle !== "none" || box.boxShadow !== "none";
  return node === document.body || (node.matches(":focus-visible") && isMarked);
})()
"""
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def server(serve_script: Any) -> Any:
    return serve_script({"Compare rivers and lakes.": ANSWER})


@pytest.fixture
def page(open_page: Any, server: Any) -> Any:
    page = open_page()
    page.go(server.url)
    page.until("model.value")
    yield page
    page.close()


def ask(page: Any, text: str = "Compare rivers and lakes.") -> None:
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")
    page.until("document.querySelector('.assistant[aria-busy=false] .actions')")


def overflows(page: Any) -> Any:
    return page.evaluate("[document.documentElement.scrollWidth > innerWidth, main.scrollWidth > main.clientWidth]")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_how_it_looks(page: Any, size: str, theme: str, tmp_path: Path) -> None:
    """Nothing is blank, nothing is cut off, dark is dark. The pictures are left for people to look at."""
    width, height = SIZES[size]
    page.prefer(prefers_color_scheme=theme, prefers_reduced_motion="reduce")  # no picture of a movement
    page.size(width, height, phone=size == "phone")
    check_picture(page, tmp_path / f"{size}-{theme}-welcome.png", theme)
    ask(page)
    for name, action in (("chat", "main.scrollTop = 0"), ("end", "main.scrollTop = 1e6")):
        page.evaluate(action)
        check_picture(page, tmp_path / f"{size}-{theme}-{name}.png", theme)
    page.evaluate("document.getElementById('open-settings').click()")
    check_picture(page, tmp_path / f"{size}-{theme}-settings.png", theme)
    page.press("Escape")
    if size == "phone":
        page.evaluate("menu.click()")
        page.browser.listen(0.4)
        check_picture(page, tmp_path / f"{size}-{theme}-side.png", theme)


def check_picture(page: Any, path: Path, theme: str) -> None:
    from matplotlib.image import imread

    assert overflows(page) == [False, False]
    picture = (imread(page.screenshot(path))[..., :3] * 255).astype(np.int32)
    assert len(np.unique(picture @ [1 << 16, 1 << 8, 1])) > 50, "blank"
    if "settings" not in path.name and "side" not in path.name:  # those lie in a shade
        assert bool(np.median(picture) > 127) == (theme == "light")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_contrast(page: Any, theme: str) -> None:
    page.prefer(prefers_color_scheme=theme)
    seen = page.evaluate(CONTRASTS)
    ask(page)
    seen += page.evaluate(CONTRASTS)
    page.evaluate("document.getElementById('open-settings').click()")
    seen += page.evaluate(CONTRASTS)
    assert len(seen) > 60
    assert [each for each in seen if each[0] < LEAST_CONTRAST] == []


def test_every_control_and_landmark_has_a_name(page: Any) -> None:
    ask(page)
    nodes = page.accessible()
    assert [node for node in nodes if node[0] in CONTROLS and not node[1].strip()] == []
    roles = [role for role, _ in nodes]
    for landmark in ("banner", "main", "contentinfo", "complementary", "navigation"):
        assert roles.count(landmark) == 1, landmark
    names = {name: role for role, name in nodes if role in CONTROLS}
    for name in ("Message", "Model", "Send", "Settings", "New conversation", "Copy code", "Regenerate", "Edit message"):
        assert name in names, names
    assert names["Message"] == "textbox" and names["Model"] == "combobox"
    headings = [name for role, name in nodes if role == "heading"]
    assert headings == ["Compare rivers and lakes.", "You", "Answer", "Three things"]
    assert "table" in roles and "list" in roles
    page.evaluate("document.getElementById('open-settings').click()")
    nodes = page.accessible()
    assert ("dialog", "Settings") in nodes
    fields = [name for role, name in nodes if role in ("spinbutton", "textbox")]
    assert len(fields) == 12 and all(fields) and "Temperature" in fields and "Stop at" in fields


def test_finished_answers_are_read_aloud_and_tokens_are_not(page: Any) -> None:
    live = page.evaluate(
        "[...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map(n => n.id)"
    )
    assert sorted(live) == ["notice", "said"]
    ask(page)
    said = page.evaluate("said.textContent")
    assert said.startswith("Answer: Rivers move, lakes rest.") and "Still waters run deep." in said
    assert page.evaluate("[...document.querySelectorAll('.assistant')].every(n => !n.closest('[aria-live]'))")


def test_the_keyboard_is_enough(page: Any, server: Any) -> None:
    assert page.evaluate(FOCUSED) == "prompt"
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.evaluate("document.getElementById('prompt').value") == "one\ntwo"
    page.press("Enter")
    page.until("document.querySelector('.assistant[aria-busy=false] .actions')")
    assert page.evaluate(FOCUSED) == "prompt"
    assert server.llm.asked[-1][0] == "user: one\ntwo\nassistant: "
    visited = walk(page)
    for stop in (
        "new",
        "theme",
        "model",
        "open-settings",
        "Copy message",
        "Edit message",
        "Regenerate",
        "prompt",
        "send",
    ):
        assert stop in visited, visited
    page.evaluate("document.getElementById('open-settings').focus()")
    page.press("Enter")
    page.until("document.querySelector('#settings[open]')")
    fields = page.evaluate("[...document.querySelectorAll('#settings :is(input, textarea)')].map(n => n.id)")
    assert set(fields) <= set(walk(page, 30)) <= {*fields, "settings", "reset", "Done", ""}
    page.press("Escape")
    page.until("!document.querySelector('#settings[open]')")
    assert page.evaluate(FOCUSED) == "open-settings"


def walk(page: Any, steps: int = 40) -> list[str]:
    """What the Tab key comes by, each with a visible mark of focus."""
    visited = []
    for _ in range(steps):
        page.press("Tab")
        visited.append(page.evaluate(FOCUSED) if page.evaluate("document.activeElement !== document.body") else "")
        marked = page.evaluate(MARKED)
        assert marked, visited[-1]
    return visited


def test_a_regenerated_answer_leaves_the_focus_where_it_is_of_use(page: Any, server: Any) -> None:
    ask(page)
    server.llm.piece_s = 0.01
    page.evaluate("[...document.querySelectorAll('button')].find(b => b.textContent === 'Regenerate').focus()")
    page.press("Enter")
    page.until("document.activeElement.id === 'stop'")
    page.press("Space")
    server.llm.piece_s = 0.0
    page.until("document.activeElement.id === 'prompt'")


def test_the_drawer_on_a_phone(page: Any) -> None:
    page.size(*SIZES["phone"], phone=True)
    page.until("side.inert && !room.inert && menu.ariaExpanded === 'false'")
    page.evaluate("menu.click()")
    page.until("!side.inert && room.inert && menu.ariaExpanded === 'true'")
    assert page.evaluate(FOCUSED) == "new"
    page.press("Escape")
    page.until("side.inert && !room.inert")
    assert page.evaluate("document.activeElement.id") == "menu"


def test_the_theme_can_be_chosen_and_is_kept(page: Any) -> None:
    page.prefer(prefers_color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    for theme, expected in (("light", True), ("dark", False)):
        page.click("#theme")
        assert page.text("#theme") == f"Theme: {theme}"
        assert (page.evaluate(ground) == light) is expected
    page.reload()
    page.until("model.value")
    assert page.text("#theme") == "Theme: dark" and page.evaluate(ground) != light
    page.click("#theme")
    assert page.evaluate(ground) == light


def test_who_wants_no_movement_sees_none(page: Any) -> None:
    moving = (
        "[...document.querySelectorAll('*')].filter(n => parseFloat(getComputedStyle(n).transitionDuration) > 0).length"
    )
    page.size(*SIZES["phone"])
    assert page.evaluate(moving) > 0
    page.prefer(prefers_reduced_motion="reduce")
    assert page.evaluate(moving) == 0
