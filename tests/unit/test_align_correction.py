"""Weights of off-policy tokens by hand: each level, each action, rejection; equal bits need none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twofold.align.correction import correct, largest_ratio, mismatch
from twofold.align.policy_config import CorrectionConfig

OWNER_R = torch.tensor([0, 0, 1, 1, 1])
RATIO_R = torch.tensor([2.0, 4.0, 0.5, 1.0, 0.25])
"""Products: 8 and ⅛; geometric means: √8 = 2.828 and (⅛)^⅓ = ½."""
ROLLOUT_R = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.1])
TRAINER_R = ROLLOUT_R + RATIO_R.log()


def weights(config: CorrectionConfig) -> tuple[list[float], list[bool]]:
    weight_R, kept_R = correct(TRAINER_R, ROLLOUT_R, OWNER_R, 2, config)
    return [round(w, 4) for w in weight_R.tolist()], kept_R.tolist()


ALL = [True] * 5


@pytest.mark.parametrize(
    ("config", "expected", "kept"),
    [
        (CorrectionConfig(), [1.0] * 5, ALL),
        (CorrectionConfig(level="token", high=3.0), [2.0, 3.0, 0.5, 1.0, 0.25], ALL),
        (CorrectionConfig(level="token", low=0.4, high=3.0), [2.0, 3.0, 0.5, 1.0, 0.4], ALL),
        (
            CorrectionConfig(level="token", action="mask", low=0.5, high=3.0),
            [2.0, 0.0, 0.5, 1.0, 0.0],
            [True, False, True, True, False],
        ),
        (CorrectionConfig(level="sequence", high=3.0), [3.0, 3.0, 0.125, 0.125, 0.125], ALL),
        (
            CorrectionConfig(level="sequence", action="mask", high=3.0),
            [0.0, 0.0, 0.125, 0.125, 0.125],
            [False, False, True, True, True],
        ),
        (CorrectionConfig(level="geometric", high=2.5), [2.5, 2.5, 0.5, 0.5, 0.5], ALL),
        (CorrectionConfig(reject_low=0.6), [1.0, 1.0, 0.0, 0.0, 0.0], [True, True, False, False, False]),
        (
            CorrectionConfig(level="token", high=3.0, reject_high=2.5),
            [0.0, 0.0, 0.5, 1.0, 0.25],
            [False, False, True, True, True],
        ),
    ],
)
def test_by_hand(config: CorrectionConfig, expected: list[float], kept: list[bool]) -> None:
    assert weights(config) == (expected, kept)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("action", ["truncate", "mask"])
def test_equal_bits_have_a_weight_of_exactly_one(level: str, action: str) -> None:
    config = CorrectionConfig(level=level, action=action, reject_low=0.999, reject_high=1.001)  # type: ignore[arg-type]
    weight_R, kept_R = correct(ROLLOUT_R, ROLLOUT_R.clone(), OWNER_R, 2, config)
    assert (weight_R == 1.0).all()
    assert kept_R.all()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_no_log_ratio_is_too_large(level: str) -> None:
    """A token that the rollout held impossible, and one that the trainer does: e^±20 before truncation."""
    config = CorrectionConfig(level=level, high=1e30)  # type: ignore[arg-type]
    far_R = torch.tensor([-500.0, 0.0, -500.0, -500.0, -500.0])
    weight_R, _ = correct(far_R, far_R.flip(0), OWNER_R, 2, config)
    assert torch.isfinite(weight_R).all()
    assert weight_R.max() <= math.exp(20) * 1.0001
    unlikely_R, _ = correct(torch.zeros(5), torch.full((5,), -90.0), OWNER_R, 2, config)
    assert unlikely_R.min() == pytest.approx(math.exp(20), rel=1e-5)


def test_the_sequences_of_another_micro_batch_change_nothing() -> None:
    config = CorrectionConfig(level="sequence", high=100.0)
    whole_R, _ = correct(TRAINER_R, ROLLOUT_R, OWNER_R, 2, config)
    first_R, _ = correct(TRAINER_R[:2], ROLLOUT_R[:2], OWNER_R[:2], 1, config)
    second_R, _ = correct(TRAINER_R[2:], ROLLOUT_R[2:], OWNER_R[2:] - 1, 1, config)
    assert torch.equal(torch.cat([first_R, second_R]), whole_R)


def test_figures_by_hand() -> None:
    """|log r|: log 2 · (1 + 2 + 1 + 0 + 2) = 6 log 2; k3 = Σ (r - 1 - log r) = 7.75 - 5 - 0 · log 2 = 2.75.

    Σ log r = log 2 · (1 + 2 - 1 + 0 - 2) = 0.
    """
    found = mismatch(TRAINER_R, ROLLOUT_R, torch.tensor([True, False, True, True, True]))
    rounded = {name: round(float(x), 4) for name, x in found.items()}
    assert rounded == {"mismatch": 4.1589, "kl": 2.75, "equal": 1.0, "masked": 1.0, "tokens": 5.0}
    assert largest_ratio(TRAINER_R, ROLLOUT_R) == pytest.approx(4.0)
    assert largest_ratio(ROLLOUT_R, ROLLOUT_R) == 1.0
    assert largest_ratio(ROLLOUT_R[:0], ROLLOUT_R[:0]) == 1.0


def test_equal_bits_have_figures_of_exactly_zero() -> None:
    found: dict[str, Tensor] = mismatch(ROLLOUT_R, ROLLOUT_R.clone())
    assert {name: float(x) for name, x in found.items()} == {
        "mismatch": 0.0,
        "kl": 0.0,
        "equal": 5.0,
        "masked": 0.0,
        "tokens": 5.0,
    }
