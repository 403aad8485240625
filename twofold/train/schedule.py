"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def lr_at(step: int, peak: float, config: ScheduleConfig) -> float:
    r"""The rate of step `step` (from 0): a line up to `peak` over the warm-up, then half a cosine (SGDR, 2017).

        peak       /‾‾\
                  /    `.
        floor    /       `-.
                0  warmup   steps-1
    """
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    span = max(config.steps - 1 - config.warmup, 1)
    done = min((step - config.warmup) / span, 1.0)
    return peak * (config.min_ratio + (1.0 - config.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done)))
