"""The figures of the rollout benchmark: rates, steps, ours against a peer's, and whether the work was the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from turns import Spread

GOALS = {"rollout": 10.0, "step": 4.0}
"""Tokens a second of a rollout, and the time of a whole step: ours over the peer's."""
APART = {"grad_norm": 0.005, "value_loss": 0.001, "reward": 1e-4}
"""How far figures of the same answers may be apart, as a share of ours. TRL adds 1e-4 to a group's deviation."""
FRESH = 5.0
"""Standard errors that the mean rewards of two engines' own answers may be apart: they draw from one policy."""


@dataclass(kw_only=True)
class Side:
    """One engine of a match: each step's seconds, its rollout's, tokens of the answers, and its figures."""

    about: str = ""
    seconds: list[float] = field(default_factory=list)
    rollout: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    rollout_processor: list[float] = field(default_factory=list)
    """The same by the processor's clock: on one thread, what a busy machine does not change much."""
    tokens: list[int] = field(default_factory=list)
    told: list[dict[str, float]] = field(default_factory=list)
    peak_mib: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    """Figures of the first step, whose answers are the same for all."""

    def add(self, answer: Mapping[str, Any]) -> None:
        """What one turn came to."""
        for name in ("seconds", "rollout", "processor", "rollout_processor", "tokens", "told"):
            getattr(self, name).extend(answer[name])
        self.peak_mib = max(self.peak_mib, answer["peak_mib"])

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each step's rollout."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.rollout, strict=True)]

    @property
    def pace(self) -> list[float]:
        """Tokens of answers a second of each whole step: where answers end by themselves, no two steps are as long."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def rest(self) -> list[float]:
        """Seconds of each step beside its rollout: rewards, log-probabilities, the update."""
        return [whole - part for whole, part in zip(self.seconds, self.rollout, strict=True)]

    def record(self) -> dict[str, Any]:
        """This side for the file."""
        parts = {"rollout_tokens_s": self.rates, "step_s": self.seconds, "rest_s": self.rest}
        parts |= {"step_processor_s": self.processor, "rollout_processor_s": self.rollout_processor}
        found = {name: vars(Spread.of(values)) for name, values in parts.items()}
        return {"about": self.about, "tokens": self.tokens, "peak_mib": self.peak_mib, "first": self.first} | found


def ratios(ours: Side, theirs: Side) -> dict[str, Spread]:
    """Ours over theirs, turn by turn: of the rollout and of the step, both by tokens of answers."""
    both = {"rollout": (ours.rates, theirs.rates), "step": (ours.pace, theirs.pace)}
    return {name: Spread.of([a / b for a, b in zip(*pair)]) for name, pair in both.items()}


def apart(ours: Side, theirs: Side) -> dict[str, float]:
    """How far the first step's figures are from ours, as a share, of those that both tell and that mean something."""
    names = [name for name in APART if name in ours.first and name in theirs.first]
    return {name: abs(theirs.first[name] / ours.first[name] - 1.0) for name in names}


def alike(ours: Side, theirs: Side, answers: int) -> bool:
    """Whether the answers that each drew by itself are worth the same, as those of one policy are."""
    one, other = ([it["reward"] for it in side.told] for side in (ours, theirs))
    deviation = statistics.mean(it["reward_std"] for it in ours.told)
    error = deviation * math.sqrt(1 / (answers * len(one)) + 1 / (answers * len(other)))
    return abs(statistics.mean(one) - statistics.mean(other)) < FRESH * error


def same_work(ours: Side, theirs: Side, answers: int) -> str:
    """What was found of it, and the verdict."""
    found = apart(ours, theirs)
    good = all(value <= APART[name] for name, value in found.items()) and alike(ours, theirs, answers)
    figures = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    return f"same answers, apart: {figures}; {'the same work' if good else 'NOT THE SAME WORK'}"


def told(sides: Mapping[str, Side], answers: int) -> list[str]:
    """The table of a match; ours is the first side."""
    (name, ours), *peers = sides.items()
    heads = ("rollout tokens/s", "step s", "beside the rollout s", "processor s", "mean answer")
    lines = [_row("", heads)]
    for each, side in sides.items():
        busy = f"{statistics.median(side.rollout_processor):.1f} of {statistics.median(side.processor):.1f}"
        length = f"{sum(side.tokens) / (answers * len(side.tokens)):.1f}"
        lines.append(_row(each, (text(side.rates, 0), text(side.seconds, 2), text(side.rest, 2), busy, length)))
    for peer, theirs in peers:
        found = ratios(ours, theirs)
        for what, spread in found.items():
            goal = GOALS[what]
            verdict = "reached" if spread.median >= goal else f"missed, {spread.median / goal:.2f} of it"
            lines.append(f"  {what}: {name} {spread.text('times', 2)} {peer}; goal {goal:g} {verdict}")
        lines.append(f"  {peer}: {same_work(ours, theirs, answers)}")
    return lines


def _row(name: str, cells: tuple[str, ...]) -> str:
    widths = (27, 24, 24, 14, 11)
    return f"  {name:<9} " + " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def text(values: list[float], digits: int) -> str:
    """Median, least and most."""
    spread = Spread.of(values)
    return f"{spread.median:,.{digits}f} ({spread.least:,.{digits}f} to {spread.most:,.{digits}f})"
