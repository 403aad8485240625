"""The overview page in a headless Chromium, against the real server: the past when it is opened, and what comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Browser, missing
from test_page import serving
from tiny_model import tiny_model

pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs Debian's packages: {' '.join(missing)}")

KEY = "open-sesame"
LIVE = "return document.querySelector('#live-state').textContent === 'live'"
FACTS = """
const words = (node) => [...node.children].map((child) => child.textContent);
return Object.fromEntries([...document.querySelectorAll('#now > div')].map(words));
"""
TITLES = "return [...document.querySelectorAll('.chart:not([hidden]) h3')].map((node) => node.textContent)"
WIDE = "return document.documentElement.scrollWidth"
EXPECTED = ["Tokens a second", "To the first token", "Between tokens", "Requests", "Cache in use"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def ask(url: str, **body: Any) -> None:
    given = {"prompt": "a story of foxes", "max_tokens": 48, "ignore_eos": True, **body}
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{url}/v1/completions", json=given, headers=headers, timeout=60, trust_env=False).is_success


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    with serving(model, "--num-blocks", "512") as url:
        ask(url)
        ask(url)
        until = time.monotonic() + 30  # the past that the page is to show
        while not any(row["finished"] for row in httpx.get(f"{url}/history", trust_env=False).json()["rows"]):
            assert time.monotonic() < until
            time.sleep(0.1)
        yield url


@pytest.fixture
def page(window: Browser, server: str) -> Iterator[Browser]:
    window.open(f"{server}/livez").script("localStorage.clear(); sessionStorage.clear()")
    window.logs()
    window.open(f"{server}/overview").wait(LIVE)
    window.wait("return document.querySelector('.tall .line')")
    yield window
    assert window.logs() == []


def test_the_past_is_there_when_it_is_opened(page: Browser) -> None:
    titles = page.script(TITLES)
    assert [title for title in EXPECTED if title not in titles] == []
    assert "Guessed tokens that were right" not in titles  # nothing guesses here
    facts = page.script(FACTS)
    assert facts["First token, median"].endswith("s") and facts["Next token, median"].endswith("s")
    assert (facts["Restarts"], facts["Refused"], facts["Preemptions"], facts["Guesses right"]) == ("0", "0", "0", "–")
    assert float(facts["Found in the cache"].strip("%")) >= 0
    rows = page.wait("return [...document.querySelectorAll('#requests li')].map((row) => row.innerText)")
    assert len(rows) == 2 and all("48 tokens" in row and "200" in row for row in rows)


def test_what_happens_next_is_shown_by_itself(page: Browser, server: str) -> None:
    before = page.script("return document.querySelectorAll('#requests li').length")
    ask(server, max_tokens=120)
    page.wait("return document.querySelectorAll('#requests li').length > arguments[0]", before)
    page.wait("return document.querySelector('#requests li').innerText.includes('120 tokens')")


def test_every_chart_fills_the_height_that_it_has(page: Browser) -> None:
    heights = page.script(
        "const shown = [...document.querySelectorAll('.chart:not([hidden]) .picture')];"
        "return shown.map((p) => p.clientHeight - p.querySelector('svg').getAttribute('height'))"
    )
    assert len(heights) >= 5 and set(heights) == {30}


def test_a_chart_is_read_with_the_keyboard(page: Browser) -> None:
    page.script("document.querySelector('.tall .picture').focus()")
    page.type("left")
    page.wait("return /^[0-9:]{8}$/.test(document.querySelector('.tall .cursor text')?.textContent)")
    assert "written" in page.script("return document.querySelector('.tall .picture').getAttribute('aria-label')")


def test_the_pages_lead_to_one_another(page: Browser, server: str) -> None:
    for path in ("/", "/train"):
        page.open(f"{server}{path}")
        page.script("document.querySelector('a[href=\"/overview\"]').click()")
        page.wait("return location.pathname === '/overview' && document.querySelector('#now dd')")
        assert page.script("return document.querySelector('nav a[href=\"/\"]').innerText.trim()") == "Chat"


def test_it_has_a_light_and_a_dark_look_and_fits_a_narrow_window(page: Browser) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    colours = []
    for scheme in ("light", "dark"):
        page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(page.script(paper))
    assert colours[0] != colours[1]
    page.devtools("Emulation.setEmulatedMedia", features=[])
    page.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        assert page.script(WIDE) <= 360
        assert page.script("const m = document.querySelector('#main'); return m.scrollWidth <= m.clientWidth")
    finally:
        page.devtools("Emulation.clearDeviceMetricsOverride")


def test_a_key_is_asked_for(window: Browser, model: Path) -> None:
    with serving(model, "--num-blocks", "64", "--api-keys", KEY) as url:
        assert httpx.get(f"{url}/history", trust_env=False).status_code == 401
        window.open(
            f"{url.replace('://', f'://me:{KEY}@')}/overview"
        ).logs()  # as if the browser's question was answered
        window.script("sessionStorage.setItem('twofold.key', 'the-wrong-one')")
        window.open(f"{url}/overview")
        window.wait("return document.querySelector('#key-dialog').open")
        window.type(KEY, "enter")
        window.wait(LIVE)
        assert {line for line in window.logs() if "status of 401" not in line} == set()
