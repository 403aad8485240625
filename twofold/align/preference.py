"""The losses of preferences: reward models, DPO and its relatives, pair by pair or answer by answer.

With h = log(π(chosen) / π_ref(chosen)) - log(π(rejected) / π_ref(rejected)), log π̄ a mean over an answer's tokens:

    reward   -log σ(s_chosen - s_rejected - margin) + centring · (s_chosen + s_rejected)²
    dpo      -log σ(β h - margin)          cDPO: (1 - ε) of it, and ε of that with the answers swapped
    ipo      (h̄ - 1 / 2β)²                 h̄ as h with means over tokens
    hinge    max(0, 1 - β h)
    kto      w (1 - σ(±(β log(π / π_ref) - β z)))    + for desirable answers, z the KL of mismatched ones
    orpo     -log π̄(chosen) - β log σ(log odds(chosen) - log odds(rejected))
    simpo    -log σ(β (log π̄(chosen) - log π̄(rejected)) - γ)

Shapes: P pairs, S answers; everything is per pair or per answer, so a step's loss is the sum over its number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .preference_config import DpoConfig

SURE = -1e-6
"""A mean log-probability above this counts as this one: the odds of a probability of 1 are infinite."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What the losses know of P pairs: log-probabilities summed over an answer's tokens, and how many they are."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    ref_chosen_P: Tensor | None = None
    """None: without a reference, as if it gave every answer the same probability."""
    ref_rejected_P: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log(π / π_ref) of the chosen and of the rejected answers [P]."""
        if self.ref_chosen_P is None or self.ref_rejected_P is None:
            return self.chosen_P, self.rejected_P
        return self.chosen_P - self.ref_chosen_P, self.rejected_P - self.ref_rejected_P

    def means(self) -> tuple[Tensor, Tensor]:
        """The mean log-probability of a token of the chosen and of the rejected answers [P]."""
        return self.chosen_P / self.chosen_tokens_P, self.rejected_P / self.rejected_tokens_P


def pair_loss(pairs: Pairs, config: DpoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair's loss, and the implicit rewards of its answers (no gradient), [P]; every `config.loss` but "kto"."""
    beta, smoothing = config.beta, config.label_smoothing
    chosen_P, rejected_P = pairs.means() if config.loss in ("orpo", "simpo") else pairs.log_ratios()
    if config.loss == "ipo":
        chosen_P, rejected_P = chosen_P / pairs.chosen_tokens_P, rejected_P / pairs.rejected_tokens_P
    if config.loss == "dpo":
        loss_P = dpo(chosen_P - rejected_P, beta, smoothing, config.margin)
    elif config.loss == "ipo":
        loss_P = ipo(chosen_P - rejected_P, beta)
    elif config.loss == "hinge":
        loss_P = hinge(chosen_P - rejected_P, beta)
    elif config.loss == "orpo":
        loss_P = orpo(chosen_P, rejected_P, beta)
    elif config.loss == "simpo":
        loss_P = simpo(chosen_P, rejected_P, beta, config.gamma, smoothing)
    else:
        raise ValueError(f"'{config.loss}' has no pairs: use kto")
    if config.nll:
        loss_P = loss_P - config.nll * pairs.means()[0]
    return loss_P, beta * chosen_P.detach(), beta * rejected_P.detach()


def bradley_terry(
    chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """A reward model's loss [P]: the chosen answer wins with σ of the scores' difference (Bradley & Terry 1952).

    `margin_P` asks more of pairs that differ more (Llama 2, Touvron et al. 2023); `centring` draws scores, which the
    loss knows only up to a constant, to a mean of 0 (Eisenstein et al. 2023).
    """
    loss_P = -logsigmoid(chosen_P.float() - rejected_P.float() - margin_P)
    return loss_P + centring * (chosen_P.float() + rejected_P.float()).square()


def dpo(h_P: Tensor, beta: float, smoothing: float = 0.0, margin: float = 0.0) -> Tensor:
    """Direct preference optimization [P] (Rafailov et al. 2023, equation 7).

    `smoothing` is the share of pairs that may be the wrong way round (cDPO, Mitchell 2023), `margin` the implicit
    reward by which the chosen answer should win (ODPO, Amini et al. 2024).
    """
    x_P = beta * h_P - margin
    return -(1 - smoothing) * logsigmoid(x_P) - smoothing * logsigmoid(-x_P)


def ipo(h_mean_P: Tensor, beta: float) -> Tensor:
    """A squared loss that stops at a difference of 1 / 2β [P] (Azar et al. 2023, equation 17), per token."""
    return (h_mean_P - 1 / (2 * beta)).square()


def hinge(h_P: Tensor, beta: float) -> Tensor:
    """No loss beyond a margin of 1 [P] (SLiC-HF, Zhao et al. 2023, with a reference as in RSO, Liu et al. 2023)."""
    return torch.relu(1 - beta * h_P)


def kto(
    log_ratio_S: Tensor,
    desirable_S: Tensor,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Each answer's loss [S] from log(π / π_ref) and whether it is good (Ethayarajh et al. 2024, equation 7).

    `baseline` is z, the same for the whole step (`kto_baseline`).
    """
    gain_S = torch.where(desirable_S, log_ratio_S - baseline, baseline - log_ratio_S)
    weight_S = torch.where(desirable_S, desirable_weight, undesirable_weight)
    return weight_S * (1 - torch.sigmoid(beta * gain_S))


@torch.no_grad()
def kto_baseline(mismatched_N: Tensor) -> Tensor:
    """z = max(0, mean log(π / π_ref)), over prompts with answers that belong to others, of the whole batch."""
    return mismatched_N.float().mean().clamp(min=0.0) if len(mismatched_N) else torch.zeros(())


def orpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float) -> Tensor:
    """NLL of the chosen answer plus β times that of its odds being the better [P] (Hong et al. 2024, equation 6)."""
    log_odds_ratio_P = _log_odds(chosen_mean_P.float()) - _log_odds(rejected_mean_P.float())
    return -chosen_mean_P.float() - beta * logsigmoid(log_odds_ratio_P)


def simpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """DPO without a reference, length-normalised, won only by `gamma` [P] (Meng et al. 2024, equation 6)."""
    return dpo(chosen_mean_P.float() - rejected_mean_P.float(), beta, smoothing, gamma)


@torch.no_grad()
def preference_figures(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of scores or implicit rewards, for the journal: divide by `pairs`. A tie is not accurate."""
    sums = {
        "accuracy": chosen_P > rejected_P,
        "margin": chosen_P - rejected_P,
        "chosen": chosen_P,
        "rejected": rejected_P,
        "pairs": torch.ones_like(chosen_P),
    }
    return {name: x_P.float().sum() for name, x_P in sums.items()}


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    logp = logp.clamp(max=SURE)
    return logp - (-logp.expm1()).log()
