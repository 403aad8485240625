"""The learning rate over a run, against torch's and transformers' where they have the same."""

import math
from itertools import pairwise

import pytest
import torch
import transformers

from twofold.core import ConfigError
from twofold.train.config import ScheduleConfig
from twofold.train.schedule import lr_at

STEPS, WARMUP = 50, 10


def ours(**settings) -> list[float]:
    config = ScheduleConfig(**{"steps": STEPS, "warmup": WARMUP, "min_ratio": 0.0} | settings)
    return [lr_at(step, 2.0, config) for step in range(config.steps)]


def theirs(make, steps: int = STEPS, **settings) -> list[float]:
    """Rates of steps 0 to `steps` of a schedule that is made around an optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make(optimizer, **settings)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) <= steps - 1 or "total_steps" not in settings:
            schedule.step()
    return rates


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


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_down_to_the_last_step_is_transformers(kind: str) -> None:
    """Theirs begins at nothing and would end one step later: ours begins a step up, and ends at the last one."""
    make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    truth = theirs(make, num_warmup_steps=WARMUP, num_training_steps=STEPS - 1)
    mine = ours(kind=kind)
    assert mine[:WARMUP] == pytest.approx(truth[1 : WARMUP + 1])
    assert mine[WARMUP:] == pytest.approx(truth[WARMUP:STEPS], abs=1e-12)


def test_constant_is_transformers() -> None:
    truth = theirs(transformers.get_constant_schedule_with_warmup, num_warmup_steps=WARMUP)
    assert ours(kind="constant", min_ratio=0.1) == pytest.approx(truth[1:])


@pytest.mark.parametrize(("shape", "name"), [("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt")])
@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_wsd_is_transformers(shape: str, name: str, ratio: float) -> None:
    """Ours is at the floor in the last step, theirs after it; their warm-up begins at the floor, so it is left out."""
    truth = theirs(
        transformers.get_wsd_schedule,
        num_warmup_steps=WARMUP,
        num_decay_steps=15,
        num_training_steps=STEPS,
        decay_type=name,
        min_lr_ratio=ratio,
    )
    mine = ours(kind="wsd", decay_steps=15, shape=shape, min_ratio=ratio)
    assert mine[WARMUP - 1 :] == pytest.approx(truth[WARMUP:], abs=1e-12)
    assert mine[:WARMUP] == pytest.approx([0.2 * (n + 1) for n in range(WARMUP)])
    assert mine[WARMUP : STEPS - 15] == [2.0] * (STEPS - 15 - WARMUP) and mine[-1] == pytest.approx(2.0 * ratio)


@pytest.mark.parametrize(("shape", "name"), [("linear", "linear"), ("cosine", "cos")])
def test_one_cycle_is_torchs(shape: str, name: str) -> None:
    truth = theirs(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=2.0,
        total_steps=STEPS,
        pct_start=WARMUP / STEPS,
        anneal_strategy=name,
        div_factor=10.0,
        final_div_factor=2.0,
    )
    mine = ours(kind="one_cycle", shape=shape, start_ratio=0.1, min_ratio=0.05)
    assert mine == pytest.approx(truth[:STEPS], abs=1e-12)
    assert mine[0] == pytest.approx(0.2) and max(mine) == mine[WARMUP - 1] == 2.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_one_step_and_all_warm_up_have_a_rate(kind: str) -> None:
    down = {"decay_steps": 1} if kind == "wsd" else {}
    assert lr_at(0, 1.0, ScheduleConfig(steps=1, kind=kind, **down)) == (0.1 if kind == "wsd" else 1.0)
    if kind != "wsd":
        assert lr_at(3, 1.0, ScheduleConfig(steps=4, warmup=4, kind=kind)) == 1.0
    assert lr_at(0, 1.0, ScheduleConfig(steps=1, warmup=1, kind="one_cycle")) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 5, "warmup": 6}, r"schedule\.warmup must be from 0 to steps \(5\), not 6"),
        ({"steps": 5, "decay_steps": 2}, r"schedule\.decay_steps means nothing to cosine: it is for wsd"),
        (
            {"steps": 5, "kind": "linear", "shape": "sqrt"},
            r"schedule\.shape means nothing to linear: it is for wsd, one",
        ),
        ({"steps": 5, "kind": "wsd", "start_ratio": 0.1}, r"schedule\.start_ratio means nothing to wsd"),
        ({"steps": 5, "kind": "one_cycle"}, "must be 1 or more"),
        ({"steps": 5, "kind": "one_cycle", "warmup": 1, "shape": "sqrt"}, "by cosine or linear"),
        ({"steps": 5, "kind": "wsd", "warmup": 3, "decay_steps": 3}, "are more than steps"),
        ({"steps": 5, "min_ratio": 1.5}, "min_ratio must be in"),
        ({"steps": 5, "kind": "constant", "min_ratio": 0.5}, "min_ratio means nothing to constant"),
    ],
)
def test_what_makes_no_schedule_is_refused(given, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**given)
