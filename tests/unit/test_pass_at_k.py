"""Estimates and their intervals, against numbers worked by hand and by counting every case."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from twofold.align.estimates import Interval, bootstrap, pass_at_k, share, verdict, wilson


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 2, 3), (6, 0, 2), (6, 6, 1), (7, 3, 5), (8, 1, 8), (1, 1, 1)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_pass(samples: int, passed: int, k: int) -> None:
    answers = [True] * passed + [False] * (samples - passed)
    choices = [any(chosen) for chosen in itertools.combinations(answers, k)]
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(choices) / len(choices), abs=1e-15)


def test_pass_at_k_of_many_samples_stays_exact() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)
    missed = math.prod((190 - i) / (200 - i) for i in range(100))  # a hundred answers, none of the ten among them
    assert pass_at_k(200, 10, 100) == pytest.approx(1 - missed, abs=1e-12)


@pytest.mark.parametrize(("samples", "passed", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_of_what_cannot_be(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(samples, passed, k)


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [(15, 40, 0.2422, 0.5297), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055), (0, 0, 0.0, 1.0)],
)
def test_wilson(passed: int, total: int, low: float, high: float) -> None:
    found = wilson(passed, total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.value == (passed / total if total else 0.0)


def test_wilson_is_narrower_at_a_lower_level() -> None:
    wide, narrow = wilson(30, 100), wilson(30, 100, level=0.5)
    assert wide.low < narrow.low < 0.3 < narrow.high < wide.high


def test_bootstrap_is_the_same_again_and_another_with_another_seed() -> None:
    values = [random.Random(n).random() for n in range(50)]
    assert bootstrap(values, 3) == bootstrap(values, 3) != bootstrap(values, 4)


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    values = [random.Random(n).gauss(1.0, 2.0) for n in range(400)]
    found, mean = bootstrap(values), sum(values) / 400
    deviation = (sum((value - mean) ** 2 for value in values) / 400) ** 0.5
    assert found.value == pytest.approx(mean)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * deviation / 20, rel=0.08)


def test_ninety_five_of_a_hundred_bootstrap_intervals_hold_the_truth() -> None:
    held = 0
    for trial in range(200):
        values = [float(random.Random(1000 * trial + n).random() < 0.3) for n in range(60)]
        found = bootstrap(values, trial, rounds=400)
        held += found.low <= 0.3 <= found.high
    assert 180 <= held <= 198


def test_shares_that_are_all_alike_still_have_an_interval() -> None:
    assert share([0.0] * 20) == wilson(0, 20)
    assert share([1.0] * 20) == wilson(20, 20)
    assert bootstrap([0.0] * 20) == Interval(0.0, 0.0, 0.0)
    assert share([0.0, 0.5, 1.0]) == bootstrap([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


@pytest.mark.parametrize(
    ("interval", "prompts", "said"),
    [
        (Interval(0.2, 0.1, 0.3), 40, "better"),
        (Interval(-0.2, -0.3, -0.1), 40, "worse"),
        (Interval(0.1, -0.1, 0.3), 40, "not shown"),
        (Interval(0.0, 0.0, 0.0), 40, "not shown"),
        (Interval(0.1, 0.0, 0.3), 40, "not shown"),
        (Interval(1.0, 1.0, 1.0), 3, "not shown"),
    ],
)
def test_a_verdict_needs_an_interval_without_nothing_and_enough_prompts(
    interval: Interval, prompts: int, said: str
) -> None:
    assert verdict(interval, prompts) == said
