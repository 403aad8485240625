"""Settings as frozen dataclasses: read from TOML or flags, checked at once, unknown names refused.

A field's type says what is allowed; a `__post_init__` says what else must hold. Nested dataclasses are tables.
"""

from __future__ import annotations

import copy
import dataclasses
import keyword
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .errors import ConfigError, unknown

T = TypeVar("T")


def read_table(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A TOML file as plain data, or a copy of such data.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    path = Path(source)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such recipe: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def load_config(cls: type[T], source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> T:
    """Read a TOML file, or what one would say, into `cls`.

    `overrides` maps dotted keys ("optimizer.lr") to values that win over it.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, or a value has the wrong type.
    """
    table = read_table(source)
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        place = table
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"'{dotted}': '{parent}' is a value, not a table")
        place[leaf] = value
    return build(cls, table)


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Make a dataclass from plain data, checking every name and type.

    Strings are converted where the field wants a number or a path, so that flags and files share this door.
    A key that is a Python keyword ("from") fills the field with an underscore behind it (`from_`).

    Raises:
        ConfigError: naming the key's full path, what was given and what is allowed.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for raw, value in data.items():
        name = raw.replace("-", "_") + ("_" if keyword.iskeyword(raw) else "")
        if name not in fields:
            raise ConfigError(unknown("key", where + raw, [where + f.rstrip("_") for f in fields]))
        values[name] = convert(hints[name], value, where + raw)
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            shown = name.rstrip("_")
            raise ConfigError(f"missing key '{where}{shown}' ({describe(hints[name])})")
    return cls(**values)


def convert(kind: Any, value: Any, where: str) -> Any:
    """Turn one plain value into what the annotation `kind` asks for, or raise ConfigError naming `where`."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return build(kind, value, where + ".")
    elif origin in (Union, types.UnionType):
        return _convert_union(args, value, where, kind)
    elif origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"'{where}': " + unknown("value", str(value), [str(a) for a in args]))
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind is int and not isinstance(value, bool | float):
        return _number(int, value, where)
    elif kind is float and not isinstance(value, bool):
        return _number(float, value, where)
    elif kind is str and isinstance(value, str):
        return value
    elif kind is Path and isinstance(value, str | Path):
        return Path(value)
    elif kind is Any:
        return value
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(f"'{where}' must be {describe(kind)}, not {value!r}")


def _convert_union(args: tuple[Any, ...], value: Any, where: str, kind: Any) -> Any:
    if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in args):
        if type(None) in args:
            return None
        raise ConfigError(f"'{where}' must be {describe(kind)}, not None")
    options = [a for a in args if a is not type(None)]
    for option in options:
        try:
            return convert(option, value, where)
        except ConfigError:
            if len(options) == 1:
                raise
    raise ConfigError(f"'{where}' must be {describe(kind)}, not {value!r}")


def _number(kind: type[int] | type[float], value: Any, where: str) -> int | float:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(f"'{where}' must be {describe(kind)}, not {value!r}") from None


def describe(kind: Any) -> str:
    """How an annotation reads in an error message."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is dict:
        return "a table"
    if origin is tuple:
        return f"a list of {describe(args[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}
    return names.get(kind, "none" if kind is type(None) else f"a table of {getattr(kind, '__name__', kind)}")


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """A dataclass as dotted names and plain values, for logs and run records."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            out.update(flatten(value, f"{prefix}{f.name}."))
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for number, each in enumerate(value):
                out.update(flatten(each, f"{prefix}{f.name}.{number}."))
        else:
            out[prefix + f.name.rstrip("_")] = str(value) if isinstance(value, Path) else value
    return out
