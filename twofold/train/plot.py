"""A loss curve as braille dots for the terminal and as an SVG file, from points (step, value); no library needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

# dot (column, row) of a braille cell to its bit above U+2800
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_COLOURS = ("#2f6fde", "#e07b1a", "#3a9a4c", "#a04fc0")


def terminal(points: Points, *, width: int = 60, height: int = 8) -> str:
    """The curve in `height` lines of `width` braille cells with the value's range at the left; "" without points."""
    points = [p for p in points if math.isfinite(p[1])]
    if not points:
        return ""
    (x0, x1), (y0, y1) = _range([p[0] for p in points]), _range([p[1] for p in points])
    columns, rows = width * 2, height * 4
    sums: dict[int, list[float]] = {}
    for x, y in points:
        sums.setdefault(min(int((x - x0) / (x1 - x0) * columns), columns - 1), []).append(y)
    cells = [[0] * width for _ in range(height)]
    last: int | None = None
    for column in range(columns):
        if column not in sums:
            continue
        mean = sum(sums[column]) / len(sums[column])
        row = min(int((y1 - mean) / (y1 - y0) * rows), rows - 1)
        for dot in range(min(row, last if last is not None else row), max(row, last if last is not None else row) + 1):
            cells[dot // 4][column // 2] |= _BITS[column % 2][dot % 4]
        last = row
    lines = ["".join(chr(0x2800 + bits) for bits in line) for line in cells]
    labels = [f"{y1:8.3f} ┤"] + ["         │"] * (height - 2) + [f"{y0:8.3f} ┤"]
    foot = f"          {x0:<{width // 2}.0f}{x1:>{width - width // 2}.0f}"
    return "\n".join([label + line for label, line in zip(labels, lines)] + [foot])


def svg(curves: Mapping[str, Points], *, title: str = "", width: int = 720, height: int = 360) -> str:
    """Named curves over one axis of steps, with a grid and a legend, as a standalone SVG document."""
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    curves = {name: points for name, points in finite.items() if points}
    left, right, top, bottom = 56, 16, 32, 36
    every = [p for points in curves.values() for p in points] or [(0.0, 0.0)]
    (x0, x1), (y0, y1) = _range([p[0] for p in every]), _range([p[1] for p in every])

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, top + (y1 - y) / (y1 - y0) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="20" font-weight="600" fill="#222222">{escape(title)}</text>',
    ]
    for value in _ticks(y0, y1):
        _, y = place(x0, value)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#666666">{value:g}</text>')
    for value in _ticks(x0, x1):
        x, _ = place(value, y0)
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle" fill="#666666">{value:g}</text>')
    for number, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        x = width - right - 110 * (len(curves) - number)
        parts.append(f'<path d="M{x} 16h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="20" fill="#222222">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within the range."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / gap)
    return [round(n * gap, 10) for n in range(first, int(high / gap) + 1)]
