"""The chat page in a headless Chromium, against the real server with a tiny random checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Browser, missing
from tiny_model import tiny_model

pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs Debian's packages: {' '.join(missing)}")

KEY = "open-sesame"
DONE = "return [...document.querySelectorAll('.answer')].at(-1)?.getAttribute('aria-busy') === 'false'"
TEXT = "return [...document.querySelectorAll('.body')].at(-1).textContent"
SPOKEN = re.compile(r"(\d+(?:\.\d)?) tokens/s.*first token \d+(?:\.\d+)? m?s.*?(\d+) tokens", re.S)


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[str]:
    """`twofold serve` on a free port; the value is where its page is."""
    command = [sys.executable, "-m", "twofold", "serve", str(model), "--port", "0", "--dtype", "float32"]
    command += ["--drain-seconds", "2", "--max-num-seqs", "8", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        told = (re.search(r"Chat page: (http://\S+?)/?$", line) for line in process.stdout)
        url = next((found[1] for found in told if found), None)
        assert url is not None, "the server ended before it was ready"
        yield url
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    with serving(model, "--num-blocks", "2048") as url:
        yield url


@pytest.fixture
def page(window: Browser, server: str) -> Iterator[Browser]:
    """The page, with nothing remembered. A test that expects trouble in the console reads it away before its end."""
    window.open(f"{server}/livez").script("localStorage.clear(); sessionStorage.clear()")
    window.logs()
    window.open(f"{server}/").wait("return document.querySelector('#model').value")
    yield window
    assert window.logs() == []


def stats(server: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{server}/stats", trust_env=False).json()
    return answer


def choose(page: Browser, **settings: object) -> None:
    """Type settings into their fields."""
    for name, value in settings.items():
        page.script("const f = document.getElementById(arguments[0]); f.focus(); f.select()", f"set-{name}")
        page.type(str(value))
    page.script("document.activeElement.blur()")
    page.type("/")


def ask(page: Browser, question: str) -> str:
    page.type(question, "enter")
    page.wait("return [...document.querySelectorAll('.bubble')].at(-1)?.textContent === arguments[0]", question)
    page.wait(DONE)
    return str(page.script(TEXT))


def test_a_question_typed_is_answered_and_explained(page: Browser, server: str) -> None:
    assert page.text("#model").strip() == page.script("return document.querySelector('#model').value")
    assert "32,768" in page.text("#context")
    choose(page, max_tokens=120, seed=1)
    before = stats(server)["generation_tokens_total"]
    ask(page, "Say something")

    spoken = SPOKEN.search(page.text(".meta"))
    assert spoken is not None, page.text(".meta")
    assert float(spoken[1]) > 0
    assert int(spoken[2]) == 120 == stats(server)["generation_tokens_total"] - before
    assert "cut at the token limit" in page.text(".meta")
    assert page.script("return document.querySelector('#announce').textContent").startswith("Answer: ")

    page.hover(".body .token")
    rows = page.wait("return [...document.querySelectorAll('#popover li')].map((row) => row.innerText)")
    shares = [float(row.splitlines()[-1].strip("<%")) for row in rows]
    assert 5 <= len(rows) <= 6  # the five likeliest, and the chosen one if it is not among them
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) < 100.1
    shown = page.script("return document.querySelector('.token.shown').textContent")
    assert page.text("#popover .chosen code") == shown.replace(" ", "␣").replace("\n", "↵")


def test_every_character_has_its_token(page: Browser) -> None:
    choose(page, max_tokens=80, seed=3, temperature=0.7)
    text = ask(page, "Tokens, please")
    tokens = page.script("return [...document.querySelectorAll('.body .token')].map((span) => span.textContent)")
    labels = page.script("return [...document.querySelectorAll('.body figcaption')].map((label) => label.textContent)")
    said = text
    for label in labels:
        said = said.replace(label, "", 1)
    assert "".join(tokens).replace("\n", "") == said.replace("\n", "")
    assert page.script("return document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1


def test_tokens_are_reached_by_keyboard(page: Browser) -> None:
    choose(page, max_tokens=30, seed=1)
    ask(page, "Hello")
    page.type("shift+tab")
    for _ in range(12):
        if page.script("return document.activeElement.classList.contains('token')"):
            break
        page.type("shift+tab")
    first = page.text("#popover")
    assert first
    page.type("right")
    assert page.script("return document.activeElement === document.querySelectorAll('.token')[1]")
    assert page.text("#popover") not in ("", first)
    page.type("escape")
    assert page.script("return document.querySelector('#popover').hidden")
    page.type("/")
    assert page.script("return document.activeElement.id") == "prompt"


def test_the_live_view_moves_and_escape_stops(page: Browser, server: str) -> None:
    page.wait("return document.querySelector('#live-state').textContent === 'live'")
    page.type("A very long story", "enter")
    page.wait("return document.querySelectorAll('.body .token').length > 10")
    page.wait("return document.querySelector('.figures dd').textContent === '1'")
    page.wait("return Number(document.querySelector('.meter').style.getPropertyValue('--share')) > 0")
    page.wait("return document.querySelector('.requests [data-state=running]')")
    page.wait("return Number(document.querySelector('.speed .value').textContent) > 0")
    assert page.script("return document.querySelector('.spark polyline').getAttribute('points')")
    assert not page.script(DONE), "the answer was to be long: it ended before it could be stopped"

    page.type("escape")
    page.wait(DONE, seconds=5)
    kept = page.script(TEXT)
    assert kept
    assert "stopped" in page.text(".meta")
    page.wait("return document.querySelector('.figures dd').textContent === '0'")
    assert stats(server)["running"] == 0
    assert page.script(TEXT) == kept
    assert page.script("return document.activeElement.id") == "prompt"


def test_settings_are_sent_and_remembered(page: Browser, server: str) -> None:
    choose(page, max_tokens=20, temperature=0.9, seed=7, system="Be brief")
    first = ask(page, "Repeat yourself")
    page.open(f"{server}/").wait("return document.querySelector('#model').value")
    assert page.script("return document.querySelector('#set-temperature').value") == "0.9"
    assert page.script("return document.querySelector('#set-system').value") == "Be brief"
    assert ask(page, "Repeat yourself") == first, "the same seed and question give the same answer"
    choose(page, seed=8)
    assert page.script("return document.activeElement.id") == "prompt"
    page.script("document.querySelector('.foot .tools button:last-child').click()")
    page.wait(DONE)
    assert page.script(TEXT) != first

    choose(page, temperature=3)
    page.type("Not to be sent", "enter")
    assert "from 0 to 2" in page.text("#notice")
    assert page.script("return document.activeElement.id") == "set-temperature"
    assert page.script("return document.querySelectorAll('.turn').length") == 1


def test_a_conversation_is_edited_cleared_and_brought_back(page: Browser) -> None:
    choose(page, max_tokens=12, seed=1)
    ask(page, "One")
    ask(page, "Two")
    page.script("document.querySelector('.turn .question .tools button:last-child').click()")
    page.type("!", "enter")
    page.wait("return document.querySelector('.bubble').textContent === 'One!'")
    page.wait(DONE)
    assert page.script("return document.querySelectorAll('.turn').length") == 1
    page.script("document.querySelector('#clear').click()")
    assert page.script("return document.querySelectorAll('.turn').length") == 0
    page.script("document.querySelector('#notice button').click()")
    assert page.script("return document.querySelector('.bubble').textContent") == "One!"
    page.type("First line", "shift+enter", "second line", "enter")
    page.wait("return [...document.querySelectorAll('.bubble')].at(-1).textContent === 'First line\\nsecond line'")
    page.wait(DONE)


def test_what_the_server_refuses_is_said_in_words(page: Browser) -> None:
    choose(page, max_tokens=8)
    page.script("document.querySelector('#prompt').value = 'far too long '.repeat(3000)")
    page.type("enter")
    page.wait("return !document.querySelector('#notice').hidden")
    assert "no longer fits the model" in page.text("#notice")
    assert "No answer." in page.text(".body")
    assert all("status of 400" in line for line in page.logs())
    assert ask(page, "Short")  # what got no answer is not told again
    assert page.script("return document.querySelector('#notice').hidden")


def test_the_theme_follows_the_system_and_the_button(page: Browser) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    colours = []
    for scheme in ("light", "dark"):
        page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(page.script(paper))
    assert colours[0] != colours[1]
    page.script("document.querySelector('#theme').click()")  # light, whatever the system says
    assert page.script(paper) == colours[0]
    page.devtools("Emulation.setEmulatedMedia", features=[])


def test_a_narrow_window_keeps_everything_in_reach(page: Browser) -> None:
    page.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        page.wait("return !document.body.classList.contains('panel-open')")
        assert page.script("return document.documentElement.scrollWidth") <= 360
        page.script("document.querySelector('#panel-toggle').focus()")
        page.type("enter")
        page.wait("return document.activeElement.id === 'panel-close'")
        page.type("escape")
        assert page.script("return document.activeElement.id") == "panel-toggle"
        assert page.script("return document.querySelector('#panel').inert")
    finally:
        page.devtools("Emulation.clearDeviceMetricsOverride")


def test_another_origin_can_neither_read_nor_ask(page: Browser, server: str) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    attempt = """
    const [server] = arguments;
    const body = JSON.stringify({ messages: [{ role: "user", content: "hi" }], max_tokens: 4 });
    const json = { "Content-Type": "application/json" };
    const tries = [
      ["/stats", {}],
      ["/v1/models", { credentials: "include" }],
      ["/v1/chat/completions", { method: "POST", body }],
      ["/v1/chat/completions", { method: "POST", body, headers: json }],
      ["/v1/chat/completions", { method: "POST", body, mode: "no-cors" }],
    ];
    return Promise.all(tries.map(([path, options]) =>
      fetch(server + path, options).then((answer) => answer.type === "opaque" ? "opaque" : "read", () => "refused")));
    """
    before = stats(server)
    assert before["running"] == 0
    other = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        page.open(f"http://127.0.0.1:{other.server_port}/")
        assert set(page.script(attempt, server)) <= {"refused", "opaque"}
    finally:
        other.shutdown()
        other.server_close()
    after = stats(server)
    assert after["prompt_tokens_total"] == before["prompt_tokens_total"]
    assert after["generation_tokens_total"] == before["generation_tokens_total"]
    assert any("CORS policy" in line for line in page.logs())


def test_a_key_is_asked_for_kept_and_sent(window: Browser, model: Path) -> None:
    with serving(model, "--num-blocks", "64", "--api-keys", KEY) as url:
        assert httpx.get(f"{url}/stats", trust_env=False).status_code == 401
        window.open(f"{url.replace('://', f'://me:{KEY}@')}/").logs()  # as if the browser's own question was answered
        window.open(f"{url}/")
        window.wait("return document.querySelector('#live-state').textContent === 'live'")
        window.script("sessionStorage.setItem('twofold.key', 'the-wrong-one')")
        window.type("Hello", "enter")
        window.wait("return document.querySelector('#key-dialog').open")
        window.type(KEY, "enter")
        window.wait("return document.querySelectorAll('.body .token').length > 0")
        window.type("escape")
        window.wait(DONE)
        assert window.script("return sessionStorage.getItem('twofold.key')") == KEY
        assert window.script("return Object.values(localStorage).join()").find(KEY) < 0
        assert {line for line in window.logs() if "status of 401" not in line} == set()
