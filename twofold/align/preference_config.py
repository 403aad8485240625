"""The tables of reward models and of direct preference optimization with its variants; no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import ConfigError


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """`[reward]`: a score that the better answer of each pair should have more of (Bradley & Terry 1952)."""

    centring: float = 0.0
    """Times the square of the two scores' sum: draws scores to a mean of 0 (Eisenstein et al. 2023 take 0.01)."""
    margin: Literal["none", "column"] = "none"
    """column: each pair's row names, under `margin`, by how much the chosen answer should win (Llama 2)."""

    def __post_init__(self) -> None:
        if self.centring < 0:
            raise ConfigError(f"reward.centring must be 0 or more, not {self.centring}")


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """`[dpo]`: learning from preferences without a reward model."""

    loss: Literal["dpo", "ipo", "hinge", "kto", "orpo", "simpo"] = "dpo"
    """Which one; formulas are at the top of `align/preference.py`. kto wants single answers with a label, the others
    pairs; orpo and simpo have no reference model."""
    beta: float = 0.1
    """How closely the policy is held to its reference (dpo, ipo, hinge, kto), the weight of the odds (orpo), or the
    scale of rewards (simpo, whose authors take 2.0 to 2.5)."""
    label_smoothing: float = 0.0
    """The share of pairs that may be the wrong way round (dpo and simpo): conservative DPO (Mitchell 2023)."""
    margin: float = 0.0
    """The implicit reward by which the chosen answer should win (dpo): DPO with an offset (Amini et al. 2024)."""
    gamma: float = 0.0
    """SimPO's target margin; its authors take 0.5 · beta and more."""
    nll: float = 0.0
    """Times the chosen answer's negative log-probability per token, added to the loss of a pair (RPO, Pang et al.
    2024); orpo has it already."""
    desirable_weight: float = 1.0
    """KTO's weight of good answers."""
    undesirable_weight: float = 1.0
    """KTO's weight of bad ones; good over bad, weight times number, should lie between 1 and 4/3."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"dpo.beta must be more than 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"dpo.label_smoothing must be in [0, 0.5), not {self.label_smoothing}")
        for name in ("margin", "gamma", "nll", "desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"dpo.{name} must be 0 or more, not {getattr(self, name)}")
        for name, (default, losses) in ONLY.items():
            if getattr(self, name) != default and self.loss not in losses:
                raise ConfigError(
                    f"dpo.{name} = {getattr(self, name)} does nothing with dpo.loss = '{self.loss}': "
                    f"leave it out, or choose from {', '.join(losses)}"
                )

    @property
    def reference(self) -> bool:
        """Whether a reference policy is needed."""
        return self.loss not in ("orpo", "simpo")

    @property
    def paired(self) -> bool:
        """Whether the data are pairs, not single answers with a label."""
        return self.loss != "kto"


ONLY: dict[str, tuple[float, tuple[str, ...]]] = {
    "label_smoothing": (0.0, ("dpo", "simpo")),
    "margin": (0.0, ("dpo",)),
    "gamma": (0.0, ("simpo",)),
    "nll": (0.0, ("dpo", "ipo", "hinge", "simpo")),
    "desirable_weight": (1.0, ("kto",)),
    "undesirable_weight": (1.0, ("kto",)),
}
"""The fields of DpoConfig that only some losses read, and the value that stands for "left out"."""
