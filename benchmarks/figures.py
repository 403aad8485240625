"""The figures of the serving benchmark: what a workload's seconds mean, the goals, and our share of the limits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engines import BITS, HEAD_BITS
from turns import Spread
from workload import Workload

STATIC_GOAL = 5.0  # over transformers' static batching, on C and D


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of a workload. `goal` is ours over the best peer's."""

    title: str
    unit: str
    goal: float
    lower: bool = False  # seconds, where fewer are better

    def figure(self, seconds: float, first: float, work: Workload) -> float:
        """The figure of one run; `first` is how long a run of one token takes, prompt and all."""
        if self.lower:
            return seconds
        if self.unit == "decoded tokens/s":
            return (work.tokens_out - 1) / max(seconds - first, 1e-9)
        return (work.tokens_in if self.unit == "prompt tokens/s" else work.tokens_out) / seconds

    def ratio(self, ours: float, theirs: float) -> float:
        """How many times as good ours is."""
        return theirs / ours if self.lower else ours / theirs

    def goal_over(self, peer: str) -> float:
        return STATIC_GOAL if peer == "transformers" and self.title[0] in "CD" else self.goal


CELLS = {
    "A": Cell(title="A decode", unit="decoded tokens/s", goal=1.2),
    "B": Cell(title="B prefill", unit="prompt tokens/s", goal=1.2),
    "C": Cell(title="C batch", unit="output tokens/s", goal=1.5),
    "D": Cell(title="D mixed", unit="output tokens/s", goal=1.5),
    "E": Cell(title="E cold", unit="s", goal=2.0, lower=True),
    "E'": Cell(title="E' warm", unit="s", goal=2.0, lower=True),
}


@dataclass(kw_only=True)
class Against:
    """One peer in one cell: its figures, and ours over them, turn by turn."""

    figures: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def record(self, goal: float) -> dict[str, Any]:
        ratio = Spread.of(self.ratios)
        return {
            "figure": statistics.median(self.figures),
            "turns": len(self.figures),
            "ratio": ratio.median,
            "ratio_least": ratio.least,
            "ratio_most": ratio.most,
            "goal": goal,
            "to_goal": ratio.median / goal,
        }


@dataclass(kw_only=True)
class Results:
    """All that was measured at one precision: our figures and the peers', by cell."""

    ours: dict[str, list[float]] = field(default_factory=dict)
    peers: dict[str, dict[str, Against]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    waste: float = 0.0

    def record(self, shares: dict[str, float]) -> dict[str, Any]:
        cells = {}
        for key, figures in self.ours.items():
            spread, cell = Spread.of(figures), CELLS[key]
            against = self.peers.get(key, {})
            cells[key] = {
                "unit": cell.unit,
                "ours": spread.median,
                "least": spread.least,
                "most": spread.most,
                "peers": {name: each.record(cell.goal_over(name)) for name, each in against.items()},
            }
        return {
            "engines": self.names,
            "not_here": self.absent,
            "same_tokens": self.agreement,
            "shares": shares,
            "kv_waste": self.waste,
            "cells": cells,
        }


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of tokens before the first one that differs, over all requests."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return same / max(1, sum(map(len, ours)))


def shares(results: Results, form: str, body: int, head: int, prompt: int, limits: dict[str, Any]) -> dict[str, float]:
    """How near the limits: A to reading every weight once a token, B to multiplying by every weight of the layers.

    B's arithmetic is int8 where the weights are int8 or int4, and fp32 otherwise; attention is left out.
    """
    found = {}
    if "A" in results.ours:
        gigabytes = (body * BITS[form] + head * HEAD_BITS[form]) / 8e9
        found["A of read bandwidth"] = statistics.median(results.ours["A"]) * gigabytes / limits["read_gb_s"]
    if "B" in results.ours:
        integer = form in ("int8", "int4")
        peak = limits["int8_gop_s" if integer else "fma_gflop_s"]
        rate = statistics.median(results.ours["B"]) * 2 * (body + head / prompt) / 1e9
        found[f"B of the {'int8' if integer else 'fp32'} peak"] = rate / peak
    return found


def best_of(limits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The most that was seen of each limit in one run."""
    numbers = [key for key, value in limits[0].items() if isinstance(value, int | float)]
    return limits[0] | {key: max(each[key] for each in limits) for key in numbers}


def told(key: str, results: Results) -> list[str]:
    """Lines about one cell: ours, then each peer."""
    cell = CELLS[key]
    digits = 2 if cell.lower else 1
    lines = [f"  {cell.title:<10} twofold       {figure_text(results.ours[key], digits)} {cell.unit}"]
    for name, each in results.peers.get(key, {}).items():
        record = each.record(cell.goal_over(name))
        verdict = "reached" if record["to_goal"] >= 1 else f"missed, {record['to_goal']:.2f} of it"
        lines.append(
            f"  {'':<10} {name:<13} {figure_text(each.figures, digits)} {cell.unit}"
            f"; ratio {figure_text(each.ratios, 2)}; goal {record['goal']:g} {verdict}"
        )
    return lines


def figure_text(values: Sequence[float], digits: int) -> str:
    """The median, and from where to where when there is more than one."""
    spread = Spread.of(values)
    text = f"{spread.median:,.{digits}f}"
    return f"{text} ({spread.least:,.{digits}f} to {spread.most:,.{digits}f})" if len(values) > 1 else f"{text} (once)"


def table(records: dict[str, dict[str, Any]]) -> list[str]:
    """Ratios, ours over each peer, a row for each precision and peer; a star where the goal is reached."""
    lines = [f"{'':<6} {'ours over':<13}" + "".join(f"{cell.title:>11}" for cell in CELLS.values())]
    for form, record in records.items():
        peers = sorted({name for cell in record["cells"].values() for name in cell["peers"]})
        for name in peers:
            row = f"{form:<6} {name:<13}"
            for key in CELLS:
                found = record["cells"].get(key, {}).get("peers", {}).get(name)
                star = "*" if found and found["to_goal"] >= 1 else " "
                row += f"{found['ratio']:>10.2f}{star}" if found else f"{'':>11}"
            lines.append(row)
        lines += [f"{form:<6} {name:<13}  not measured: {why}" for name, why in record["not_here"].items()]
    return [*lines, f"{'':<6} {'goal':<13}" + "".join(f"{cell.goal:>10.1f} " for cell in CELLS.values())]
