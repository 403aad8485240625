"""Pictures of the pages of a running server: `python tests/e2e/screenshot.py URL FOLDER [QUESTION]`.

Light, dark, a narrow window, and the probabilities of one token; where the server has runs, the training page with the
newest two, and the rollouts of the newest, where it has any; the overview page. They are to be looked
at; docs/chat.png, docs/overview.png, docs/train.png, docs/align.png and docs/rollouts.png are some of them.
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


def size(browser: Browser, width: int, height: int, *, mobile: bool = False) -> None:
    browser.devtools(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
    )


def take(browser: Browser, url: str, folder: Path, question: str) -> None:
    size(browser, 1280, 800)
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
    size(browser, 390, 844, mobile=True)
    browser.wait("return !document.body.classList.contains('panel-open')")
    browser.screenshot(folder / "narrow.png")


def take_training(browser: Browser, url: str, folder: Path) -> None:
    size(browser, 1280, 900)
    media(browser, "light")
    browser.open(f"{url.rstrip('/')}/train")
    browser.wait("return document.querySelector('#live-state').textContent === 'live'")
    if not browser.script("return document.querySelector('.run')"):
        return
    browser.wait("return document.querySelector('.tall .line')")
    browser.screenshot(folder / "train-light.png")
    if browser.script("return !document.querySelector('#rollouts-part').hidden"):
        browser.wait("return document.querySelector('.answer')")
        media(browser, "dark")
        browser.script("document.querySelector('#rollouts-part').scrollIntoView()")
        browser.screenshot(folder / "train-rollouts.png")
        media(browser, "light")
        browser.script("document.querySelector('#main').scrollTo(0, 0)")
    browser.script("document.querySelectorAll('.run input')[1]?.click()")
    browser.hover(".tall .picture")
    browser.wait("return document.querySelector('.cursor line')")
    media(browser, "dark")
    browser.screenshot(folder / "train-dark.png")
    browser.script("document.querySelector('#samples-title').scrollIntoView()")
    browser.screenshot(folder / "train-samples.png")
    size(browser, 390, 844, mobile=True)
    browser.script("document.querySelector('#curves').scrollIntoView()")
    browser.screenshot(folder / "train-narrow.png")


def take_overview(browser: Browser, url: str, folder: Path) -> None:
    size(browser, 1280, 900)
    media(browser, "light")
    browser.open(f"{url.rstrip('/')}/overview").wait("return document.querySelector('.tall .line')")
    browser.script("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    browser.screenshot(folder / "overview-light.png")
    media(browser, "dark")
    browser.screenshot(folder / "overview-dark.png")
    size(browser, 390, 844, mobile=True)
    browser.screenshot(folder / "overview-narrow.png")


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        page = browser()
        take(page, url, folder, " ".join(sys.argv[3:]) or QUESTION)
        take_training(page, url, folder)
        take_overview(page, url, folder)


if __name__ == "__main__":
    main()
