"""Weights for tokens that another policy than the trained one has made: quantized rollouts, or weights a step old.

Rollouts come from μ, the trainer's policy at the start of the update is π_old. A policy gradient over μ's tokens is
that over π_old's when each is weighted with w = π_old / μ; large weights are truncated or their tokens masked.

    level       w of a token                          action     what w becomes            known as
    token       its own ratio                         truncate   min(w, high), ≥ low       TIS (Yao et al. 2025)
    sequence    the product over its sequence         mask       0 outside [low, high]     IcePop, MIS (Liu et al. 2025)
    geometric   the geometric mean over its sequence

`reject_low` and `reject_high` also drop every token of a sequence whose geometric mean lies outside them.
Nothing here has a gradient. Shapes: R target tokens on one flat axis, S sequences, `owner_R` each token's sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .aggregate import sequence_means, sequence_sums
from .kl import LARGEST_LOG_RATIO
from .policy_config import CorrectionConfig


@torch.no_grad()
def correct(
    trainer_R: Tensor, rollout_R: Tensor, owner_R: Tensor, sequences: int, config: CorrectionConfig
) -> tuple[Tensor, Tensor]:
    """What each token's loss is multiplied by [R], and which tokens still count [R] bool.

    A weight is exactly 1 where both log-probabilities are the same bits. A masked token has weight 0; the loss is
    divided as if it were there, so that a batch of bad tokens takes a small step.
    """
    delta_R = log_ratio(trainer_R, rollout_R)
    weight_R = torch.ones_like(delta_R)
    kept_R = torch.ones_like(delta_R, dtype=torch.bool)
    if config.level != "none":
        raw_R = _at_level(delta_R, owner_R, sequences, config.level)
        if config.action == "truncate":
            weight_R = raw_R.clamp(config.low, config.high)
        else:
            kept_R = (raw_R >= config.low) & (raw_R <= config.high)
            weight_R = raw_R
    if config.reject_low is not None or config.reject_high is not None:
        mean_R = _at_level(delta_R, owner_R, sequences, "geometric")
        kept_R = kept_R & (mean_R >= (config.reject_low or 0.0))
        kept_R = kept_R & (mean_R <= (torch.inf if config.reject_high is None else config.reject_high))
    return weight_R.masked_fill(~kept_R, 0.0), kept_R


def log_ratio(trainer_R: Tensor, rollout_R: Tensor) -> Tensor:
    """log π_old - log μ of each token [R], in fp32, no further from 0 than 20."""
    return (trainer_R.float() - rollout_R.float()).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


@torch.no_grad()
def mismatch(trainer_R: Tensor, rollout_R: Tensor, kept_R: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over tokens for the journal: divide by `tokens`.

    mismatch: |log π_old - log μ|; kl: k3 of KL(μ | π_old), exactly 0 for equal bits; equal: tokens with equal bits;
    masked: tokens that `correct` does not keep.
    """
    delta_R = log_ratio(trainer_R, rollout_R)
    sums = {
        "mismatch": delta_R.abs(),
        "kl": delta_R.expm1() - delta_R,
        "equal": trainer_R == rollout_R,
        "masked": torch.zeros_like(delta_R) if kept_R is None else ~kept_R,
        "tokens": torch.ones_like(delta_R),
    }
    return {name: x_R.float().sum() for name, x_R in sums.items()}


@torch.no_grad()
def largest_ratio(trainer_R: Tensor, rollout_R: Tensor) -> float:
    """The largest π_old / μ or μ / π_old of a token, 1.0 at least: no sum, so ranks take the largest of theirs."""
    if not len(trainer_R):
        return 1.0
    return float(log_ratio(trainer_R, rollout_R).abs().max().exp())


def _at_level(delta_R: Tensor, owner_R: Tensor, sequences: int, level: str) -> Tensor:
    """The importance weight of each token [R], before anything is cut."""
    if level == "sequence":
        sums_S = sequence_sums(delta_R, owner_R, sequences)
        delta_R = sums_S.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)[owner_R]
    elif level == "geometric":
        delta_R = sequence_means(delta_R, owner_R, sequences)[owner_R]
    return delta_R.exp()
