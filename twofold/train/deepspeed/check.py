"""Check: a ds_config as it was written, key by key against `keys.TABLE`; free of torch.

DeepSpeed ignores a key that it does not know; here that is an error with the nearest name, and so is a key that would
have to be ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...core import ConfigError
from ...core.config import describe
from ...core.errors import nearest
from .keys import Row, default, rows

AUTO = "auto"
PER_RUN = ("lr", "total_num_steps", "warmup_num_steps", "warmup_max_lr")
"""What "auto" stands for in these only a script knows."""
TRIANGLE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A ds_config as plain data, from a JSON file or a dict.

    Raises:
        ConfigError: no such file, not JSON, or a key twice.
    """
    if isinstance(config, Mapping):
        return json.loads(json.dumps(config), object_pairs_hook=_once)  # type: ignore[no-any-return]
    path = Path(config)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the ds_config {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"the ds_config {path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the ds_config {path} must be a table, not {data!r}")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for at, (key, _) in enumerate(pairs):
        if any(key == other for other, _ in pairs[:at]):
            raise ConfigError(f"the ds_config has '{key}' twice: keep one")
    return dict(pairs)


def check(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that were given by their full paths, each known, of its kind, and not refused."""
    given: dict[str, Any] = {}
    _walk(table, "", rows(), given)
    for path, value in given.items():
        row, wanted = rows()[path]
        if row.answer == "refused" and _matters(row, value, wanted, given):
            raise ConfigError(f"'{path}': {value!r} has no meaning here: {row.words}")
        if row.answer != "refused" and value != AUTO:
            _kind(path, value, wanted)
    return given


def _walk(table: Mapping[str, Any], where: str, known: Mapping[str, tuple[Row, Any]], given: dict[str, Any]) -> None:
    blocks = {path[: at + 1] for path in known for at in range(len(path)) if path[at : at + 1] == "."}
    for key, value in table.items():
        path = f"{where}{key}"
        if path in known:
            given[path] = value
        elif f"{path}." not in blocks:
            raise ConfigError(_unknown(path, where, known, blocks))
        elif isinstance(value, Mapping):
            _walk(value, f"{path}.", known, given)
        elif value is not None and value != AUTO:
            raise ConfigError(f"'{path}' must be a table, not {value!r}")


def _unknown(path: str, where: str, known: Iterable[str], blocks: Iterable[str]) -> str:
    """The nearest name beside it, else the same name elsewhere, else what there is."""
    key = path[len(where) :]
    names = {p[len(where) :].split(".")[0] for p in (*known, *blocks) if p.startswith(where)}
    elsewhere = sorted(p for p in known if p.rpartition(".")[2] == key)
    near = nearest(key, names)
    if elsewhere:
        hint = f"did you mean '{elsewhere[0]}'?"
    elif near:
        hint = f"did you mean '{where}{near}'?"
    else:
        hint = f"choose from: {', '.join(sorted(names))}"
    return f"unknown key '{path}' in the ds_config: {hint}"


def _kind(path: str, value: Any, wanted: Any) -> None:
    """Raises ConfigError when a value is not of the kind that the table says."""
    if wanted is Any or value is None:
        return
    if isinstance(wanted, tuple):
        if value not in wanted:
            choices = ", ".join("null" if choice is None else str(choice) for choice in wanted)
            raise ConfigError(f"'{path}' must be one of {choices}, not {value!r}")
        return
    kind = wanted if isinstance(wanted, type) else type(wanted)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        right = number or (isinstance(value, list) and path.startswith("scheduler."))  # a number for each group
    elif kind is int and number:
        right = float(value).is_integer()
    if not right:
        raise ConfigError(f"'{path}' must be {describe(kind)}, not {value!r}")


def _matters(row: Row, value: Any, wanted: Any, given: Mapping[str, Any]) -> bool:
    """Whether a refused key asks for something: not at its default, in a block that is not switched off."""
    if value == default(wanted) or value in (AUTO, {}, [], None):
        return False
    if "enabled" in row.keys:
        return bool(given.get(f"{row.where}.enabled", False))
    return True


class Values:
    """What was given, with the table's defaults behind it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given, self._known = given, rows()

    def __getitem__(self, path: str) -> Any:
        wanted = self._known[path][1]
        value = self._given.get(path)
        value = default(wanted) if value is None else value
        whole = wanted is int or (type(wanted) is int and not isinstance(wanted, bool))
        return int(value) if whole and value is not None else value

    def block(self, where: str) -> dict[str, Any]:
        """What a block says, key by key."""
        return {
            path[len(where) + 1 :]: self[path]
            for path, value in self._given.items()
            if path.startswith(f"{where}.") and value is not None
        }

    def choose(self, dtype: str) -> list[str]:
        """Put what it stands for in place of every "auto", and tell each.

        Raises:
            ConfigError: only the script can know it.
        """
        told = []
        for path in [path for path, value in self._given.items() if value == AUTO]:
            key, wanted = path.rpartition(".")[2], self._known[path][1]
            if wanted == AUTO:
                continue
            if key in PER_RUN:
                raise ConfigError(f"'{path}' is \"auto\", and only the script knows it: put the number there")
            if path in ("bf16.enabled", "fp16.enabled"):
                self._given[path] = path.startswith(dtype)
                told.append(f"{path} = {self._given[path]} (auto: the module's weights are {dtype})")
                continue
            del self._given[path]
            if path not in TRIANGLE:
                told.append(f"{path} = {self[path]} (auto: DeepSpeed's default)")
        return told
