"""What was counted, and how sure it is: pass@k, and intervals for rates, means and differences.

A pass rate of one answer a prompt has Wilson's interval (1927), which is right for few prompts and rates near 0 and 1.
Anything else is a mean over prompts and has a bootstrap interval: the prompts are drawn again with replacement, so
that the interval speaks of other prompts of the same kind. Draws are seeded: the same figures, the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
ROUNDS = 2000
FEWEST = 8
"""Prompts below which a bootstrap has too little to draw from, and so a comparison shows nothing."""
_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and the bounds that hold it at the level of LEVEL."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of `k` answers passes, estimated without bias from `samples` of which `passed` did.

    1 - C(samples - passed, k) / C(samples, k), from Chen et al. 2021 ("Codex"). Raises ValueError for k above samples.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {passed} in {samples} samples: k is from 1 to the number of samples")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def wilson(passed: int, total: int, level: float = LEVEL) -> Interval:
    """A pass rate and its score interval (Wilson 1927); nothing counted is a rate of 0 that may be anything."""
    if total == 0:
        return Interval(0.0, 0.0, 1.0)
    z, rate = NormalDist().inv_cdf(0.5 + level / 2), passed / total
    shrink = 1 + z * z / total
    middle = (rate + z * z / (2 * total)) / shrink
    reach = z / shrink * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return Interval(rate, 0.0 if passed == 0 else middle - reach, 1.0 if passed == total else middle + reach)


def bootstrap(values: Sequence[float], seed: int = 0, level: float = LEVEL, rounds: int = ROUNDS) -> Interval:
    """The mean of one value a prompt, and the percentile interval of the means of prompts drawn again.

    Raises ValueError where there is no value.
    """
    if not values:
        raise ValueError("the mean of no values")
    given, random = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    size = max(1, min(rounds, _AT_ONCE // len(given)))
    means = [
        given[random.integers(len(given), size=(min(size, rounds - start), len(given)))].mean(axis=1)
        for start in range(0, rounds, size)
    ]
    low, high = np.quantile(np.concatenate(means), [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(given.mean()), float(low), float(high))


def share(values: Sequence[float], seed: int = 0) -> Interval:
    """`bootstrap` of values between 0 and 1.

    Where all are 0, or all 1, drawing again says nothing, and the interval is that of as many prompts that all failed
    or all passed.
    """
    if set(values) in ({0.0}, {1.0}):
        return wilson(len(values) if values[0] else 0, len(values))
    return bootstrap(values, seed)


def verdict(difference: Interval, prompts: int) -> str:
    """What a paired difference shows: "better" or "worse" when its interval leaves out 0, else "not shown"."""
    if prompts < FEWEST or difference.low <= 0.0 <= difference.high:
        return "not shown"
    return "better" if difference.low > 0.0 else "worse"
