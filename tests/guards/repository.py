"""What the guards look at: the repository's files, and the package's modules as syntax trees."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "twofold"


@functools.cache
def files() -> tuple[Path, ...]:
    """Every file that belongs to the repository; without git (an unpacked archive), every file but caches."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        names = [name for name in listed.stdout.decode().split("\0") if name]
        paths = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        paths = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return tuple(sorted({p for p in paths if p.is_file() and "__pycache__" not in p.parts}))


def python_files(*folders: str) -> list[Path]:
    """The Python files under some folders of the repository."""
    roots = [ROOT / folder for folder in folders]
    return [p for p in files() if p.suffix == ".py" and any(p.is_relative_to(root) for root in roots)]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    """A path as the repository calls it."""
    return path.relative_to(ROOT).as_posix()
