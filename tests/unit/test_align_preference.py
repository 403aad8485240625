"""Losses of preferences by hand, their gradients against finite differences, and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.align.preference import (
    Pairs,
    bradley_terry,
    dpo,
    hinge,
    ipo,
    kto,
    kto_baseline,
    orpo,
    pair_loss,
    preference_figures,
    simpo,
)
from twofold.align.preference_config import DpoConfig


def one(*values: float) -> Tensor:
    return torch.tensor(values)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


PAIRS = Pairs(
    chosen_P=one(-4.0, -9.0),
    rejected_P=one(-6.0, -3.0),
    chosen_tokens_P=one(2.0, 3.0),
    rejected_tokens_P=one(4.0, 6.0),
    ref_chosen_P=one(-5.0, -6.0),
    ref_rejected_P=one(-4.0, -3.0),
)
"""Log-ratios: chosen 1, -3; rejected -2, 0; so h = 3 and -3. Means: chosen -2, -3; rejected -1.5, -0.5."""


def check(config: DpoConfig, losses: list[float], chosen: list[float], rejected: list[float]) -> None:
    loss_P, chosen_P, rejected_P = pair_loss(PAIRS, config)
    for found, expected in ((loss_P, losses), (chosen_P, chosen), (rejected_P, rejected)):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_dpo() -> None:
    """β = 0.1: -log σ(±0.3) = log(1 + e^∓0.3)."""
    low, high = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    check(DpoConfig(beta=0.1), [low, high], [0.1, -0.3], [-0.2, 0.0])
    smooth = DpoConfig(beta=0.1, label_smoothing=0.25)
    check(smooth, [0.75 * low + 0.25 * high, 0.75 * high + 0.25 * low], [0.1, -0.3], [-0.2, 0.0])
    offset = DpoConfig(beta=0.1, margin=0.5)  # -log σ(0.3 - 0.5), -log σ(-0.3 - 0.5)
    check(offset, [-math.log(sigmoid(-0.2)), -math.log(sigmoid(-0.8))], [0.1, -0.3], [-0.2, 0.0])


def test_the_nll_term_is_per_token() -> None:
    """β = 0.1 and one half of the means 2 and 3 on top."""
    low, high = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    check(DpoConfig(beta=0.1, nll=0.5), [low + 1.0, high + 1.5], [0.1, -0.3], [-0.2, 0.0])


def test_ipo() -> None:
    """Means of log-ratios: 1/2 + 2/4 = 1 and -3/3 - 0 = -1; β = ¼: (1 - 2)² and (-1 - 2)²."""
    check(DpoConfig(loss="ipo", beta=0.25), [1.0, 9.0], [0.125, -0.25], [-0.125, 0.0])


def test_hinge() -> None:
    """β = ½: 1 - 1.5 is below 0, 1 + 1.5."""
    check(DpoConfig(loss="hinge", beta=0.5), [0.0, 2.5], [0.5, -1.5], [-1.0, 0.0])


def test_simpo() -> None:
    """β = 2, γ = ½: 2 · (-2 + 1.5) - ½ = -1.5 and 2 · (-3 + ½) - ½ = -5.5; it never looks at the reference."""
    losses = [math.log(1 + math.exp(1.5)), math.log(1 + math.exp(5.5))]
    check(DpoConfig(loss="simpo", beta=2.0, gamma=0.5), losses, [-4.0, -6.0], [-3.0, -1.0])


def test_orpo() -> None:
    """Mean probabilities e^-2 = 0.1353 and e^-1.5 = 0.2231: odds 0.15652 and 0.28722, and so on; β = ½."""

    def odds(mean: float) -> float:
        return math.exp(mean) / (1 - math.exp(mean))

    losses = [
        2.0 - 0.5 * math.log(sigmoid(math.log(odds(-2.0) / odds(-1.5)))),
        3.0 - 0.5 * math.log(sigmoid(math.log(odds(-3.0) / odds(-0.5)))),
    ]
    assert odds(-2.0) == pytest.approx(0.15652, rel=1e-4)
    check(DpoConfig(loss="orpo", beta=0.5), losses, [-1.0, -1.5], [-0.75, -0.25])


def test_orpo_of_sure_and_of_hopeless_answers_is_finite() -> None:
    mean_P = one(0.0, -1e-9, -80.0, -500.0).requires_grad_()
    loss_P = orpo(mean_P, mean_P.detach().flip(0), 0.1)
    loss_P.sum().backward()
    assert torch.isfinite(loss_P).all()
    assert mean_P.grad is not None
    assert torch.isfinite(mean_P.grad).all()


def test_kto() -> None:
    """β = ½, z = 1: good with 3: 1 - σ(½ · 2); bad with 3: 1 - σ(½ · -2); bad with -1, weight 1.5: 1 - σ(½ · 2)."""
    loss_S = kto(one(3.0, 3.0, -1.0), torch.tensor([True, False, False]), 1.0, 0.5, 1.0, 1.5)
    expected = one(1 - sigmoid(1), 1.5 * (1 - sigmoid(-1)), 1.5 * (1 - sigmoid(1)))
    torch.testing.assert_close(loss_S, expected)
    assert float(kto_baseline(one(3.0, -1.0))) == 1.0
    assert float(kto_baseline(one(1.0, -3.0))) == 0.0
    assert float(kto_baseline(torch.zeros(0))) == 0.0


def test_the_baseline_of_kto_has_no_gradient() -> None:
    assert not kto_baseline(one(3.0, 1.0).requires_grad_()).requires_grad


def test_kto_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="use kto"):
        pair_loss(PAIRS, DpoConfig(loss="kto"))


def test_bradley_terry() -> None:
    """Scores 2 and 1: -log σ(1); margin ½: -log σ(½); centring 0.1: 0.1 · 3² on top."""
    chosen_P, rejected_P = one(2.0), one(1.0)
    assert float(bradley_terry(chosen_P, rejected_P)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(bradley_terry(chosen_P, rejected_P, one(0.5))) == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert float(bradley_terry(chosen_P, rejected_P, 0.0, 0.1)) == pytest.approx(math.log(1 + math.exp(-1)) + 0.9)


def test_without_a_reference_every_answer_is_as_likely_to_it() -> None:
    free = Pairs(
        chosen_P=PAIRS.chosen_P,
        rejected_P=PAIRS.rejected_P,
        chosen_tokens_P=PAIRS.chosen_tokens_P,
        rejected_tokens_P=PAIRS.rejected_tokens_P,
    )
    loss_P, _, _ = pair_loss(free, DpoConfig(beta=0.1))
    torch.testing.assert_close(loss_P, dpo(one(2.0, -6.0), 0.1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reward": lambda a, b: bradley_terry(a, b, 0.3, 0.05),
    "dpo": lambda a, b: dpo(a - b, 0.3, 0.1, 0.2),
    "ipo": lambda a, b: ipo(a - b, 0.3),
    "hinge": lambda a, b: hinge(a - b, 0.3),
    "kto": lambda a, b: kto(torch.cat([a, b]), torch.tensor([True, False] * 3), 0.2, 0.3),
    "orpo": lambda a, b: orpo(a, b, 0.3),
    "simpo": lambda a, b: simpo(a, b, 2.0, 0.5, 0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name: str) -> None:
    """Central differences; the functions work in fp32 inside, so the step is large and the tolerance is fp32's."""
    a_P, b_P = one(-0.7, -2.0, -0.3).requires_grad_(), one(-1.1, -0.4, -2.2)
    LOSSES[name](a_P, b_P).sum().backward()
    assert a_P.grad is not None
    with torch.no_grad():
        for i in range(3):
            step = torch.zeros(3)
            step[i] = 1e-2
            up, down = LOSSES[name](a_P + step, b_P).sum(), LOSSES[name](a_P - step, b_P).sum()
            assert float(a_P.grad[i]) == pytest.approx(float(up - down) / 2e-2, abs=2e-4, rel=2e-3)


@pytest.mark.parametrize("loss", ["dpo", "hinge", "orpo", "simpo"])
def test_a_better_chosen_answer_has_less_loss(loss: Any) -> None:
    config = DpoConfig(loss=loss, beta=0.1)
    better = Pairs(**{**vars(PAIRS), "chosen_P": PAIRS.chosen_P + 0.5})
    assert (pair_loss(better, config)[0] < pair_loss(PAIRS, config)[0]).all()


def test_figures() -> None:
    found = preference_figures(one(1.0, 2.0, 3.0), one(0.0, 2.0, 5.0))
    assert {name: float(x) for name, x in found.items()} == {
        "accuracy": 1.0,
        "margin": -1.0,
        "chosen": 6.0,
        "rejected": 7.0,
        "pairs": 3.0,
    }
