"""The training page in a headless Chromium, against the real server and logs that grow while it looks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, missing
from test_page import serving
from tiny_model import tiny_model

pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs Debian's packages: {' '.join(missing)}")

KEY = "open-sesame"
PROMPT = "def <b>add</b>(a, b):"
EVALUATION = {
    "task": "tests",
    "prompts": 40,
    "samples": 8,
    "settings": {"temperature": 1.0},
    "greedy": {"value": 0.375, "low": 0.24, "high": 0.53},
    "pass@k": {"8": {"value": 0.6, "low": 0.45, "high": 0.75}},
    "reward": {"sampled": {"value": -1.5, "low": -2.0, "high": 0.0}},
}
READINGS = "return [...document.querySelectorAll('.tall .reading b')].map((node) => node.textContent)"
TITLES = "return [...document.querySelectorAll('.chart:not([hidden]) h3')].map((node) => node.textContent)"
STEP = "return document.querySelector('.tall .cursor text').textContent"
EVENTS = "return [...document.querySelectorAll('.event')].map((node) => node.innerText.replaceAll('\\n', ' '))"


def log(first: int, last: int, *, floor: float = 2.0, at: float | None = None) -> str:
    """Rows of steps `first` to `last`, a second apart and the last at `at`: losses fall to `floor`."""
    rows: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        when = (at or time.time()) - (last - step)
        if step == 30:
            rows.append({"step": step, "skipped": "the gradient is not finite (batch 29)", "time": when})
            continue
        loss = floor + 80.0 / (step + 10) + (9.0 if step == 50 else 0.0)
        row = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1 + 1 / step, "tokens": 512 * step}
        rows.append(row | {"tokens_per_second": 9000.0, "balance": 0.5, "time": when})
        if step % 20 == 0:
            rows.append({"step": step, "valid_loss": loss + 0.25, "time": when})
            rows.append({"step": step, "prompt": PROMPT, "text": f"return {step}", "time": when})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watched") / "runs"
    for name, last in (("first", 80), ("deep/second", 60)):
        (root / name).mkdir(parents=True)
        (root / name / "log.jsonl").write_text(log(1, last, at=time.time() - 1000 * (name != "first")))
    checkpoint = root / "first" / "checkpoints" / "step-00000080"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.json").write_text(json.dumps({"recipe": {"schedule.steps": 200}}))
    (root / "first" / "evaluation.json").write_text(json.dumps({"evaluations": [EVALUATION]}))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(model: Path, runs: Path) -> Iterator[str]:
    with serving(model, "--num-blocks", "64", "--runs", str(runs)) as url:
        yield url


@pytest.fixture
def page(window: Browser, server: str) -> Iterator[Browser]:
    window.open(f"{server}/livez").script("localStorage.clear(); sessionStorage.clear()")
    window.logs()
    window.open(f"{server}/train#first").wait("return document.querySelector('.tall .line path')")
    yield window
    assert window.logs() == []


def test_a_run_is_shown_in_curves_samples_and_events(page: Browser) -> None:
    assert "running" in page.text(".summary")
    assert "80 / 200" in page.text(".summary")
    assert page.script(TITLES) == ["Loss", "Gradient norm", "Learning rate", "Tokens per second", "balance"]
    assert page.script("return document.querySelectorAll('.tall .line').length") == 2  # training and validation
    assert page.script("return document.querySelectorAll('.tall .mark').length") == 2  # the skipped step, the spike
    cards = page.script("return [...document.querySelectorAll('.strip li')].map((card) => card.innerText)")
    assert [card.split() for card in cards] == [["step", str(s), "return", str(s)] for s in (20, 40, 60, 80)]
    assert page.text(".prompt h3") == PROMPT  # text, and no markup
    events = page.script(EVENTS)
    assert any(event.startswith("step 30 skipped: the gradient is not finite (batch 29)") for event in events)
    assert any(event.startswith("step 50 loss 12.333 where") for event in events)
    assert any(event.startswith("step 80 checkpoint") for event in events)
    assert sum("the best so far" in event for event in events) == 3


def test_events_are_taken_away_by_their_kind(page: Browser) -> None:
    assert any("validation" in event for event in page.script(EVENTS))
    page.script("document.querySelector('.chip[data-kind=valid]').focus()")
    page.type("enter")
    assert not any("validation" in event for event in page.script(EVENTS))
    assert page.script("return document.activeElement.dataset.kind") == "valid"
    page.type("enter")
    assert any("validation" in event for event in page.script(EVENTS))


def test_the_pointer_and_the_keys_read_values(page: Browser) -> None:
    page.script("const s = document.querySelector('#smooth'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert page.text("#smooth-now") == "off"
    assert page.script("return document.querySelectorAll('.faint').length") == 0
    last = page.script(READINGS)
    assert last == [f"{2 + 80 / 90:.4f}", f"{2.25 + 80 / 90:.4f}"]
    page.hover(".tall .picture")
    page.wait("return document.querySelectorAll('.cursor text').length === 5")  # every chart is read at the same step
    middle = int(page.script(STEP))
    assert 30 < middle < 50
    assert page.script(READINGS)[0] == f"{2 + 80 / (middle + 10):.4f}"
    page.script("document.querySelector('.tall .picture').focus()")
    page.type("right")
    assert int(page.script(STEP)) == middle + 1
    page.type("escape")
    assert page.script(READINGS) == last


def test_smoothing_axis_and_scale_are_remembered(page: Browser, server: str) -> None:
    before = page.script("return document.querySelector('.tall .line path:last-of-type').getAttribute('d')")
    page.script("document.querySelector('#log').click()")
    page.script("const a = document.querySelector('#axis'); a.value = 'tokens'; a.dispatchEvent(new Event('change'))")
    after = page.script("return document.querySelector('.tall .line path:last-of-type').getAttribute('d')")
    assert after != before
    page.open(f"{server}/livez").open(f"{server}/train#first").wait("return document.querySelector('.tall .line path')")
    assert page.script("return document.querySelector('#log').checked")
    assert page.script("return document.querySelector('#axis').value") == "tokens"
    assert "40k" in page.script("return document.querySelector('.tall .picture').textContent")


def test_runs_are_compared(page: Browser, server: str) -> None:
    names = page.script("return [...document.querySelectorAll('.run b')].map((node) => node.textContent)")
    assert names == ["first", "deep/second"]  # the newest first
    page.script("document.querySelector('.run[data-name=\"deep/second\"] input').click()")
    page.wait("return document.querySelectorAll('.tall .line').length === 4")
    names = page.script("return [...document.querySelectorAll('.tall .reading small')].map((node) => node.textContent)")
    assert names == ["first · training", "first · validation", "deep/second · training", "deep/second · validation"]
    assert "stopped" in page.text(".summary:nth-child(2)")
    strips = page.script("return [...document.querySelectorAll('.named p')].map((node) => node.textContent)")
    assert strips == ["first", "deep/second"]
    assert page.script("return location.hash") == "#first&deep%2Fsecond"
    page.script("document.querySelector('.run[data-name=\"deep/second\"] button').click()")  # alone
    page.wait("return document.querySelectorAll('.tall .line').length === 2")
    assert page.text(".summary h2") == "deep/second"


def test_evaluations_are_shown_with_their_intervals(page: Browser) -> None:
    page.script("document.querySelector('.run[data-name=\"first\"] button').click()")  # alone
    page.wait("return document.querySelector('.measures tbody')")
    cells = "[...row.cells].map((cell) => cell.textContent)"
    assert page.script(f"return [...document.querySelectorAll('.measures tbody tr')].map((row) => {cells})") == [
        ["greedy", "", "37.5%", "24% to 53%"],
        ["pass@8", "", "60%", "45% to 75%"],
        ["reward, sampled", "", "-1.5", "-2 to 0"],
    ]
    assert page.text(".task h3") == "tests"
    assert page.text(".measures caption") == "40 prompts, 8 samples each at temperature 1"
    width = (
        "const [track] = document.querySelectorAll('.track'); const band = getComputedStyle(track, '::before').width;"
    )
    assert page.script(f"{width} return parseFloat(band) / track.clientWidth") == pytest.approx(0.29, abs=0.01)
    assert page.script("return document.querySelectorAll('.track')[2].hidden")


def test_what_is_written_appears_and_what_is_cut_off_goes(page: Browser, runs: Path) -> None:
    path = runs / "first" / "log.jsonl"
    with path.open("a") as file:
        file.write(log(81, 90))
    page.wait("return document.querySelector('.facts dd').textContent === '90 / 200'", seconds=10)
    page.wait("return document.querySelector('.tall .picture').textContent.includes('80')")
    fresh = path.with_suffix(".tmp")
    fresh.write_text(log(1, 40))
    os.replace(fresh, path)
    page.wait("return document.querySelector('.facts dd').textContent === '40 / 200'", seconds=10)
    page.wait("return document.querySelectorAll('.strip li').length === 2")
    assert not any(event.startswith("step 50") for event in page.script(EVENTS))


def test_a_narrow_window_keeps_everything_in_reach(page: Browser) -> None:
    page.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        page.wait("return document.querySelector('.tall .picture').clientWidth < 350")
        assert page.script("return document.documentElement.scrollWidth") <= 360
        assert page.script("return document.querySelector('#main').scrollWidth") <= 360
    finally:
        page.devtools("Emulation.clearDeviceMetricsOverride")


def test_chat_and_training_lead_to_each_other(page: Browser, server: str) -> None:
    page.script("document.querySelector('a[href=\"/\"]').click()")
    page.wait("return document.querySelector('#model')?.value")
    page.script("document.querySelector('a[href=\"/train\"]').click()")
    page.wait("return document.querySelector('.tall .line path')")


def test_a_server_without_runs_says_where_it_looks_and_asks_for_its_key(
    window: Browser, model: Path, tmp_path: Path
) -> None:
    with serving(model, "--num-blocks", "64", "--api-keys", KEY, "--runs", str(tmp_path / "none")) as url:
        window.open(f"{url.replace('://', f'://me:{KEY}@')}/train").logs()  # the browser's own question, answered
        window.open(f"{url}/train")
        window.wait("return !document.querySelector('#none').hidden")
        assert str(tmp_path / "none") in window.text("#none")
        window.script("sessionStorage.setItem('twofold.key', 'the-wrong-one')")
        window.wait("return document.querySelector('#key-dialog').open", seconds=10)
        window.type(KEY, "enter")
        window.wait("return document.querySelector('#live-state').textContent === 'live'")
        assert {line for line in window.logs() if "status of 401" not in line} == set()
