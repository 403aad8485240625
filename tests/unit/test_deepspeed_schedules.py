"""DeepSpeed's learning rates against their closed forms, and at work on an optimizer's groups."""

from __future__ import annotations

import math
from typing import Any

import pytest

from twofold.core import ConfigError
from twofold.train.deepspeed.schedules import SCHEDULES, Scheduler, schedule_of


def rates(kind: str, steps: int, base: float = 0.5, **params: Any) -> list[float]:
    """The rates of the first steps, the one before any `step()` first."""
    groups = [{"lr": base}]
    scheduler = Scheduler(groups, schedule_of(kind, params))
    found = [groups[0]["lr"]]
    for _ in range(steps):
        scheduler.step()
        found.append(groups[0]["lr"])
    return found


def test_range_test() -> None:
    found = rates("LRRangeTest", 6, lr_range_test_min_lr=0.1, lr_range_test_step_size=2, lr_range_test_step_rate=3.0)
    assert found == pytest.approx([0.1] + [0.1 * (1 + 3 * (n + 1) / 2) for n in range(6)])
    stairs = rates("LRRangeTest", 6, lr_range_test_min_lr=0.1, lr_range_test_step_size=2, lr_range_test_staircase=True)
    assert stairs == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4])


@pytest.mark.parametrize("shape", ["log", "linear"])
def test_warmup(shape: str) -> None:
    found = rates("WarmupLR", 8, warmup_min_lr=0.1, warmup_max_lr=0.9, warmup_num_steps=5, warmup_type=shape)
    risen = [math.log(n + 1) / math.log(5) if shape == "log" else n / 5 for n in range(5)] + [1.0] * 3
    assert found == pytest.approx([0.1] + [0.1 + 0.8 * part for part in risen])


def test_warmup_rises_to_the_optimizers_rate_where_nothing_is_said() -> None:
    assert rates("WarmupLR", 5, warmup_num_steps=2)[-1] == 0.5


def test_warmup_and_decay() -> None:
    found = rates("WarmupDecayLR", 13, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear", total_num_steps=10)
    assert found == pytest.approx([0, 0, 0.25, 0.5, 0.75] + [(10 - n) / 6 for n in range(4, 11)] + [0, 0])


def test_warmup_and_cosine() -> None:
    found = rates(
        "WarmupCosineLR", 12, warmup_min_ratio=0.2, warmup_num_steps=2, warmup_type="linear", cos_min_ratio=0.1,
        total_num_steps=10,
    )  # fmt: skip
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * min(1, (n - 1) / 8))) / 2 for n in range(2, 12)]
    assert found == pytest.approx([0.0, 0.5 * 0.2, 0.5 * 0.6] + [0.5 * part for part in cosine])
    assert found[-1] == found[-3] == pytest.approx(0.05)


def test_one_cycle() -> None:
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, "cycle_second_step_size": 2}
    up, down = [0.1, 0.2, 0.3, 0.4, 0.5], [0.3, 0.1]
    assert rates("OneCycle", 6, **params) == pytest.approx(up + down)
    decayed = rates("OneCycle", 10, **params, decay_lr_rate=1.0, decay_step_size=2)
    # the seventh step is still of the cycle, which begins anew; then 0.1 / (1 + steps / 2)
    assert decayed[7:] == pytest.approx([0.1 / (1 + 1 / 2), 0.1 / 2, 0.1 / 2.5, 0.1 / 3])
    stairs = rates("OneCycle", 6, **params, cycle_first_stair_count=2)
    assert stairs == pytest.approx([0.1, 0.1, 0.3, 0.3, 0.5, 0.3, 0.1])


def test_one_cycle_turns_the_momentum_the_other_way() -> None:
    groups: list[dict[str, Any]] = [{"lr": 1.0, "betas": (0.5, 0.5)}, {"lr": 1.0}]
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 2}
    scheduler = Scheduler(groups, schedule_of("OneCycle", params))
    assert groups[0]["betas"] == (0.8, 0.99)
    found = []
    for _ in range(4):
        scheduler.step()
        found.append(groups[0]["betas"][0])
    assert found == pytest.approx([0.85, 0.8, 0.85, 0.9])
    assert "betas" not in groups[1]


def test_a_number_for_each_group() -> None:
    groups = [{"lr": 1.0}, {"lr": 2.0}]
    scheduler = Scheduler(groups, schedule_of("WarmupLR", {"warmup_max_lr": [0.1, 0.2], "warmup_num_steps": 2}))
    scheduler.step(5)
    assert scheduler.get_lr() == scheduler.get_last_lr() == [0.1, 0.2]
    with pytest.raises(ConfigError, match="1 groups"):
        Scheduler(groups, schedule_of("WarmupLR", {"warmup_max_lr": 1.0, "warmup_min_lr": [0.1]}))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_that_goes_on_is_the_one_that_never_stopped(kind: str) -> None:
    params: dict[str, Any] = {"OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 3}}.get(
        kind, {"total_num_steps": 9} if "Decay" in kind or "Cosine" in kind else {}
    )
    first, second = [{"lr": 0.5}], [{"lr": 0.5}]
    one, two = (Scheduler(groups, schedule_of(kind, dict(params))) for groups in (first, second))
    for _ in range(5):
        one.step()
    two.load_state_dict(one.state_dict())
    for _ in range(3):
        assert first == second
        one.step()
        two.step()
