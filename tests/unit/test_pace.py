"""How long guesses are: from what was right, and from what a longer step costs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.engine.pace import PROBE, Cost, Pace, Rates

EIGHT = tuple(range(8))


def paced(seconds, *, right=0.8, sizes=(1, 2, 4, 8, 16, 64, 128, 256)):
    """A pace that has seen steps of some sizes, and guesses of every grade right so often."""
    pace = Pace()
    for _ in range(40):
        for size in sizes:
            pace.cost.saw(size, seconds(size))
        for grade in range(8):
            for _ in range(10):
                pace._all.saw(grade, True)
            for _ in range(round(10 / right) - 10):
                pace._all.saw(grade, False)
    return pace


def test_rows_learn_from_their_own_tries_and_start_from_everybodys():
    everybody = Rates(0.99)
    for _ in range(100):
        everybody.saw(3, True)
    mine = Rates(0.9, everybody)
    assert mine.rate(3) > 0.95 and 0.5 < mine.rate(4) < 0.7
    for _ in range(6):
        mine.saw(3, False)
    assert mine.rate(3) < 0.4 < 0.8 < everybody.rate(3)
    assert mine.chances((4, 4, 4)) == pytest.approx([mine.rate(4) ** n for n in (1, 2, 3)])
    assert len(mine.chances((3,) * 20)) < 20, "what has hardly a chance is not looked at"


def test_cost_is_the_line_of_late():
    cost = Cost()
    assert cost.of(5) == 1.0
    cost.saw(1, 10.0)
    assert cost.of(1) == 10.0 and cost.of(2) == 12.5, "a guess, until it is known"
    for _ in range(200):
        for size in (1, 9, 5):
            cost.saw(size, 10.0 + size)
    assert [cost.of(size) for size in (1, 5, 9, 20)] == pytest.approx([11.0, 15.0, 19.0, 30.0], rel=0.03)
    cost.saw(9, 1e9)
    assert cost.of(9) < 21.0, "one slow step says little"
    for _ in range(200):
        for size in (1, 9, 5):
            cost.saw(size, 4.0 + 3.0 * size)
    assert [cost.of(size) for size in (1, 5, 9)] == pytest.approx([7.0, 19.0, 31.0], rel=0.05)


def test_noise_does_not_hide_the_slope():
    rng, cost = random.Random(1), Cost()
    for _ in range(400):
        size = rng.choice((1, 2, 4, 6))
        cost.saw(size, (1.0 + 0.1 * size) * (1.0 + rng.random() ** 4))
    assert 0.04 < cost.line()[2] / cost.of(1) < 0.2


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 600), st.floats(1e-9, 1e3)), min_size=1, max_size=60), st.integers(1, 700))
def test_no_noise_makes_a_step_free(steps, base):
    cost = Cost()
    for size, seconds in steps:
        cost.saw(size, seconds)
    assert cost.of(base) > 0.0 and cost.line()[2] >= 0.0, "it is divided by"


def test_cheap_tokens_are_guessed_at_and_dear_ones_are_not():
    bound_by_memory = paced(lambda size: 1.0 + 0.02 * size)
    assert bound_by_memory.lengths([(1, EIGHT)], 1, 100, drawing=1)[0] >= 6
    bound_by_arithmetic = paced(lambda size: 1.0 * size)
    assert bound_by_arithmetic.lengths([(1, EIGHT)], 1, 100, drawing=1) == [0]


def test_a_busy_machine_stops_guessing_before_an_idle_one():
    """The step costs a fixed part and a part by the token: with many rows the fixed part is shared already."""
    pace = paced(lambda size: 1.0 + 0.25 * size)
    assert pace.lengths([(1, EIGHT)], 1, 1000, drawing=1)[0] >= 2
    assert sum(pace.lengths([(row, EIGHT) for row in range(200)], 200, 1000, drawing=200)) == 0


def test_the_likelier_row_gets_the_longer_guess():
    pace = paced(lambda size: 1.0 + 0.15 * size)
    for _ in range(20):
        for grade in range(8):
            pace.rates(1).saw(grade, True)
            pace.rates(2).saw(grade, False)
    good, bad = pace.lengths([(1, EIGHT), (2, EIGHT)], 2, 100, drawing=2)
    assert good >= 5 and bad == 0
    pace.forget(2)
    assert pace.lengths([(1, EIGHT), (2, EIGHT)], 2, 100, drawing=2)[1] > 0, "another request is not held to it"


def test_room_is_kept_and_fixed_lengths_are_sent_whole():
    pace = paced(lambda size: 1.0 + 0.001 * size)
    assert sum(pace.lengths([(1, EIGHT), (2, EIGHT)], 2, 5, drawing=2)) == 5
    assert Pace(adaptive=False).lengths([(1, EIGHT), (2, (0,)), (3, EIGHT)], 3, 11, drawing=3) == [8, 1, 2]


def test_what_does_not_pay_is_tried_again_now_and_then():
    pace = paced(lambda size: 1.0 * size)
    sent = [sum(pace.lengths([(1, EIGHT), (2, EIGHT)], 2, 100, drawing=2)) for _ in range(2 * PROBE)]
    assert sorted(sent) == [0] * (2 * PROBE - 2) + [2, 2]


def test_a_proposers_own_passes_count():
    pace = paced(lambda size: 1.0 + 0.02 * size)
    before = pace.lengths([(1, EIGHT)], 1, 100, drawing=1)[0]
    pace.per_pass = 0.4
    assert 0 < pace.lengths([(1, EIGHT)], 1, 100, drawing=1)[0] < before
    pace.per_pass = 3.0
    assert pace.lengths([(1, EIGHT)], 1, 100, drawing=1) == [0]
