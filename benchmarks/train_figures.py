"""The figures of the training benchmark: rates, whom each peer is compared with, and whether the work was the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from turns import Spread

GOAL = 1.3
TOLERANCE = 1e-3
"""Nats that the losses of two engines may be apart after the same steps in fp32."""


@dataclass(kw_only=True)
class Outcome:
    """One engine of a cell: tokens a second by turn, the most memory of a rank, the mean loss by step."""

    ours: bool
    about: str = ""
    rates: dict[int, float] = field(default_factory=dict)
    peak_mib: float = 0.0
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def rate(self) -> Spread:
        return Spread.of(list(self.rates.values()))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A peer and the fastest of ours that holds no more memory than it does, if there is one."""

    peer: str
    within: str = ""
    ratio: Spread | None = None

    @property
    def reached(self) -> bool:
        return self.ratio is not None and self.ratio.median >= GOAL


def compare(name: str, outcomes: Mapping[str, Outcome]) -> Compared:
    """What a peer is worth against ours at equal or less memory; ratios are of the turns that both had."""
    peer = outcomes[name]
    within = {key: each for key, each in outcomes.items() if each.ours and each.peak_mib <= peer.peak_mib}
    both = {key: [each.rates[t] / peer.rates[t] for t in peer.rates if t in each.rates] for key, each in within.items()}
    ratios = {key: Spread.of(values) for key, values in both.items() if values}
    if not ratios:
        return Compared(peer=name)
    best = max(ratios, key=lambda key: ratios[key].median)
    return Compared(peer=name, within=best, ratio=ratios[best])


def fastest(outcomes: Mapping[str, Outcome], *, ours: bool) -> str | None:
    """The engine with the most tokens a second, of ours or of the peers."""
    names = [name for name, each in outcomes.items() if each.ours == ours and each.rates]
    return max(names, key=lambda name: outcomes[name].rate.median, default=None)


def leanest(outcomes: Mapping[str, Outcome], *, ours: bool) -> str | None:
    """The engine with the least memory, of ours or of the peers."""
    names = [name for name, each in outcomes.items() if each.ours == ours and each.rates]
    return min(names, key=lambda name: outcomes[name].peak_mib, default=None)


def apart(outcomes: Mapping[str, Outcome]) -> dict[str, tuple[float, int]]:
    """For each engine but the first: how far its losses are from the first's, in nats, over how many common steps."""
    first, *rest = outcomes.values()
    found = {}
    for name, each in zip(list(outcomes)[1:], rest, strict=True):
        common = first.losses.keys() & each.losses.keys()
        found[name] = max((abs(first.losses[s] - each.losses[s]) for s in common), default=float("inf")), len(common)
    return found


def told(outcomes: Mapping[str, Outcome]) -> list[str]:
    """The table of one cell, and what follows from it."""
    lines = [f"  {'engine':<13} {'tokens/s of all ranks':<30} {'peak MiB a rank':>15}   ours within its memory, ratio"]
    for name, each in outcomes.items():
        line = f"  {name:<13} {_text(each.rate):<30} {each.peak_mib:>15,.0f}"
        if not each.ours:
            found = compare(name, outcomes)
            line += f"   {found.within}, {_ratio(found)}" if found.ratio else "   none of ours holds so little"
        lines.append(line)
    best, least, our_least = fastest(outcomes, ours=False), leanest(outcomes, ours=False), leanest(outcomes, ours=True)
    if best:
        found = compare(best, outcomes)
        if found.ratio:
            verdict = "reached" if found.reached else f"missed, {found.ratio.median / GOAL:.2f} of it"
            lines.append(f"  best peer {best}: ours {found.ratio.median:.2f} times as fast; goal {GOAL:g} {verdict}")
    if least and our_least:
        share = outcomes[our_least].peak_mib / outcomes[least].peak_mib
        lines.append(f"  least memory: {our_least}, {share:.2f} of the leanest peer's ({least})")
    distances = apart(outcomes)
    if distances:
        far, steps = max(distances.values()), min(steps for _, steps in distances.values())
        verdict = "the same work" if far[0] <= TOLERANCE else "NOT THE SAME WORK"
        last = max(next(iter(outcomes.values())).losses.items())
        lines.append(f"  losses at most {far[0]:.1e} apart, {steps} steps or more, {last[1]:.3f} at last: {verdict}")
    return lines


def _ratio(found: Compared) -> str:
    return (_text(found.ratio, 2) if found.ratio else "") + ("*" if found.reached else "")


def _text(spread: Spread, digits: int = 0) -> str:
    return spread.text("", digits).replace("  (", " (")


def record(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """One cell for the file."""
    distances, out = apart(outcomes) if outcomes else {}, {}
    for name, each in outcomes.items():
        out[name] = {
            "about": each.about,
            "ours": each.ours,
            "tokens_per_second": each.rate.median,
            "least": each.rate.least,
            "most": each.rate.most,
            "turns": len(each.rates),
            "peak_mib": each.peak_mib,
            "losses": {str(step): loss for step, loss in sorted(each.losses.items())},
            "apart": distances.get(name, (0.0, 0))[0],
        }
        if not each.ours:
            found = compare(name, outcomes)
            out[name] |= {"within": found.within, "ratio": found.ratio.median if found.ratio else None, "goal": GOAL}
    return out
