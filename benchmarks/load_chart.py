"""Draws curves as an SVG that reads in light and dark: one plot or several side by side, a line for each name.

│        ╭─●          the y axis starts at zero and ends at the next round number;
│   ╭──●─╯            each line has its points, its colour and its name at its end
└──────────────
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDE, HIGH, LEFT, TOP, BOTTOM, GAP = 340, 220, 58, 56, 46, 96

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328 }
  .title { font-size: 14px; font-weight: 600 } .small { font-size: 11px; fill: #59636e }
  .grid { stroke: #d1d9e0 } polyline { fill: none; stroke-width: 2 }
  .c0 { stroke: #0969da; fill: #0969da } .c1 { stroke: #bc4c00; fill: #bc4c00 } .c2 { stroke: #1a7f37; fill: #1a7f37 }
  .c3 { stroke: #8250df; fill: #8250df } .c4 { stroke: #9a6700; fill: #9a6700 }
  text.c0, text.c1, text.c2, text.c3, text.c4 { stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 } .grid { stroke: #3d444d }
    .c0 { stroke: #4493f8; fill: #4493f8 } .c1 { stroke: #f0883e; fill: #f0883e } .c2 { stroke: #3fb950; fill: #3fb950 }
    .c3 { stroke: #ab7df8; fill: #ab7df8 } .c4 { stroke: #d29922; fill: #d29922 }
  }
  polyline { fill: none !important }
"""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One pair of axes and its lines."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]


def draw(title: str, note: str, plots: Sequence[Plot]) -> str:
    """The whole drawing; `note` stands below, and says what machine it was."""
    width = len(plots) * (LEFT + WIDE + GAP)
    height = TOP + HIGH + BOTTOM + 22
    parts = [part for number, plot in enumerate(plots) for part in _plot(plot, LEFT + number * (LEFT + WIDE + GAP))]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            _text(12, 22, title, "title"),
            *parts,
            _text(12, height - 8, note, "small"),
            "</svg>\n",
        ]
    )


def _plot(plot: Plot, left: float) -> list[str]:
    points = [point for line in plot.lines.values() for point in line if all(map(math.isfinite, point))]
    most_x, most_y = (
        _round_up(max((x for x, _ in points), default=1)),
        _round_up(max((y for _, y in points), default=1)),
    )
    foot = TOP + HIGH

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * WIDE, foot - y / most_y * HIGH

    parts = [_text(left, TOP - 12, plot.title, "small")]
    for step in range(5):
        x, y = place(most_x * step / 4, most_y * step / 4)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{most_y * step / 4:g}", "small", "end"))
        parts.append(_text(x, foot + 16, f"{most_x * step / 4:g}", "small", "middle"))
    parts.append(_text(left + WIDE / 2, foot + 34, plot.x, "small", "middle"))
    parts.append(_text(left + WIDE, TOP - 12, plot.y, "small", "end"))
    ends: list[float] = []
    for number, (name, line) in enumerate(plot.lines.items()):
        drawn = [place(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]
        if not drawn:
            continue
        colour = f"c{number % 5}"
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline class="{colour}" points="{corners}"/>')
        parts += [f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in drawn]
        at = drawn[-1][1] + 4
        while any(abs(at - other) < 14 for other in ends):
            at += 14
        ends.append(at)
        parts.append(_text(drawn[-1][0] + 8, at, name, colour))
    return parts


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * 0.999)


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
