"""The learning rate over a run."""

import math
from itertools import pairwise

import pytest

from twofold.core import ConfigError
from twofold.train.config import ScheduleConfig
from twofold.train.schedule import lr_at


def test_the_rate_climbs_a_line_peaks_and_ends_at_the_floor() -> None:
    config = ScheduleConfig(steps=110, warmup=10, min_ratio=0.1)
    rates = [lr_at(step, 2.0, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    middle = 10 + 99 / 2
    half = 0.5 * (lr_at(math.floor(middle), 2.0, config) + lr_at(math.ceil(middle), 2.0, config))
    assert half == pytest.approx(2.0 * (0.1 + 0.9 * 0.5), rel=1e-3)


def test_one_step_and_all_warm_up_have_a_rate() -> None:
    assert lr_at(0, 1.0, ScheduleConfig(steps=1)) == 1.0
    assert lr_at(3, 1.0, ScheduleConfig(steps=4, warmup=4)) == 1.0


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup must be from 0 to steps \(5\), not 6"):
        ScheduleConfig(steps=5, warmup=6)
