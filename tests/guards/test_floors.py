"""A room imports only rooms on strictly lower floors. Lazy imports and TYPE_CHECKING imports count.

8  the package itself (its public names are fetched lazily)
7  cli, commands        the one door
6  align, serve
5  engine, train        siblings: neither sees the other
4  models
3  quant
2  kernels, parallel, data
1  platforms
0  core
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import PACKAGE, name, python_files, tree

FLOORS = {
    "core": 0,
    "platforms": 1,
    "kernels": 2,
    "parallel": 2,
    "data": 2,
    "quant": 3,
    "models": 4,
    "engine": 5,
    "train": 5,
    "serve": 6,
    "align": 6,
    "door": 7,
    "package": 8,
}
DOOR = {"cli", "commands", "__main__"}


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module given as its path below `twofold`; "" is the package's own __init__."""
    first = parts[0] if parts else ""
    if first in DOOR:
        return "door"
    return first if first in FLOORS else "package"


def imported(path: Path) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """Line, module path below `twofold`, and the name taken from it, for every import of the package's own modules."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    package = here[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "twofold":
                    yield node.lineno, tuple(alias.name.split(".")[1:]), ""
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - (node.level - 1)] + module
            elif module and module[0] == "twofold":
                base = module[1:]
            else:
                continue
            for alias in node.names:
                yield node.lineno, base or (alias.name,), alias.name
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if called == "import_module" and isinstance(first, ast.Constant) and isinstance(first.value, str):
                words = first.value.split(".")
                if words[0] == "twofold":
                    yield node.lineno, tuple(words[1:]), ""


def bent(path: Path) -> list[str]:
    """The imports of one file that do not point down."""
    mine = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    wrong = []
    for line, module, taken in imported(path):
        if module[:1] == ("__version__",) or (not module and taken == "__version__"):
            continue
        theirs = room_of(module)
        if theirs != mine and FLOORS[theirs] >= FLOORS[mine]:
            wrong.append(f"{name(path)}:{line} ({mine}, floor {FLOORS[mine]}) imports {theirs} ({FLOORS[theirs]})")
    return wrong


@pytest.mark.parametrize("path", python_files("twofold"), ids=name)
def test_arrows_point_down(path: Path) -> None:
    if path != PACKAGE / "__init__.py":
        assert not bent(path), "move the noun to the lowest floor that needs it, or pass it as an argument"


def test_every_module_is_in_a_room() -> None:
    known = set(FLOORS) | DOOR | {"__init__"}
    strangers = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in python_files("twofold")} - known
    assert not strangers, f"no floor for {strangers}: there is no utils, and a new room needs its place in FLOORS"


@pytest.mark.parametrize(
    "line",
    [
        "from ..engine import Engine",
        "from ..engine.request import Request",
        "from .. import engine",
        "from twofold.engine import Engine",
        "import twofold.engine",
        "def later():\n    from ..engine import Engine",
        "import typing\nif typing.TYPE_CHECKING:\n    from ..engine import Engine",
        "import importlib\nimportlib.import_module('twofold.engine.engine')",
    ],
)
def test_the_guard_sees_every_way_to_import(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_floors.tree", lambda path: ast.parse(line))
    assert bent(PACKAGE / "train" / "trainer.py")  # a sibling on floor 5
    assert not bent(PACKAGE / "serve" / "app.py")  # floor 6 may
