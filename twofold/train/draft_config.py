"""DraftHeadConfig: a recipe's `[draft_head]`; free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import ConfigError


@dataclass(frozen=True, kw_only=True)
class DraftHeadConfig:
    """Train a head that guesses for `model.from`, which stays as it is, in the place of the model itself.

    At each token the loss is `hidden_weight` times the smooth L1 distance to the model's hidden state, and
    `token_weight` times the KL divergence from the model's next token; the mean over `depth` depths.
    """

    hidden_weight: float = 1.0
    token_weight: float = 0.1
    depth: int = 1
    """How many tokens ahead it learns to guess: from the second on it reads its own hidden states."""
    width: int | None = None
    """Of its feed-forward; left out: as wide as the model's."""

    def __post_init__(self) -> None:
        for name, low in (("hidden_weight", 0.0), ("token_weight", 0.0), ("depth", 1), ("width", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"draft_head.{name} must be {low:g} or more, not {value}")
        if not self.hidden_weight and not self.token_weight:
            raise ConfigError("draft_head.hidden_weight and token_weight are both 0: there is nothing to learn")
        if self.depth > 8:
            raise ConfigError(f"draft_head.depth must be 8 at most, not {self.depth}")
