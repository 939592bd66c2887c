"""A headless Chromium, driven over a pipe in its own protocol (DevTools): nothing but the browser itself is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--mute-audio",
)
TIMEOUT_S = 60.0
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Space": ("Space", 32, " "),
}
SHIFT = 8

Event = dict[str, Any]


def find_browser() -> str | None:
    """The Chromium of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """The process. Commands are answered in turn; what it tells meanwhile goes to the pages it is about."""

    def __init__(self, path: str, profile: Path) -> None:
        theirs_in, self._out = _high(os.pipe())
        self._in, theirs_out = _high(os.pipe())
        # It reads from 3 and writes to 4; a shell puts them there.
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}']
        self._log = (profile / "log").open("wb")
        command = [*shell, path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=self._log, stderr=self._log, start_new_session=True
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._held, self._last_id = b"", 0
        self.pages: dict[str, Page] = {}

    def command(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command, which must succeed."""
        answer = self.ask(method, session, **params)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(TIMEOUT_S)
            assert answer is not None, f"no answer to {method}"
            if answer.get("id") == self._last_id:
                return answer

    def listen(self, seconds: float) -> None:
        """Takes in what is told for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._read(left)

    def open_page(self) -> Page:
        """A page without a past: its storage is its own."""
        context = self.command("Target.createBrowserContext")["browserContextId"]
        target = self.command("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.pages[session] = page = Page(self, session, context)
        page.start()
        return page

    def close(self) -> None:
        """Ends it."""
        os.write(self._out, json.dumps({"id": -1, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)
        self._log.close()

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, if one comes in time; events are handed on at once."""
        while b"\0" not in self._held:
            if not select.select([self._in], [], [], timeout_s)[0]:
                return None
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser has ended"
            self._held += piece
        raw, _, self._held = self._held.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message and message.get("sessionId") in self.pages:
            self.pages[message["sessionId"]].take(message["method"], message["params"])
        return message


def _high(ends: tuple[int, int]) -> tuple[int, int]:
    """The same pipe under numbers that the shell will not overwrite."""
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Page:
    """A tab. requests: every address it asked for. complaints: errors, refusals of its policy, dialogs."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def start(self) -> None:
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility", "DOM"):
            self.command(f"{domain}.enable")
        self.size(1280, 800)

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.command(method, self.session, **params)

    def take(self, method: str, params: Event) -> None:
        """Takes in an event."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif method == "Log.entryAdded" and params["entry"]["source"] != "network":  # refused requests are no mistakes
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {params['message']}")

    def close(self) -> None:
        """Ends it; again does nothing."""
        if self.browser.pages.pop(self.session, None):
            self.browser.command("Target.disposeBrowserContext", browserContextId=self.context)

    # What a reader does

    def go(self, url: str) -> None:
        """Loads a page and waits until its scripts have run."""
        self.command("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        self.evaluate("window.isOld = true")
        self.command("Page.reload")
        self.until("!window.isOld && document.readyState === 'complete'")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        scale = 2 if phone else 1
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def prefer(self, **features: str) -> None:
        """Sets what the reader prefers: prefers_color_scheme="dark"."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.command("Emulation.setEmulatedMedia", features=wanted)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, number, text = KEYS[key]
        given = {"key": " " if key == "Space" else key, "code": code, "windowsVirtualKeyCode": number}
        held = SHIFT if shift else 0
        self.command("Input.dispatchKeyEvent", type="keyDown", text=text, modifiers=held, **given)
        self.command("Input.dispatchKeyEvent", type="keyUp", modifiers=held, **given)

    def type(self, text: str) -> None:
        """Types where the focus is."""
        self.command("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element, which must be in view or come into it."""
        place = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            " node.scrollIntoView({block: 'nearest'}); const box = node.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def click_button(self, label: str) -> None:
        """Clicks the last visible button with these words on it."""
        said = f"b.textContent.trim() === {json.dumps(label)}"
        found = f"[...document.querySelectorAll('button')].filter(b => b.offsetParent && {said})"
        self.until(f"{found}.length > 0")
        self.evaluate(f"{found}.at(-1).click()")

    # What can be seen

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str, timeout_s: float = 30.0) -> None:
        """Returns once the expression is true."""
        end = time.monotonic() + timeout_s
        while not self._holds(condition):
            assert time.monotonic() < end, f"never: {condition}\n{self.evaluate('document.body.innerText')}"
            self.browser.listen(0.02)

    def _holds(self, condition: str) -> bool:
        answer = self.browser.ask(
            "Runtime.evaluate", self.session, expression=f"Boolean({condition})", returnByValue=True
        )
        return bool(answer.get("result", {}).get("result", {}).get("value"))  # a page between two loads has no value

    def wait(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Returns once it is true of something outside the browser."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "never"
            self.browser.listen(0.02)

    def text(self, selector: str) -> str:
        """What a reader reads there."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))
        return path

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that assistive technology is told of."""
        nodes = self.command("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        return [(str(node["role"]["value"]), str(node.get("name", {}).get("value", ""))) for node in shown]
