"""What the README and the docs tell people to type exists: make targets, commands, flags, files, links, recipes."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT, files, name

from twofold import cli
from twofold.commands.flags import Flags
from twofold.core import load_config

PAGES = [p for p in files() if p.suffix == ".md" and (p.parent == ROOT or p.is_relative_to(ROOT / "docs"))]
TOML = [p for p in files() if p.suffix == ".toml" and p.is_relative_to(ROOT / "recipes")]
RECIPES = [p for p in TOML if p.parent.name != "tasks"]

TASKS = [p for p in TOML if p.parent.name == "tasks"]


def blocks(page: Path, language: str) -> Iterator[str]:
    """The code blocks of one language on a page."""
    text = page.read_text(encoding="utf-8")
    yield from (found.group(1) for found in re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL))


def lines(page: Path, program: str) -> list[list[str]]:
    """Every shell line of a page that runs `program`, split into words, in blocks and in `code`."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    spans = re.findall(rf"`({program} [^`]+)`", page.read_text(encoding="utf-8"))
    found = [line for line in text.splitlines() if line.startswith(program + " ")]
    return [shlex.split(line, comments=True) for line in found + spans]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in lines(page, "make"):
        assert {word for word in words[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    """Each `twofold` line goes through the door's own parser, without being run."""
    for words in lines(page, "twofold"):
        command, *rest = words[1:]
        if command in ("COMMAND", "--help", "--version"):
            continue
        flags = Flags(command)
        cli.COMMANDS[command](flags)
        if "--help" not in rest and (rest or command in ("serve", "plan", "doctor", "kernels", "chat")):
            flags.parse(rest)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{name(page)} links to {target}"
    for path in re.findall(r"`((?:twofold|tests|docs|benchmarks|recipes|examples)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{name(page)} speaks of {path}"


def test_python_blocks_of_the_readme_compile() -> None:
    import ast

    found = list(blocks(ROOT / "README.md", "python"))
    assert len(found) >= 2
    for block in found:
        ast.parse(block)


def test_the_readme_names_every_room() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {p.parent.name for p in (ROOT / "twofold").glob("*/__init__.py")}
    assert not {room for room in rooms if f"`twofold/{room}/`" not in text}


def test_recipes_of_the_readme_exist() -> None:
    words = [word for line in lines(ROOT / "README.md", "twofold") for word in line if word.endswith(".toml")]
    assert words
    assert not [word for word in words if not (ROOT / word).exists()]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_recipe_parses(path: Path) -> None:
    from twofold.align.config import AlignRecipe
    from twofold.train.config import Recipe

    load_config(AlignRecipe if "algorithm" in tomllib.loads(path.read_text(encoding="utf-8")) else Recipe, path)


@pytest.mark.parametrize("path", TASKS, ids=name)
def test_every_task_parses(path: Path) -> None:
    from twofold.align.task import read_task

    read_task(path)
