"""How far the policy has gone from its reference, estimated from the tokens it sampled, and what holds it there.

With x = log π(token) - log π_ref(token), the token drawn from π (Schulman 2020, "Approximating KL divergence"):

    name   value            mean               its gradient in a loss, in the mean
    k1     x                KL, high variance  0: it teaches nothing, so it belongs in the reward
    k2     x² / 2           nearly KL          that of KL(π | π_ref)
    k3     e^-x - 1 + x     KL, never below 0  that of KL(π_ref | π)
    k3+    as k3            as k3              as k2: the value of one, straight through the gradient of the other

(gradients: Tang & Munos 2025, Liu et al. 2025). Shapes: R tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
LossEstimator = Literal["k2", "k3", "k3+"]

LARGEST_LOG_RATIO = 20.0
"""Exponents stop here: e^20 is 5e8, and a sum of such numbers is still one in fp32."""
ZIEGLER_CLIP = 0.2
"""One update of the adaptive coefficient sees at most this relative error."""


def kl(logp_R: Tensor, reference_R: Tensor, estimator: Estimator) -> Tensor:
    """Each token's estimate of KL(π | π_ref) in nats [R]; exactly 0 where both log-probabilities are the same bits."""
    x_R = logp_R.float() - reference_R.float()
    if estimator == "k1":
        return x_R
    if estimator == "k2":
        return x_R.square() / 2
    x_R = x_R.clamp(min=-LARGEST_LOG_RATIO)  # both terms: a gradient of the second alone would push the wrong way
    return (-x_R).expm1() + x_R


def kl_loss(logp_R: Tensor, reference_R: Tensor, estimator: LossEstimator, ratio_R: Tensor | None = None) -> Tensor:
    """Each token's penalty to add to a loss [R], differentiable with respect to `logp_R`.

    `ratio_R`, the ratio π / π_old with its gradient, makes the mean that of π for tokens drawn from π_old, and the
    gradient of k3 that of KL(π | π_ref) (DeepSeek-V3.2).
    """
    if estimator == "k3+":
        gradient_R = kl(logp_R, reference_R, "k2")
        penalty_R = gradient_R - gradient_R.detach() + kl(logp_R, reference_R, "k3").detach()
    else:
        penalty_R = kl(logp_R, reference_R, estimator)
    return penalty_R if ratio_R is None else ratio_R * penalty_R


@dataclass(frozen=True, kw_only=True)
class KlCoefficient:
    """What the KL is multiplied by; with a target, a controller moves it (Ziegler et al. 2019, section 2.2)."""

    value: float
    """The coefficient of the next step."""
    target: float | None = None
    """The KL of an answer (sum over its tokens, in nats) to settle at. None: the coefficient stays as it is."""
    horizon: float = 10_000.0
    """Answers over which a relative error of one would move the coefficient by a factor of about e."""

    def after(self, observed: float, answers: int) -> KlCoefficient:
        """The coefficient once `answers` answers have shown a mean KL of `observed`.

        e = clip(observed / target - 1, -0.2, 0.2);  value ← value · (1 + e · answers / horizon)
        """
        if self.target is None:
            return self
        error = min(max(observed / self.target - 1.0, -ZIEGLER_CLIP), ZIEGLER_CLIP)
        return replace(self, value=self.value * (1.0 + error * answers / self.horizon))
