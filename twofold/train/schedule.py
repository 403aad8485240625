r"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

    cosine, linear   /‾‾\       constant  /‾‾‾‾‾   one_cycle    ,‾.        wsd  /‾‾‾‾‾\
                    /    `-.              /                     /   `-.          /       \
                   0  warmup  steps-1                       start    floor          down steps
"""

from __future__ import annotations

import math

from .config import ScheduleConfig, Shape


def lr_at(step: int, peak: float, config: ScheduleConfig) -> float:
    """The rate of step `step` (from 0): a line up to `peak` over the warm-up, then the config's kind.

    Half a cosine (SGDR, Loshchilov and Hutter 2017), a line, nothing, one cycle (Smith 2018: rising from a part of the
    peak, falling to the floor), or flat and then down over the last steps (WSD, Hu et al. 2024).
    """
    if config.kind == "one_cycle":
        return peak * _one_cycle(step, config)
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.kind == "constant":
        return peak
    if config.kind == "wsd":
        done = (step + 1 - (config.steps - config.down)) / config.down
        left = _left(min(max(done, 0.0), 1.0), config.shape or "cosine")
    else:
        span = max(config.steps - 1 - config.warmup, 1)
        left = _left(min((step - config.warmup) / span, 1.0), config.kind)
    return peak * (config.min_ratio + (1.0 - config.min_ratio) * left)


def _one_cycle(step: int, config: ScheduleConfig) -> float:
    start = 1 / 25 if config.start_ratio is None else config.start_ratio
    shape, top = config.shape or "cosine", config.warmup - 1
    if step < top:
        return start + (1.0 - start) * (1.0 - _left(step / top, shape))
    down = min((step - top) / max(config.steps - 1 - top, 1), 1.0)
    return config.min_ratio + (1.0 - config.min_ratio) * _left(down, shape)


def _left(done: float, shape: Shape) -> float:
    """How much of the way is left, from 1 to 0, when `done` of it is done; sqrt is 1 - sqrt (Haegele et al. 2024)."""
    match shape:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return 1.0 - done
        case "sqrt":
            return 1.0 - math.sqrt(done)
