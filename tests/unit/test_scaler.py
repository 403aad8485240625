"""The loss scale step by step."""

from __future__ import annotations

import random

import pytest

from twofold.core import ConfigError, TwofoldError
from twofold.train.scaler import LossScaleConfig, LossScaler

# A window of 3. A step overflows (x) or not (.); then the scale after it, in units of 1024.
TABLE = [
    # hysteresis 2: the first overflow costs credit alone; credit comes back when the scale grows, not before
    (
        2,
        False,
        ".  .  .  .  x  .  x  x  .  .  .  .  .  .  .  x  x",
        "64 64 64 128 128 128 64 32 32 32 32 64 64 64 128 128 64",
    ),
    # every step without an overflow brings the credit back
    (2, True, "x  .  x  .  x  x  .  .  .  .  x", "64 64 64 64 64 32 32 32 32 64 64"),
    # hysteresis 1: each overflow halves
    (1, False, "x  x  .  .  .  .  x  .  .  .  .", "32 16 16 16 16 32 16 16 16 16 32"),
    # hysteresis 3
    (3, False, "x  .  x  .  x  x  .  .  .  .  x  x  x", "64 64 64 64 32 16 16 16 16 32 32 32 16"),
]


@pytest.mark.parametrize(("hysteresis", "consecutive", "steps", "scales"), TABLE)
def test_the_scale_follows_deepspeeds_table(hysteresis: int, consecutive: bool, steps: str, scales: str) -> None:
    scaler = LossScaler(LossScaleConfig(loss_scale_window=3, hysteresis=hysteresis, consecutive_hysteresis=consecutive))
    assert scaler.scale == 2**16
    found = []
    for step in steps.split():
        scaler.update("overflow" if step == "x" else None)
        found.append(int(scaler.scale) // 1024)
    assert found == [int(scale) for scale in scales.split()]


def deepspeeds(overflows: list[bool], window: int, hysteresis: int, consecutive: bool, least: float) -> list[float]:
    """The rule as its documentation states it, written down a second time."""
    scale, credit, last, out = 2.0**16, hysteresis, -1, []
    for now, overflow in enumerate(overflows):
        if overflow:
            if hysteresis == 1 or credit == 1:
                scale = max(scale / 2, least)
            else:
                credit -= 1
            last = now
        else:
            if consecutive:
                credit = hysteresis
            good = now - last - 1
            if good > 0 and good % window == 0:
                credit = credit if consecutive else hysteresis
                scale *= 2
        out.append(scale)
    return out


@pytest.mark.parametrize("seed", range(6))
def test_long_runs_follow_it_too_and_a_saved_state_goes_on(seed: int) -> None:
    draw = random.Random(seed)
    settings = {"loss_scale_window": draw.choice((2, 5, 1000)), "hysteresis": draw.choice((1, 2, 3))}
    config = LossScaleConfig(**settings, consecutive_hysteresis=seed % 2 == 1, min_loss_scale=2.0**-900)
    overflows = [draw.random() < 0.1 for _ in range(3000)]
    truth = deepspeeds(overflows, *settings.values(), config.consecutive_hysteresis, 2.0**-900)
    scaler = LossScaler(config)
    for at, overflow in enumerate(overflows):
        if at % 700 == 699:
            again = LossScaler(config)
            again.load(scaler.state())
            scaler = again
        scaler.update("it did" if overflow else None)
        assert scaler.scale == truth[at], at


def test_an_overflow_at_the_least_scale_ends_the_run_and_says_where() -> None:
    scaler = LossScaler(LossScaleConfig(initial_scale_power=1, min_loss_scale=1.0, hysteresis=2))
    for scale in (2.0, 1.0):
        scaler.update("in layers.3")
        assert scaler.scale == scale
    with pytest.raises(TwofoldError, match=r"in layers\.3, though the loss scale is at its least, 1: lower"):
        scaler.update("in layers.3")


def test_a_static_scale_never_changes_and_keeps_nothing() -> None:
    for scaler, scale in ((LossScaler(), 1.0), (LossScaler(LossScaleConfig(loss_scale=128.0)), 128.0)):
        for fault in (None, "overflow", "overflow", "overflow"):
            scaler.update(fault)
        assert scaler.scale == scale and not scaler.dynamic and scaler.state() == {}


@pytest.mark.parametrize(
    "given", [{"loss_scale": -1.0}, {"hysteresis": 0}, {"loss_scale_window": 0}, {"initial_scale_power": 99}]
)
def test_what_cannot_be_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"fp16\.{next(iter(given))} must be"):
        LossScaleConfig(**given)
