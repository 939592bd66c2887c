"""The picture of the chat page for the README, of an answer by the default model: `make picture`.

Not a test: speeds are those of the machine it is taken on. With a seed, so that answers are the same each time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from browser import Browser, find_browser  # noqa: E402
from conftest import Process  # noqa: E402

PICTURE = ROOT / "docs" / "chat_page.png"
QUESTIONS = ("Name three things to see in Paris.", "Explain recursion with a short Python example.")
ENDED = "document.querySelector('.assistant') && !document.querySelector('[aria-busy=true]') && !send.hidden"


def take(url: str, browser: Browser) -> None:
    """Asks, waits for the answers, and keeps what a reader sees."""
    page = browser.open_page()
    page.size(1280, 800)
    page.prefer(prefers_color_scheme="light")
    page.go(url)
    page.evaluate("""localStorage["headrace.sampling"] = '{"seed": 1}'""")
    page.reload()
    page.until("document.getElementById('model').value")
    for question in QUESTIONS:
        page.click_button("New conversation")
        page.evaluate("document.getElementById('prompt').focus()")
        page.type(question)
        page.press("Enter")
        page.until(ENDED, 120)
    page.browser.listen(0.5)
    page.screenshot(PICTURE)


def main() -> None:
    path = find_browser()
    if path is None:
        raise SystemExit("there is no chromium here; make browser installs Debian's")
    with TemporaryDirectory() as folder:
        server = Process(folder=Path(folder)).ready()
        browser = Browser(path, Path(folder))
        try:
            take(server.url, browser)
        finally:
            browser.close()
            server.end()
    print(f"{PICTURE}: {PICTURE.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
