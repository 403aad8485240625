"""Loss scaling, so that small gradients are not lost in fp16 (Micikevicius et al. 2018), by DeepSpeed's rule.

The loss is multiplied by the scale before the backward pass, the gradients are divided by it in the optimizer's pass.
A gradient that overflows skips its step; `hysteresis` of them halve the scale, a window without one doubles it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core import ConfigError, TwofoldError

FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """Loss scaling of an fp16 run; names and defaults are those of DeepSpeed's `fp16` table."""

    loss_scale: float = 0.0
    """A scale that never changes; 0: dynamic."""
    initial_scale_power: int = 16
    """The dynamic scale begins at two to this power."""
    loss_scale_window: int = 1000
    """Steps without an overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows until the scale is halved."""
    consecutive_hysteresis: bool = False
    """Count them anew after every step without one."""
    min_loss_scale: float = 1.0
    """An overflow at this scale ends the run."""

    def __post_init__(self) -> None:
        for name in ("loss_scale_window", "hysteresis", "min_loss_scale"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"fp16.{name} must be more than 0, not {getattr(self, name)}")
        if self.loss_scale < 0:
            raise ConfigError(f"fp16.loss_scale must be 0 (dynamic) or more, not {self.loss_scale}")
        if not 0 <= self.initial_scale_power <= 32:
            raise ConfigError(f"fp16.initial_scale_power must be from 0 to 32, not {self.initial_scale_power}")


class LossScaler:
    """The scale of each step; without a config it is 1 and stays so.

        step      ok ok OVERFLOW ok OVERFLOW OVERFLOW ok ... (a window)  ok
        credit     2  2     1     1     1        1                        2
        scale      s  s     s     s    s/2      s/4      s/4 ...         s/2

    All of it is a function of the overflows, so ranks that agree on those agree on the scale.
    """

    def __init__(self, config: LossScaleConfig | None = None) -> None:
        self.config = config or LossScaleConfig(loss_scale=1.0)
        self.dynamic = self.config.loss_scale == 0
        self.scale = FACTOR**self.config.initial_scale_power if self.dynamic else self.config.loss_scale
        self.credit = self.config.hysteresis
        self.step = 0
        self.overflowed = -1

    def update(self, fault: str | None) -> None:
        """After each step: `fault` says how the gradient overflowed, None that it did not.

        Raises:
            TwofoldError: it overflowed at the least scale.
        """
        if not self.dynamic:
            return
        if fault is not None:
            self._shrink(fault)
            self.overflowed = self.step
        else:
            self._grow()
        self.step += 1

    def _shrink(self, fault: str) -> None:
        if self.credit > 1:
            self.credit -= 1
        elif self.scale == self.config.min_loss_scale:
            raise TwofoldError(
                f"{fault}, though the loss scale is at its least, {self.scale:g}: lower optimizer.lr, lengthen "
                "schedule.warmup, or train in bf16"
            )
        else:
            self.scale = max(self.scale / FACTOR, self.config.min_loss_scale)

    def _grow(self) -> None:
        if self.config.consecutive_hysteresis:
            self.credit = self.config.hysteresis
        quiet = self.step - self.overflowed - 1
        if quiet > 0 and quiet % self.config.loss_scale_window == 0:
            self.credit = self.config.hysteresis
            self.scale *= FACTOR

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty when the scale never changes."""
        if not self.dynamic:
            return {}
        return {"scale": self.scale, "credit": self.credit, "step": self.step, "overflowed": self.overflowed}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        if self.dynamic and state:
            self.scale, self.credit = float(state["scale"]), int(state["credit"])
            self.step, self.overflowed = int(state["step"]), int(state["overflowed"])
