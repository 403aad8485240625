"""run: alignment from Python; a recipe, rows and functions in, a finished run out.

    align({"algorithm": "grpo", ...}, rows=[{"prompt": ..., "answer": ...}], rewards=[right])

What `twofold align` does with a file, so it goes on where a run of the same recipe stopped. Rows are written into the
run's directory, under a name made from what they are; functions are loaded by name in processes of their own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core import ConfigError, read_table
from ..train import launch
from ..train.journal import read_rows
from .launch import Alignment

Function = Callable[..., Any]


@dataclass(frozen=True)
class Run:
    """What came of a recipe."""

    output: Path
    finished: bool
    """False: a signal stopped it, and it saved; the same call goes on."""

    @property
    def model(self) -> Path:
        """The directory of the finished model, which `LLM` and `twofold serve` take."""
        return self.output / "model"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The journal: a row for each step, each look at what is held out, each step's rollouts."""
        return read_rows(self.output / "log.jsonl")


def align(
    recipe: str | Path | Mapping[str, Any],
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    rewards: Sequence[Function | Mapping[str, Any]] = (),
    turn: Function | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Run:
    """Run an alignment recipe (a TOML file, or its tables) to its end.

    `rows` stand in the place of data.train. `rewards` join those of the recipe: functions with the arguments of TRL's,
    or tables of `[[rewards]]`. `turn` is what a tool says behind a turn of the policy (`align/turns.py`). A script that
    calls this guards it with `if __name__ == "__main__"`, for its functions are imported by other processes.

    Raises:
        ConfigError: the recipe is wrong, or a function is not one of a file or of a package.
    """
    tables = read_table(recipe)
    output = Path(tables.get("run", {}).get("output") or _missing_output())
    if rewards:
        tables["rewards"] = [*tables.get("rewards", ()), *map(_judge, rewards)]
    if turn is not None:
        tables.setdefault("rollout", {})["turn"] = where(turn)
    if rows is not None:
        tables.setdefault("data", {})["train"] = [str(_written(rows, output))]
    status = launch.run(tables, fresh=fresh, console=console, course=Alignment())
    return Run(output, status == 0)


def where(function: Function) -> str:
    """The name by which another process finds a function: "package.module:name", or "path/to/file.py:name".

    Raises:
        ConfigError: it has none: a lambda, a function inside another one, or one that was typed into a prompt.
    """
    name, module = getattr(function, "__qualname__", ""), inspect.getmodule(function)
    place = getattr(module, "__file__", None)
    if not name.isidentifier() or getattr(module, name, None) is not function or place is None:
        raise ConfigError(
            f"{name or function!r} is run in a process of its own, which cannot find it by name: give a function that "
            "a file defines at its top level"
        )
    if module is not None and module.__name__ != "__main__" and getattr(module, "__package__", None):
        return f"{module.__name__}:{name}"
    return f"{Path(place).resolve()}:{name}"


def _judge(reward: Function | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(reward, Mapping):
        return dict(reward)
    return {"kind": "function", "path": where(reward), "name": where(reward).rpartition(":")[2]}


def _written(rows: Sequence[Mapping[str, Any]], output: Path) -> Path:
    """The rows as a file of the run, whose name is that of what they say: every rank writes the same one."""
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    path = output / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(text, encoding="utf-8")
        own.replace(path)
    return path


def _missing_output() -> Path:
    raise ConfigError("missing key 'run.output': the directory that the run is written to")
