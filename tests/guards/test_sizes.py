"""Rooms stay readable: a file is at most 400 lines, a function at most 60, a command of the door at most 40.

The exceptions below may only shrink: nothing may grow past its entry, and an entry that is no longer needed fails.
"""

from __future__ import annotations

import ast
from pathlib import Path

from repository import PACKAGE, files, name, python_files, tree

from twofold.cli import COMMANDS

FILE, FUNCTION, COMMAND = 400, 60, 40

LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}


def functions(path: Path) -> dict[str, int]:
    """Lines of each function of a file, by "file::name"; a nested function counts in its outer one as well."""
    found = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[f"{name(path)}::{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    return found


def ratchet(sizes: dict[str, int], allowed: dict[str, int], limit: int) -> list[str]:
    wrong = []
    for what, size in sizes.items():
        if size > allowed.get(what, limit):
            wrong.append(f"{what} has {size} lines, more than {allowed.get(what, limit)}: split it")
        elif what in allowed and size <= limit:
            wrong.append(f"{what} has shrunk to {size} lines: remove its entry")
    return wrong + [f"{what} is gone: remove its entry" for what in allowed if what not in sizes]


def test_files_are_short() -> None:
    sources = [p for p in files() if p.is_relative_to(PACKAGE) and p.suffix in (".py", ".js", ".css", ".html")]
    sources += python_files("tests", "benchmarks", "examples")
    sizes = {name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in sources}
    assert not ratchet(sizes, LONG_FILES, FILE)


def test_tests_have_names_of_their_own() -> None:
    """Test files of one name in two folders cannot be collected together."""
    names = [p.name for p in python_files("tests") if p.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def test_functions_are_short() -> None:
    sizes: dict[str, int] = {}
    for path in python_files("twofold", "tests", "benchmarks", "examples"):
        sizes |= functions(path)
    assert not ratchet(sizes, LONG_FUNCTIONS, FUNCTION)


def test_commands_are_shorter() -> None:
    sizes = {key.split("::")[1]: size for key, size in functions(PACKAGE / "cli.py").items()}
    made = [name.replace("-", "_") for name in COMMANDS]
    assert not [f"{name}: {sizes[name]} lines" for name in made if sizes[name] > COMMAND]


def test_the_ratchet_only_turns_one_way() -> None:
    assert ratchet({"a": 500}, {}, 400)  # too long
    assert ratchet({"a": 350}, {"a": 500}, 400)  # within the rule, the entry is still there
    assert ratchet({}, {"a": 500}, 400)  # gone
    assert not ratchet({"a": 500, "b": 400}, {"a": 500}, 400)
