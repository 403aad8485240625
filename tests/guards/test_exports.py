"""A room's `__init__` is its map: the docstring lists exactly the room's files, and every public name exists."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from repository import PACKAGE, name, python_files, tree

ROOMS = [p for p in python_files("twofold") if p.name == "__init__.py" and p.parent.parent == PACKAGE]


def listed(docstring: str) -> set[str]:
    """First words of the lines that look like "file.py  what it is" or "folder/  what it is"."""
    words = [line.split()[0] for line in docstring.splitlines() if line.strip()]
    return {word for word in words if word.endswith((".py", "/"))}


def present(room: Path) -> set[str]:
    """The modules and the folders with files of a room, as the docstring should call them."""
    modules = {p.name for p in python_files(name(room)) if p.parent == room} - {"__init__.py"}
    folders = {p.relative_to(room).parts[0] + "/" for p in python_files(name(room)) if p.parent != room}
    return modules | folders


@pytest.mark.parametrize("path", ROOMS, ids=name)
def test_docstring_lists_the_rooms_files(path: Path) -> None:
    written, there = listed(ast.get_docstring(tree(path)) or ""), present(path.parent)
    assert not there - written, "not in the room's docstring"
    extra = {entry for entry in written - there if not (path.parent / entry).exists()}
    assert not extra, "in the room's docstring, but not in the room"


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *ROOMS], ids=name)
def test_public_names_exist(path: Path) -> None:
    module = importlib.import_module(".".join(path.parent.relative_to(PACKAGE.parent).parts))
    for public in getattr(module, "__all__", []):
        assert getattr(module, public) is not None


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {p.parent for p in python_files("twofold")}
    assert not [name(folder) for folder in folders if not (folder / "__init__.py").exists()]
