"""Loss curves in a terminal and as SVG."""

import math
import xml.etree.ElementTree as ET

from twofold.train import plot

FALLING = [(step, 5.0 * math.exp(-step / 30)) for step in range(1, 101)]


def dots(line: str) -> int:
    return sum(bin(ord(c) - 0x2800).count("1") for c in line if 0x2800 <= ord(c) < 0x2900)


def test_a_falling_curve_starts_at_the_top_left_and_ends_at_the_bottom_right() -> None:
    lines = plot.terminal(FALLING, width=40, height=6).splitlines()
    assert len(lines) == 7 and all(len(line) <= 51 for line in lines)
    rows = [line[10:] for line in lines[:6]]
    assert lines[0].startswith("   4.836 ┤") and lines[5].startswith("   0.178 ┤")
    assert dots(rows[0][:10]) > 0 and dots(rows[0][20:]) == 0
    assert dots(rows[5][:10]) == 0 and dots(rows[5][30:]) > 0
    assert lines[6].split() == ["1", "100"]


def test_few_flat_and_no_points() -> None:
    assert plot.terminal([]) == "" and plot.terminal([(1, math.nan)]) == ""
    assert dots(plot.terminal([(3, 2.0)])) == 1
    assert dots(plot.terminal([(1, 2.0), (2, 2.0), (3, math.inf)])) == 2


def test_svg_is_whole_xml_with_each_curve_inside_its_frame() -> None:
    root = ET.fromstring(plot.svg({"training": FALLING, "valid<ation>": FALLING[::10], "none": []}, title="a & b"))
    mark = "{http://www.w3.org/2000/svg}"
    curves = root.findall(f"{mark}polyline")
    assert len(curves) == 2
    points = [tuple(map(float, pair.split(","))) for pair in curves[0].get("points").split()]
    assert len(points) == 100
    assert all(56 <= x <= 704 and 32 <= y <= 324 for x, y in points)
    assert points[0][1] < points[-1][1]  # down the page as the loss falls
    texts = [text.text for text in root.findall(f"{mark}text")]
    assert "a & b" in texts and "valid<ation>" in texts and "none" not in texts


def test_svg_without_points_is_still_a_picture() -> None:
    assert ET.fromstring(plot.svg({})).tag.endswith("svg")
