"""The training page of alignment runs in a headless Chromium: what is charted, and the rollouts side by side."""

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

PROMPT = "def <b>add</b>(a, b):"
MARKUP = "<img src=x onerror=\"document.title = 'taken'\">"
LONG = "\n".join(f"line {n}" for n in range(1, 41))
GROUP = 8
TITLES = "return [...document.querySelectorAll('.chart:not([hidden]) h3')].map((node) => node.textContent)"
GROUPS = "return [...document.querySelectorAll('.group-title')].map((node) => node.textContent)"
CARDS = "return [...document.querySelectorAll('.group:nth-child(2) .answer')].map((card) => card.innerText)"
READING = """
const [title] = arguments;
const titled = (one) => one.querySelector("h3").textContent === title;
const chart = [...document.querySelectorAll(".chart")].find(titled);
return [...chart.querySelectorAll(".readout :is(small, b, i)")].map((node) => node.textContent).join(" ");
"""
WHEN = "return document.querySelector('.when').textContent"


def answers(step: int) -> list[dict[str, Any]]:
    """Two groups of answers: of the second, the n-th has a reward of n eighths, and the first one is long."""
    found = []
    for group, prompt in enumerate(("the same\n\nover and over", PROMPT)):
        for n in range(GROUP):
            reward = n / GROUP if group else None
            text = LONG if n == 0 else f"{MARKUP} step {step}, answer {n}"
            parts = {"parses": reward, "<i>short</i>": 1.0}
            finish, lean = ("length" if n == 0 else "stop"), (n - 4) / 4 if group else 0.0
            told = {"prompt": prompt, "text": text, "group": group, "reward": reward, "parts": parts}
            found.append(told | {"advantage": lean, "finish": finish, "tokens": 10 + n})
    return found


def played(first: int, last: int) -> str:
    """Rows of a GRPO run, on-policy, whose reward function failed at step 12."""
    rows: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        when = time.time() - (last - step)
        rows.append({"step": step, "rollouts": answers(step), "time": when})
        reward = {"reward": step / 100, "reward_std": 0.25, "rewards.parses": 0.5, "rewards.short": 0.25}
        policy = {"kl": 0.0, "mismatch": 0.0, "equal": 1.0, "ref_kl": 0.01, "entropy": 1.5, "clipped": 0.125}
        shape = {"length": 14.5, "truncated": 0.125, "faults.parses": 3.0 if step == 12 else 0.0, "odd_one": 7.0}
        rows.append({"step": step, "loss": 0.5, "lr": 1e-4, **reward, **policy, **shape, "time": when})
        if step % 10 == 0:
            held = {"reward": step / 50, "reward_std": 0.1, "low": step / 60, "high": step / 40, "length": 12.0}
            rows.append({"step": step, "eval": held, "time": when})
    return "".join(json.dumps(row) + "\n" for row in rows)


def preferred(last: int) -> str:
    rows: list[dict[str, Any]] = []
    for step in range(1, last + 1):
        figures = {"accuracy": 0.5 + step / 100, "margin": step / 10, "chosen": step / 20, "rejected": -step / 20}
        rows.append({"step": step, "loss": 0.7, **figures, "time": time.time() - 900})
        if step == last:
            held = figures | {"loss": 0.6, "low": 0.5, "high": 0.875, "pairs": 21.0}
            rows.append({"step": step, "eval": held, "valid_loss": 0.6, "time": time.time() - 900})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("aligned") / "runs"
    plain = "".join(json.dumps({"step": n, "loss": 1 / n, "lr": 1e-3, "time": 1e9 + n}) + "\n" for n in range(1, 9))
    for name, text in (("grpo", played(1, 20)), ("dpo", preferred(10)), ("plain", plain)):
        (root / name).mkdir(parents=True)
        (root / name / "log.jsonl").write_text(text)
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Iterator[str]:
    with serving(tiny_model(tmp_path_factory.mktemp("tiny")), "--num-blocks", "64", "--runs", str(runs)) as url:
        yield url


@pytest.fixture
def page(window: Browser, server: str, runs: Path) -> Iterator[Browser]:
    """The run of rollouts as it was written at first."""
    (runs / "grpo" / "fresh").write_text(played(1, 20))
    os.replace(runs / "grpo" / "fresh", runs / "grpo" / "log.jsonl")
    window.open(f"{server}/livez").script("localStorage.clear(); sessionStorage.clear()")
    window.logs()
    window.open(f"{server}/train#grpo").wait("return document.querySelectorAll('.group').length === 2")
    yield window
    assert window.logs() == []


def reading(page: Browser, title: str) -> str:
    return str(page.script(READING, title))


def test_a_run_of_rollouts_is_charted_by_what_it_is_about(page: Browser) -> None:
    assert page.script(GROUPS) == ["Rewards", "Policy", "Answers", "Training"]
    assert page.script(TITLES) == [
        *("Reward", "Reward: parses", "Reward: short", "Faults of reward functions"),
        *("KL, rollout against trainer", "KL against the reference", "Entropy", "Clipped share"),
        *("Length in tokens", "Share cut off at the limit"),
        *("Loss", "Learning rate", "odd one"),
    ]  # no charts of the mismatch, which was never one
    assert page.text(".tall h3") == "Reward"
    assert page.script("return document.querySelectorAll('.tall .band').length") == 1
    assert page.script("return document.querySelectorAll('.tall .interval').length") == 2
    assert reading(page, "KL, rollout against trainer") == "0.0 exactly"
    assert reading(page, "Reward").endswith("held out 0.4 0.333 to 0.5")
    summary = page.text(".facts").replace("\n", " ")
    assert "Held-out reward 0.4" in summary and "KL to the trainer 0.0 exactly" in summary
    assert "Faults of rewards 3" in summary
    events = page.script("return [...document.querySelectorAll('.event span')].map((node) => node.textContent)")
    assert "the reward parses failed for 3 answers" in events
    assert "held-out reward 0.4, the best so far" in events


def test_the_band_is_as_wide_as_the_spread(page: Browser) -> None:
    page.script("const s = document.querySelector('#smooth'); s.value = 0; s.dispatchEvent(new Event('input'))")
    line = page.script("return document.querySelector('.tall .line path:not(.band)').getAttribute('d')")
    band = page.script("return document.querySelector('.tall .band').getAttribute('d')").strip("MZ").split("L")
    middle = [float(point.split()[1]) for point in line.strip("M").split("L")]
    low, high = [float(point.split()[1]) for point in band[:20]], [float(point.split()[1]) for point in band[20:]]
    below, above = low[0] - middle[0], middle[-1] - high[0]
    assert below == pytest.approx(above, abs=0.2)
    assert below == pytest.approx((middle[0] - middle[-1]) * 0.25 / 0.19, rel=0.02)  # rewards rise by 0.19


def test_a_run_of_preferences_has_its_own_charts(page: Browser) -> None:
    page.script("document.querySelector('.run[data-name=dpo] button').click()")
    page.wait("return document.querySelector('.tall h3')?.textContent === 'Accuracy'")
    assert page.script(GROUPS) == ["Preferences", "Training"]
    assert page.script(TITLES) == ["Accuracy", "Margin", "Chosen and rejected", "Loss"]
    assert reading(page, "Accuracy").endswith("held out 60% 50% to 87.5%")
    words = reading(page, "Chosen and rejected")
    assert [words.count(name) for name in ("chosen", "rejected", "held out")] == [2, 2, 2]
    assert "Held-out accuracy 60%" in page.text(".facts").replace("\n", " ")
    assert page.script("return document.querySelector('#rollouts-part').hidden")


def test_a_plain_run_has_nothing_of_this(page: Browser) -> None:
    page.script("document.querySelector('.run[data-name=plain] button').click()")
    page.wait("return document.querySelector('.tall h3')?.textContent === 'Loss'")
    assert page.script(TITLES) == ["Loss", "Learning rate"]
    assert page.script("return document.querySelectorAll('.group-title').length") == 0
    assert page.script(
        "return document.querySelector('#rollouts-part').hidden && document.querySelector('#jumps').hidden"
    )


def test_answers_stand_side_by_side_with_what_they_were_worth(page: Browser) -> None:
    assert page.script(WHEN) == "step 20 of 20"
    prompts = page.script("return [...document.querySelectorAll('.group .prompt')].map((node) => node.innerText)")
    assert prompts == ["the same\n\nover and over", PROMPT]  # each once, and no markup
    cards = [" ".join(card.split()) for card in page.script(CARDS)]
    assert len(cards) == GROUP
    worth, ended = "reward 0.875 ▲ advantage +0.75", "17 tokens, ended by itself"
    assert cards[7] == f"{worth} {MARKUP} step 20, answer 7 parses 0.875 <i>short</i> 1 {ended}"
    assert "● advantage 0" in cards[4]
    assert cards[0].startswith("reward 0 ▼ advantage −1 line 1") and cards[0].endswith(
        "10 tokens, cut off at the limit"
    )
    places = page.script("return [...document.querySelectorAll('.group:nth-child(2) .answer')].map((c) => c.offsetTop)")
    assert len(set(places)) < GROUP  # side by side
    assert page.script("return [document.querySelectorAll('#rollouts img').length, document.title]")[0] == 0
    assert page.script("return document.title") != "taken"
    assert "no reward" in page.text(".group .answer") and "parses none" in page.text(".group .answer").replace(
        "\n", " "
    )
    page.script("const o = document.querySelector('#rollouts-controls label:last-child select'); o.value = 'best'; "
                "o.dispatchEvent(new Event('change'))")  # fmt: skip
    page.wait("return document.querySelector('.group:nth-child(2) .answer b').textContent === '0.875'")


def test_the_keyboard_goes_back_and_forth_and_the_newest_is_followed(page: Browser, runs: Path) -> None:
    page.script("document.querySelector('#rollouts-controls input[type=range]').focus()")
    page.type("left", "left")
    page.wait("return document.querySelector('.group:nth-child(2) .answer:last-child pre').textContent.includes('18')")
    assert page.script(WHEN) == "step 18 of 20"
    with (runs / "grpo" / "log.jsonl").open("a") as file:
        file.write(played(21, 22))
    page.wait(f"{WHEN} === 'step 18 of 22'", seconds=10)  # who went back stays there
    page.type("right", "right", "right", "right")
    page.wait("return document.querySelector('.group:nth-child(2) .answer:last-child pre').textContent.includes('22')")
    with (runs / "grpo" / "log.jsonl").open("a") as file:
        file.write(played(23, 23))
    page.wait(f"{WHEN} === 'step 23 of 23'", seconds=10)
    (runs / "grpo" / "fresh").write_text(played(1, 5))
    os.replace(runs / "grpo" / "fresh", runs / "grpo" / "log.jsonl")
    page.wait(f"{WHEN} === 'step 5 of 5'", seconds=10)


def test_a_long_answer_is_folded_and_stays_while_it_is_read(page: Browser, runs: Path) -> None:
    fold = ".group:nth-child(2) .fold"
    assert "line 12" in page.text(".group:nth-child(2) .answer") and "line 13" not in page.text(
        ".group:nth-child(2) .answer"
    )
    assert page.text(fold) == "Show all 40 lines"
    page.script("document.querySelector(arguments[0]).focus({ preventScroll: true })", fold)
    page.type("enter")
    assert "line 40" in page.text(".group:nth-child(2) .answer")
    with (runs / "grpo" / "log.jsonl").open("a") as file:
        file.write(played(21, 21))
    page.wait(f"{WHEN} === 'step 20 of 21'", seconds=10)
    assert page.script("return document.activeElement.matches(arguments[0])", fold)
    page.type("enter")
    page.script("document.activeElement.blur()")
    page.wait(f"{WHEN} === 'step 21 of 21'", seconds=10)


def test_sixteen_answers_fit_a_narrow_window(page: Browser) -> None:
    page.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        page.wait("return document.querySelector('.tall .picture').clientWidth < 350")
        assert page.script("return document.querySelectorAll('.answer').length") == 16
        assert page.script("return document.documentElement.scrollWidth") <= 360
        assert page.script("return document.querySelector('#main').scrollWidth") <= 360
    finally:
        page.devtools("Emulation.clearDeviceMetricsOverride")


def test_texts_travel_with_the_step_that_is_looked_at_alone(page: Browser) -> None:
    asked = page.script(
        "return performance.getEntriesByType('resource').map((entry) => [entry.name, entry.decodedBodySize])"
        ".filter(([name]) => name.includes('/runs/grpo?'))"
    )
    rows = [size for name, size in asked if "from=" in name]
    texts = [size for name, size in asked if "row=" in name]
    assert len(texts) == 1 and rows[0] < 20 * 600
