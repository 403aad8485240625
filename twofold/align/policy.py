"""The losses of policies and of values, token by token; `aggregate` makes one number of them.

With r = π(token) / π_old(token), A its advantage, and a loss to be made small:

    PPO, GRPO, DAPO   max(-r A, -clip(r, 1 - low, 1 + high) A)      and, dual: at most -c A where A < 0
    GSPO              the same, r the geometric mean of its sequence's ratios
    RLOO              the same, r the product of its sequence's ratios
    CISPO             -sg(clip(r, 1 - low, 1 + high)) A log π        every token keeps its gradient

Shapes: R target tokens on one flat axis without padding, S sequences; `owner_R` int64, rising, each token's sequence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .aggregate import sequence_means, sequence_sums
from .kl import LARGEST_LOG_RATIO

Level = Literal["token", "sequence", "trajectory"]


def ratio(logp_R: Tensor, old_R: Tensor, owner_R: Tensor, sequences: int, level: Level = "token") -> Tensor:
    """π / π_old of each token [R] at the level of importance sampling; exactly 1 where both are the same bits.

    token: its own. sequence: exp(mean log-ratio of its sequence), written as sg(s) · π / sg(π) so that advantages
    may differ from token to token (GSPO-token, Zheng et al. 2025, equation 14). trajectory: exp(sum of the
    log-ratios of its sequence), the ratio of whole answers; to be aggregated by "sequence". Log-ratios stop at ±20.
    """
    log_ratio_R = _bounded(logp_R.float() - old_R.float())
    if level == "sequence":
        mean_R = sequence_means(log_ratio_R, owner_R, sequences).detach()[owner_R]
        log_ratio_R = mean_R + (logp_R - logp_R.detach()).float()
    elif level == "trajectory":
        log_ratio_R = _bounded(sequence_sums(log_ratio_R, owner_R, sequences))[owner_R]
    return log_ratio_R.exp()


def clipped_loss(ratio_R: Tensor, advantage_R: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """PPO's pessimistic surrogate [R] (Schulman et al. 2017, equation 7), low and high apart (DAPO, Yu et al. 2025).

    `dual` (Ye et al. 2020) bounds the loss of a bad token that has become likely: at most -dual · A where A < 0.
    """
    loss_R = torch.maximum(-ratio_R * advantage_R, -ratio_R.clamp(1 - low, 1 + high) * advantage_R)
    if dual is None:
        return loss_R
    return torch.where(advantage_R < 0, torch.minimum(loss_R, -dual * advantage_R), loss_R)


def cispo_loss(logp_R: Tensor, ratio_R: Tensor, advantage_R: Tensor, low: float, high: float) -> Tensor:
    """A policy gradient whose importance weight is clipped instead of its gradient [R] (MiniMax-M1, 2025)."""
    return -ratio_R.detach().clamp(1 - low, 1 + high) * advantage_R * logp_R.float()


def value_loss(values_R: Tensor, old_R: Tensor, returns_R: Tensor, clip: float | None) -> Tensor:
    """½ max((V - G)², (clip(V, V_old ± clip) - G)²) [R]: a value may not run from what it was, as in PPO's own code.

    Without `clip` it is ½ (V - G)².
    """
    loss_R = (values_R.float() - returns_R).square()
    if clip is not None:
        near_R = old_R + (values_R.float() - old_R).clamp(-clip, clip)
        loss_R = torch.maximum(loss_R, (near_R - returns_R).square())
    return loss_R / 2


@torch.no_grad()
def ratio_figures(
    ratio_R: Tensor, advantage_R: Tensor, low: float, high: float, dual: float | None = None
) -> dict[str, Tensor]:
    """Sums over tokens for the journal: divide by `tokens`.

    clipped: tokens whose gradient the clipping has stopped, of which clipped_low below 1 - low, clipped_high above
    1 + high, and clipped_dual above `dual`; approx_kl: k3 of KL(π_old | π) from tokens of π_old, r - 1 - log r;
    ratio and ratio_square, from which (Σ r)² / (n Σ r²) is the share of tokens that are worth something (Kish 1965).
    """
    low_R = (ratio_R < 1 - low) & (advantage_R < 0)
    high_R = (ratio_R > 1 + high) & (advantage_R > 0)
    dual_R = (ratio_R > dual) & (advantage_R < 0) if dual is not None else torch.zeros_like(low_R)
    sums = {
        "clipped": low_R | high_R | dual_R,
        "clipped_low": low_R,
        "clipped_high": high_R,
        "clipped_dual": dual_R,
        "approx_kl": ratio_R - 1 - ratio_R.log(),
        "ratio": ratio_R,
        "ratio_square": ratio_R.square(),
        "tokens": torch.ones_like(ratio_R),
    }
    return {name: x_R.float().sum() for name, x_R in sums.items()}


@torch.no_grad()
def value_figures(values_R: Tensor, old_R: Tensor, returns_R: Tensor, clip: float | None) -> dict[str, Tensor]:
    """Sums over tokens: how many values the clipping holds, and what explained variance is made of.

    Explained variance is 1 - (error² / n) / (returns_square / n - (returns / n)²).
    """
    held_R = torch.zeros_like(values_R)
    if clip is not None:
        held_R = ((values_R - old_R).abs() > clip).float()
    sums = {
        "value_clipped": held_R,
        "value": values_R,
        "value_error_square": (values_R - returns_R).square(),
        "returns": returns_R,
        "returns_square": returns_R.square(),
    }
    return {name: x_R.float().sum() for name, x_R in sums.items()}


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
