"""The judge of the bundled model: what counts as a line that parses, and as a right answer."""

from __future__ import annotations

import pytest

from benchmarks.quality import lines_that_parse, right


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("def f(x):\n", "    return x\n\ny = 1\n", (3, 3)),
        ("x = 1\n", "y = (x\nz = = 2\nw = 1\n", (1, 3)),
        ("def f(x):\n", "    if x:\n        return [\n            1,\n        ]\n    cut off", (4, 4)),
        ("def f(", "x):\n    return 1\n", (2, 2)),
        ("    def f(self):\n", "        return 1\n    def g(self):\n", (2, 2)),
        ("def f(x):\n", "return x +\n", (0, 1)),
        ("x", "yz", (0, 0)),
    ],
)
def test_lines_that_parse(prompt: str, completion: str, expected: tuple[int, int]) -> None:
    assert lines_that_parse(prompt, completion) == expected


def test_right() -> None:
    assert right("abs", "abs returns the absolute value of the argument.")
    assert right("sum", "sum returns the sum of an iterable of numbers.")
    assert not right("sum", "sum returns a sorted list.")
    assert not right("json.dumps", "json.dumps does something.")
