"""Policy and value losses by hand; what is clipped has no gradient; what is not has that of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twofold.align.aggregate import aggregate
from twofold.align.policy import (
    Level,
    cispo_loss,
    clipped_loss,
    ratio,
    ratio_figures,
    value_figures,
    value_loss,
)

OWNER_R = torch.tensor([0, 0, 1, 1, 1])
OLD_R = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.1])
RATIO_R = torch.tensor([2.0, 4.0, 0.5, 1.0, 0.25])


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def gradient(of: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(of, at)[0]


def test_ratios_by_hand() -> None:
    """Tokens: 2, 4 | ½, 1, ¼. Geometric means: √8 | ½. Products: 8 | ⅛."""
    logp_R = OLD_R + RATIO_R.log()
    close(ratio(logp_R, OLD_R, OWNER_R, 2), [2.0, 4.0, 0.5, 1.0, 0.25])
    close(ratio(logp_R, OLD_R, OWNER_R, 2, "sequence"), [math.sqrt(8)] * 2 + [0.5] * 3)
    close(ratio(logp_R, OLD_R, OWNER_R, 2, "trajectory"), [8.0] * 2 + [0.125] * 3)


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_on_policy_the_ratio_is_exactly_one_and_has_a_gradient(level: Level) -> None:
    logp_R = OLD_R.clone().requires_grad_()
    ratio_R = ratio(logp_R, OLD_R, OWNER_R, 2, level)
    assert (ratio_R == 1.0).all()
    assert (gradient(ratio_R.sum(), logp_R) > 0).all()


def test_the_ratio_of_a_sequence_is_as_exact_as_its_mean() -> None:
    """Log-ratios ½, ¼, ¼ of tokens near -1000, where fp32 has steps of 6e-5: the mean ⅓ may not be rounded to those."""
    old_R = torch.full((3,), -1000.0)
    ratio_R = ratio(old_R + torch.tensor([0.5, 0.25, 0.25]), old_R, torch.zeros(3, dtype=torch.int64), 1, "sequence")
    torch.testing.assert_close(ratio_R, torch.full((3,), math.exp(1 / 3)), rtol=2e-7, atol=0.0)


def test_impossible_tokens_do_not_overflow() -> None:
    for level in ("token", "sequence", "trajectory"):
        ratio_R = ratio(torch.zeros(5), torch.full((5,), -300.0), OWNER_R, 2, level)
        assert ratio_R.max() <= math.exp(20) * 1.0001


def test_clipped_loss_by_hand() -> None:
    """low 0.2, high 0.3.

    r    A    -r A   -clip(r) A   larger
    2    1    -2     -1.3         -1.3
    ½    1    -½     -0.8         -0.5
    2   -1     2      1.3          2
    ½   -1     ½      0.8          0.8
    5   -2    10      2.6         10       and dual 3: at most 3 · 2 = 6
    """
    ratio_R, advantage_R = torch.tensor([2.0, 0.5, 2.0, 0.5, 5.0]), torch.tensor([1.0, 1.0, -1.0, -1.0, -2.0])
    close(clipped_loss(ratio_R, advantage_R, 0.2, 0.3), [-1.3, -0.5, 2.0, 0.8, 10.0])
    close(clipped_loss(ratio_R, advantage_R, 0.2, 0.3, dual=3.0), [-1.3, -0.5, 2.0, 0.8, 6.0])
    found = ratio_figures(ratio_R, advantage_R, 0.2, 0.3, dual=3.0)
    # r - 1 - log r: 1 - 0.6931 twice, -½ + 0.6931 twice, 4 - 1.6094;  Σ r² = 4 + ¼ + 4 + ¼ + 25
    assert {name: round(float(x), 4) for name, x in found.items()} == {
        "clipped": 3.0,
        "clipped_low": 1.0,
        "clipped_high": 1.0,
        "clipped_dual": 1.0,
        "approx_kl": round(2 - 1 + 4 - math.log(5), 4),
        "ratio": 10.0,
        "ratio_square": 33.5,
        "tokens": 5.0,
    }


def test_what_is_clipped_has_no_gradient() -> None:
    logp_R = OLD_R.clone() + torch.tensor([2.0, 0.5, 2.0, 0.5, 5.0]).log()
    logp_R.requires_grad_()
    advantage_R = torch.tensor([1.0, 1.0, -1.0, -1.0, -2.0])
    ratio_R = ratio(logp_R, OLD_R, OWNER_R, 2)
    grad_R = gradient(clipped_loss(ratio_R, advantage_R, 0.2, 0.3, dual=3.0).sum(), logp_R)
    close(grad_R, [0.0, -0.5, 2.0, 0.0, 0.0])  # -r A where it passes
    figures = ratio_figures(ratio_R, advantage_R, 0.2, 0.3, dual=3.0)
    assert int(figures["clipped"]) == int((grad_R == 0).sum())


def test_on_policy_every_loss_has_the_policy_gradient() -> None:
    """-A ∇log π, whatever the level or the clipping: what Sutton et al. wrote down."""
    advantage_R = torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0])
    for level in ("token", "sequence"):
        logp_R = OLD_R.clone().requires_grad_()
        ratio_R = ratio(logp_R, OLD_R, OWNER_R, 2, level)
        close(gradient(clipped_loss(ratio_R, advantage_R, 0.2, 0.2).sum(), logp_R), (-advantage_R).tolist())
        logp_R = OLD_R.clone().requires_grad_()
        ratio_R = ratio(logp_R, OLD_R, OWNER_R, 2, level)
        close(gradient(cispo_loss(logp_R, ratio_R, advantage_R, 1.0, 4.0).sum(), logp_R), (-advantage_R).tolist())


def test_a_sequence_ratio_spreads_the_gradient_of_its_definition() -> None:
    """GSPO: the gradient of s A with s = exp(mean log-ratio) is s A / |y| for each token, and of its product r A."""
    logp_R = (OLD_R + RATIO_R.log()).requires_grad_()
    advantage_R = torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0])
    for level, expected in (
        ("sequence", [-math.sqrt(8) / 2] * 2 + [0.5 * 2 / 3] * 3),
        ("trajectory", [-8.0] * 2 + [0.125 * 2] * 3),
    ):
        loss_R = -ratio(logp_R, OLD_R, OWNER_R, 2, level) * advantage_R  # type: ignore[arg-type]
        close(gradient(aggregate(loss_R, OWNER_R, 2, "sequence"), logp_R), expected)


def test_cispo_by_hand() -> None:
    """Weights 2, 4, ½, 1, ¼ in [0.4, 3]: 2, 3, ½, 1, 0.4; each token keeps the gradient of its log-probability."""
    logp_R = (OLD_R + RATIO_R.log()).requires_grad_()
    advantage_R = torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0])
    loss_R = cispo_loss(logp_R, ratio(logp_R, OLD_R, OWNER_R, 2), advantage_R, 0.6, 2.0)
    weights = torch.tensor([2.0, 3.0, 0.5, 1.0, 0.4])
    close(loss_R, (-weights * advantage_R * logp_R.detach()).tolist())
    close(gradient(loss_R.sum(), logp_R), (-weights * advantage_R).tolist())


def test_value_loss_by_hand() -> None:
    """Clip 0.2 around 1, return 3: a value of 2 is held at 1.2, error 1.8 over 1; a value of 0.5 at 0.8, 2.5 over 2.2.

    Return 0, value 1.5: held at 1.2, but 1.5 is further off.
    """
    values_R = torch.tensor([2.0, 0.5, 1.5], requires_grad=True)
    old_R, returns_R = torch.ones(3), torch.tensor([3.0, 3.0, 0.0])
    loss_R = value_loss(values_R, old_R, returns_R, 0.2)
    close(loss_R, [1.8**2 / 2, 2.5**2 / 2, 1.5**2 / 2])
    close(gradient(loss_R.sum(), values_R), [0.0, 0.5 - 3, 1.5])
    close(value_loss(values_R, old_R, returns_R, None), [0.5, 2.5**2 / 2, 1.5**2 / 2])
    found = value_figures(values_R.detach(), old_R, returns_R, 0.2)
    assert {name: round(float(x), 4) for name, x in found.items()} == {
        "value_clipped": 3.0,
        "value": 4.0,
        "value_error_square": 1 + 6.25 + 2.25,
        "returns": 6.0,
        "returns_square": 18.0,
    }
    assert float(value_figures(values_R.detach(), old_R, returns_R, None)["value_clipped"]) == 0.0


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
def test_no_split_changes_loss_or_gradient(level: Level) -> None:
    advantage_R = torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0])

    def loss(logp_R: Tensor, at: slice, owner_R: Tensor, sequences: int) -> Tensor:
        ratio_R = ratio(logp_R[at], OLD_R[at], owner_R, sequences, level)
        return aggregate(clipped_loss(ratio_R, advantage_R[at], 0.2, 0.2), owner_R, sequences, "sequence")

    logp_R = (OLD_R + RATIO_R.log() / 9).requires_grad_()
    whole = loss(logp_R, slice(0, 5), OWNER_R, 2)
    parts = loss(logp_R, slice(0, 2), OWNER_R[:2], 1) + loss(logp_R, slice(2, 5), OWNER_R[2:] - 1, 1)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient(parts, logp_R), gradient(whole, logp_R))
