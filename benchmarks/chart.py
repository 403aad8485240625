"""Draws the table of ratios as an SVG that reads in light and dark: a row for each precision and peer, a column a cell.

┌────────┬──────────────┬──────────────┐
│ 1.43   │ 0.82         │  ...         │   the ratio, ours over theirs
│ ████▌│ │ ██▋  │       │              │   a bar of it, and a mark at the goal
└────────┴──────────────┴──────────────┘
"""

from __future__ import annotations

from html import escape
from typing import Any

from figures import CELLS

LEFT, WIDE, HIGH, TOP = 170, 112, 38, 74
FULL = 90  # pixels of a bar that is twice the goal, or more

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #59636e }
  .head, .form { font-weight: 600 }
  .met { fill: #1a7f37 } .missed { fill: #bc4c00 }
  .track { fill: #d1d9e0 } .goal { stroke: #1f2328; stroke-width: 1.5 } .line { stroke: #d1d9e0 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 }
    .met { fill: #3fb950 } .missed { fill: #f0883e }
    .track { fill: #3d444d } .goal { stroke: #f0f6fc } .line { stroke: #3d444d }
  }
"""


def chart(record: dict[str, Any]) -> str:
    """The whole drawing of a record of serving.py."""
    parts: list[str] = []
    y = TOP
    for form, found in record["formats"].items():
        peers = sorted({name for cell in found["cells"].values() for name in cell["peers"]})
        rows = peers or ["nobody to compare with"]
        parts.append(f'<line class="line" x1="12" x2="{LEFT + WIDE * len(CELLS)}" y1="{y}" y2="{y}"/>')
        parts.append(text(12, y + 24, form, "form"))
        for name in rows:
            parts.append(text(64, y + 24, name))
            for column, key in enumerate(CELLS):
                against = found["cells"].get(key, {}).get("peers", {}).get(name)
                if against:
                    parts += cell(LEFT + WIDE * column, y, against)
            y += HIGH
    width, height = LEFT + WIDE * len(CELLS) + 12, y + 34
    head = [text(LEFT + WIDE * i, TOP - 12, each.title, "head") for i, each in enumerate(CELLS.values())]
    limits = record["limits"]
    machine = (
        f"{limits['read_gb_s']:.0f} GB/s read, {limits['fma_gflop_s']:.0f} GFLOP/s fp32, "
        f"{limits['int8_gop_s']:.0f} GOP/s int8, {record['threads']} threads; {record['scaled']}"
    )
    title = f"Twofold over other engines, {record['model']} model: more than 1 is faster, the mark is the goal"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            text(12, 26, title, "head"),
            *head,
            *parts,
            text(12, height - 12, machine, "small"),
            "</svg>\n",
        ]
    )


def cell(x: int, y: int, against: dict[str, Any]) -> list[str]:
    """A ratio, its spread, and a bar in which the goal is half the way."""
    kind = "met" if against["to_goal"] >= 1 else "missed"
    length = max(2.0, min(1.0, against["to_goal"] / 2) * FULL)
    spread = f"{against['ratio_least']:.2f} to {against['ratio_most']:.2f}" if against["turns"] > 1 else "once"
    goal = x + FULL / 2
    return [
        text(x, y + 18, f"{against['ratio']:.2f}"),
        text(x + 40, y + 18, spread, "small"),
        f'<rect class="track" x="{x}" y="{y + 25}" width="{FULL}" height="6" rx="3"/>',
        f'<rect class="{kind}" x="{x}" y="{y + 25}" width="{length:.1f}" height="6" rx="3"/>',
        f'<line class="goal" x1="{goal}" x2="{goal}" y1="{y + 23}" y2="{y + 33}"/>',
    ]


def text(x: float, y: float, words: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text{of} x="{x}" y="{y}">{escape(words)}</text>'
