"""KL estimators by hand, and in the mean over a whole distribution: their values and the gradients they have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twofold.align.kl import Estimator, KlCoefficient, LossEstimator, kl, kl_loss

LOGITS_V = torch.tensor([0.3, -0.8, 1.1, 0.0])
REFERENCE_V = torch.tensor([0.5, 0.1, 0.2, -0.4]).log_softmax(0)


def divergence(p_V: Tensor, q_V: Tensor) -> Tensor:
    return (p_V.exp() * (p_V - q_V)).sum()


def test_values_by_hand() -> None:
    """π = ½, π_ref = ¼: x = log 2; k1 = 0.6931; k2 = 0.4805 / 2 = 0.2402; k3 = ½ - 1 + 0.6931 = 0.1931."""
    logp_R, reference_R = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert float(kl(logp_R, reference_R, "k1")) == pytest.approx(0.693147)
    assert float(kl(logp_R, reference_R, "k2")) == pytest.approx(0.240227, rel=1e-5)
    assert float(kl(logp_R, reference_R, "k3")) == pytest.approx(0.193147, rel=1e-5)
    assert float(kl_loss(logp_R, reference_R, "k3+")) == pytest.approx(0.193147, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equal_bits_have_a_kl_of_exactly_zero(estimator: Estimator) -> None:
    logp_R = -torch.rand(100, generator=torch.Generator().manual_seed(0)) * 9
    assert kl(logp_R, logp_R.clone(), estimator).abs().max() == 0.0


def test_k3_is_never_negative_never_infinite_and_never_pushes_away() -> None:
    x_R = torch.linspace(-200, 200, 1001).requires_grad_()
    k3_R = kl(x_R, torch.zeros_like(x_R), "k3")
    assert torch.isfinite(k3_R).all()
    assert k3_R.min() >= 0.0
    k3_R.sum().backward()
    assert x_R.grad is not None
    assert (x_R.grad * x_R).min() >= 0.0  # going down the gradient never leads further from 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_the_policy_is_the_kl(estimator: Estimator) -> None:
    policy_V = LOGITS_V.log_softmax(0)
    mean = (policy_V.exp() * kl(policy_V, REFERENCE_V, estimator)).sum()
    torch.testing.assert_close(mean, divergence(policy_V, REFERENCE_V))


def mean_gradient(estimator: LossEstimator, ratio: bool = False) -> Tensor:
    """The gradient that a loss has in the mean over tokens of the policy, with respect to the logits [V]."""
    logits_V = LOGITS_V.clone().requires_grad_()
    policy_V = logits_V.log_softmax(0)
    ratio_V = (policy_V - policy_V.detach()).exp() if ratio else None
    (policy_V.detach().exp() * kl_loss(policy_V, REFERENCE_V, estimator, ratio_V)).sum().backward()
    assert logits_V.grad is not None
    return logits_V.grad


def test_gradients_in_the_mean_are_those_of_the_table() -> None:
    forward_V, backward_V = LOGITS_V.clone().requires_grad_(), LOGITS_V.clone().requires_grad_()
    divergence(forward_V.log_softmax(0), REFERENCE_V).backward()
    divergence(REFERENCE_V, backward_V.log_softmax(0)).backward()
    reverse_kl, forward_kl = forward_V.grad, backward_V.grad
    torch.testing.assert_close(mean_gradient("k2"), reverse_kl)
    torch.testing.assert_close(mean_gradient("k3+"), reverse_kl)
    torch.testing.assert_close(mean_gradient("k3"), forward_kl)
    torch.testing.assert_close(mean_gradient("k3", ratio=True), reverse_kl)
    assert (mean_gradient("k3") - reverse_kl).abs().max() > 0.01  # the two do differ


def test_the_adaptive_coefficient_by_hand() -> None:
    """Target 6, observed 9: error ½, held to 0.2; 256 answers of 10000: 0.1 · (1 + 0.2 · 0.0256) = 0.100512."""
    start = KlCoefficient(value=0.1, target=6.0, horizon=10_000)
    assert start.after(9.0, 256).value == pytest.approx(0.100512)
    # 5.7 / 6 - 1 = -0.05, so 0.1 · (1 - 0.05 · 0.0256) = 0.099872
    assert start.after(5.7, 256).value == pytest.approx(0.099872)
    # 0 / 6 - 1 = -1, held to -0.2: 0.1 · (1 - 0.2 · 0.0256) = 0.099488
    assert start.after(0.0, 256).value == pytest.approx(0.099488)
    assert start.after(6.0, 256) == start
    assert KlCoefficient(value=0.1).after(99.0, 256) == KlCoefficient(value=0.1)


def test_the_adaptive_coefficient_finds_its_target() -> None:
    """A policy whose KL is 1 / coefficient settles where that is the target."""
    state = KlCoefficient(value=0.01, target=6.0, horizon=1000)
    for _ in range(400):
        state = state.after(1.0 / state.value, 100)
    assert math.isclose(1.0 / state.value, 6.0, rel_tol=1e-3)
