"""`twofold align`: a policy judged and improved, by the recipe's algorithm; any of the recipe's keys is a flag.

--optimizer.lr 1e-5     the key as the recipe has it
--lr 1e-5               its last word, where one table alone has it, or the algorithm's own table
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..align.config import TABLES, AlignRecipe
from ..align.launch import Alignment
from ..core import ConfigError, unknown
from ..core.errors import nearest
from ..train.launch import run
from .train import parse_change, sample

HELP = ("-h", "--help")


def align(recipe: str, flags: Sequence[str]) -> int:
    """Run the recipe from where it was left; exit code 0 when it is finished, 75 when it was stopped and saved."""
    if any(word in HELP for word in flags):
        print("\n".join(["--fresh: start over", *(f"--{key}" for key in keys())]))
        return 0
    fresh = "--fresh" in flags
    changes = read_flags([word for word in flags if word != "--fresh"], recipe)
    return run(recipe, changes, fresh=fresh, sampler=sample, course=Alignment())


def keys(cls: type = AlignRecipe, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe that a flag can set."""
    hints, found = typing.get_type_hints(cls), list[str]()
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name.rstrip("_")
        inner = next((it for it in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(it)), None)
        if isinstance(inner, type) and typing.get_origin(hint) is not tuple:
            found += keys(inner, f"{name}.")
        else:
            found.append(name)
    return found


def read_flags(words: Sequence[str], recipe: str) -> dict[str, Any]:
    """`--key value` and `--key=value` as dotted keys and values.

    Raises:
        ConfigError: no such key, or a short one that several tables have.
    """
    known, algorithm = keys(), _algorithm(recipe, words)
    found: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is one word too many: flags are --key value, such as --steps 3")
        name, sign, value = word[2:].partition("=")
        key = _key(name.replace("-", "_"), known, algorithm)
        if not sign:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        found |= dict([parse_change(f"{key}={value}")])
    return found


def _key(name: str, known: Sequence[str], algorithm: str) -> str:
    if name in known:
        return name
    fitting = [key for key in known if key.rpartition(".")[2] == name]
    own = [key for key in fitting if key.partition(".")[0] in TABLES.get(algorithm, ())]
    if len(fitting) == 1:
        return fitting[0]
    if len(own) == 1:
        return own[0]
    if fitting:
        raise ConfigError(f"--{name} may be {', '.join('--' + key for key in fitting)}: say which")
    close = nearest(name, {key.rpartition(".")[2] for key in known})
    near = [key for key in known if key.rpartition(".")[2] == close]
    meant = [key for key in near if key.partition(".")[0] in TABLES.get(algorithm, ())] or near
    if meant:
        raise ConfigError(f"unknown flag '--{name}': did you mean {' or '.join('--' + key for key in meant)}?")
    raise ConfigError(unknown("flag", f"--{name}", [f"--{key}" for key in known]))


def _algorithm(recipe: str, words: Sequence[str]) -> str:
    """What the recipe is for; a file that cannot be read is told of when it is."""
    for at, word in enumerate(words):
        if word.startswith("--algorithm"):
            return word.partition("=")[2] or (words[at + 1] if at + 1 < len(words) else "")
    try:
        return str(tomllib.loads(Path(recipe).read_text(encoding="utf-8")).get("algorithm", ""))
    except (OSError, ValueError):
        return ""
