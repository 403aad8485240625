"""python_passes_tests: programs as people write them (programs.txt). Each is worth 1.0, its wrong twin 0.0.

=== name of the program (its entry point, if the row names one)
code, with {{the right words || the wrong words}}
--- a test, or with "script" all tests as one text
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from twofold.align.rewards import RewardConfig
from twofold.align.rewards.passes import PassesTests
from twofold.align.rewards.wire import Batch

TWINS = re.compile(r"\{\{(.*?) \|\| (.*?)\}\}")


class Row(NamedTuple):
    """One program of two; `tests` are one case each, or a script."""

    name: str
    code: str
    tests: str | list[str]
    entry: str | None


def rows() -> list[Row]:
    found = []
    for text in Path(__file__).with_name("programs.txt").read_text().split("=== ")[1:]:
        head, _, body = text.partition("\n")
        code, *tests = re.split(r"^---( script)?\n", body.rstrip("\n") + "\n", flags=re.MULTILINE)
        name, _, entry = head.partition(" (")
        script = tests[1] if tests[0] else None
        found.append(Row(name, code, script or tests[1::2], entry.rstrip(")") or None))
    return found


def judged(part: int) -> dict[str, float | None]:
    """Each program's value with its right (1) or wrong (2) words."""
    table = rows()
    scorer = PassesTests(RewardConfig(kind="python_passes_tests", seconds=4.0, partial=False))
    codes = [TWINS.sub(lambda found: found[part], row.code) for row in table]
    columns: dict[str, list[Any]] = {
        "tests": [row.tests for row in table],
        "entry_point": [row.entry for row in table],
    }
    scored = scorer(Batch([""] * len(table), codes, [[]] * len(table), columns, 0))
    assert not [fault for fault in scored.faults if fault.count], scored.faults
    return {row.name: value for row, value in zip(table, scored.values, strict=True)}


def test_the_table() -> None:
    table = rows()
    assert len(table) >= 75 and len({row.name for row in table}) == len(table)
    assert all(len(TWINS.findall(row.code)) == 1 and row.tests for row in table)
    assert [row.name for row in table if isinstance(row.tests, str)] == ["check, checked"]


def test_right_programs_pass() -> None:
    assert {name for name, value in judged(1).items() if value != 1.0} == set()


def test_their_wrong_twins_fail() -> None:
    assert {name for name, value in judged(2).items() if value != 0.0} == set()
