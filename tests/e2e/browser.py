"""A headless Chromium for tests, driven over the W3C WebDriver protocol: chromedriver speaks HTTP, so httpx is enough.

Both programs are Debian's: the packages are `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx

KEYS = {
    "enter": "\ue007",
    "escape": "\ue00c",
    "shift": "\ue008",
    "control": "\ue009",
    "tab": "\ue004",
    "right": "\ue014",
    "left": "\ue012",
}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's own name for a reference to a node

PACKAGES = {"chromium": "chromium", "chromedriver": "chromium-driver"}

missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]


class Browser:
    """One page. `script` runs JavaScript in it; `wait` polls it, for a page is never done when asked."""

    def __init__(self, driver: httpx.Client, capabilities: dict[str, Any]) -> None:
        self._driver = driver
        self._session = ""
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{made['sessionId']}"

    def close(self) -> None:
        self._call("DELETE", "")

    def open(self, url: str) -> Self:
        self._call("POST", "/url", {"url": url})
        return self

    def script(self, body: str, *args: Any) -> Any:
        """The value that the body of a function returns; a promise is awaited."""
        return self._call("POST", "/execute/sync", {"script": body, "args": list(args)})

    def wait(self, body: str, *args: Any, seconds: float = 20.0) -> Any:
        """Poll `script` until its value is truthy, and return it."""
        deadline = time.monotonic() + seconds
        while not (value := self.script(body, *args)):
            if time.monotonic() > deadline:
                raise AssertionError(f"after {seconds:g} s still not so: {body}\n{self.logs()}")
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        return str(self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def type(self, *pieces: str) -> None:
        """Press keys wherever the focus is: plain text, or a name of KEYS alone, or `shift+enter`."""
        actions = []
        for piece in pieces:
            names = piece.split("+")
            keys = [KEYS.get(name, name) for name in names] if names[0] in KEYS else list(piece)
            held = keys[:-1] if names[0] in KEYS else []
            for key in held:
                actions.append({"type": "keyDown", "value": key})
            for key in keys[len(held) :]:
                actions += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
            for key in reversed(held):
                actions.append({"type": "keyUp", "value": key})
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def hover(self, selector: str) -> None:
        """Move the mouse over the middle of a node."""
        node = self._call("POST", "/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "origin": {ELEMENT: node[ELEMENT]}, "x": 0, "y": 0}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def logs(self) -> list[str]:
        """What the console said since last asked: errors, refused resources, violations of the content policy."""
        return [f"{entry['level']} {entry['message']}" for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def devtools(self, command: str, **params: Any) -> Any:
        """A command of the DevTools protocol: media features, the size of the window."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._driver.request(method, self._session + path, json=body if method == "POST" else None)
        value = answer.json()["value"]
        if answer.is_error:
            raise AssertionError(f"{path}: {value['error']}: {value['message']}")
        return value


@contextmanager
def chromium(profile: Path) -> Iterator[Callable[[], Browser]]:
    """A chromedriver on a free port of this machine; the value makes browsers, each with a fresh profile."""
    opened: list[Browser] = []
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        told = (re.search(r"started successfully on port (\d+)", line) for line in process.stdout)
        port = next(found[1] for found in told if found)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as driver:

            def make() -> Browser:
                folder = profile / f"profile-{len(opened)}"
                options = {"args": [*FLAGS.split(), f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
                opened.append(Browser(driver, {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}))
                return opened[-1]

            try:
                yield make
            finally:
                for browser in opened:
                    browser.close()
    finally:
        process.terminate()
        process.wait(timeout=10)
