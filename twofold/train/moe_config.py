"""What a recipe's `[moe]` table may say: how a mixture's tokens are dealt to its experts while it trains.

Nothing of it changes how a model is served: there is no capacity, no noise and no loss outside a training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import ConfigError


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Balance, capacity and noise of every mixture in the model. Left out, a token goes where it would be served."""

    balance_loss: float = 0.0
    """Times E · Σ_e f_e · p_e of each layer (Switch, GShard), f the share of choices and p the mean probability: 1 when
    all experts are used alike. transformers' `router_aux_loss_coef` is this divided by the experts of a token."""
    over: Literal["micro", "step"] = "step"
    """Whose choices f counts. step: those of all ranks and of the step's micro-batches so far, so the whole batch when
    a rank has one micro-batch (Qiu et al. 2025); micro: those of the micro-batch alone, with no communication."""
    z_loss: float = 0.0
    """Times the mean of log²(Σ exp(logits)) of each layer (ST-MoE): keeps a router's logits small."""
    bias_rate: float = 0.0
    """How far an expert's bias moves after each step, towards the mean load (DeepSeek-V3): a balance without a loss,
    for families whose checkpoints have such a bias (Ernie4_5_MoeForCausalLM)."""
    capacity: float | None = None
    """An expert takes at most this many times its even share of a micro-batch's choices; the rest is dropped."""
    min_capacity: int = 4
    """Yet no expert takes fewer choices than this."""
    drop: Literal["probs", "position"] = "probs"
    """Who is dropped from a full expert. probs: those with the least weight there; position: the last to come."""
    noise: Literal["none", "jitter", "gumbel"] = "none"
    """jitter: the router's input times 1 ± `jitter`; gumbel: experts are drawn by their probabilities, not the best."""
    jitter: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("balance_loss", "z_loss", "bias_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"moe.{name} must be 0 or more, not {getattr(self, name)}")
        if self.capacity is not None and self.capacity <= 0:
            raise ConfigError(f"moe.capacity must be more than 0, not {self.capacity}; leave it out to drop nothing")
        if self.min_capacity < 1:
            raise ConfigError(f"moe.min_capacity must be 1 or more, not {self.min_capacity}")
        if not 0.0 < self.jitter < 1.0:
            raise ConfigError(f"moe.jitter must be more than 0 and less than 1, not {self.jitter}")

    @property
    def plain(self) -> bool:
        """Whether a token goes where it would be served."""
        return self.capacity is None and self.noise == "none"
