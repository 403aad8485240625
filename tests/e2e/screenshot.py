"""Pictures of the chat page of a running server: `python tests/e2e/screenshot.py URL FOLDER [QUESTION]`.

Light, dark, a narrow window, and the probabilities of one token; to be looked at, and one of them is docs/chat.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Browser, chromium

QUESTION = "What does itertools.groupby do?"
IDLE = "return document.querySelector('.answer')?.getAttribute('aria-busy') === 'false'"
DOUBTED = """
const spans = [...document.querySelectorAll(".body p .token")].filter((span) => span.textContent.trim().length > 2);
const doubt = (span) => Number(span.style.getPropertyValue("--doubt"));
spans.sort((one, other) => doubt(other) - doubt(one))[0]?.setAttribute("id", "doubted");
return spans.length;
"""


def media(browser: Browser, scheme: str) -> None:
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


def take(browser: Browser, url: str, folder: Path, question: str) -> None:
    browser.devtools("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
    media(browser, "light")
    browser.open(url).wait("return document.querySelector('#model').value")
    browser.screenshot(folder / "welcome.png")
    browser.type(question, "enter")
    browser.wait(IDLE, seconds=120)
    browser.wait("return document.querySelector('.figures dd').textContent === '0'")
    browser.screenshot(folder / "light.png")
    media(browser, "dark")
    browser.screenshot(folder / "dark.png")
    media(browser, "light")
    browser.script("document.querySelector('#tint').click()")
    if browser.script(DOUBTED):
        browser.script("document.querySelector('#doubted').scrollIntoView({ block: 'center' })")
        browser.hover("#doubted")
    browser.screenshot(folder / "popover.png")
    browser.script("document.querySelector('#tint').click()")
    browser.devtools("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.wait("return !document.body.classList.contains('panel-open')")
    browser.screenshot(folder / "narrow.png")


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        take(browser(), url, folder, " ".join(sys.argv[3:]) or QUESTION)


if __name__ == "__main__":
    main()
