"""Flags: a command line that is read from settings dataclasses, and that refuses a wrong name with the nearest one.

A field `max_tokens: int = 16` is the flag `--max-tokens N`; a `bool` field is `--name` and `--no-name`; a tuple's flag
may be given several times. Values stay text here and are converted by `core.build`, so a flag and a recipe key are
checked by the same code and fail with the same words.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

from ..core import ConfigError, build, unknown

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class Given:
    """A parsed command line: flags as attributes, and settings rebuilt from theirs."""

    def __init__(self, values: argparse.Namespace) -> None:
        self._values = vars(values)

    def __getattr__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        raise AttributeError(name)

    def overrides(self, cls: type, prefix: str = "") -> dict[str, Any]:
        """The fields of `cls` that this command line sets, as given; nested settings as nested dicts."""
        hints, found = typing.get_type_hints(cls), dict[str, Any]()
        for f in dataclasses.fields(cls):
            hint = hints[f.name]
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                value: Any = self.overrides(hint, f"{prefix}{f.name}.") or None
                whole = self._values.get(f"{prefix}{f.name}.json")
                if whole is not None:
                    value = _table(whole, f.metadata["flag"]) | (value or {})
            else:
                value = self._values.get(prefix + f.name)
            if value is not None:
                found[f.name.replace("_", "-")] = value
        return found

    def options(self, cls: type) -> dict[str, Any]:
        """The fields of `cls` that this command line sets, converted and checked, by the fields' names."""
        given = self.overrides(cls)
        whole: Any = build(cls, given, "--")
        return {name: getattr(whole, name) for name in (key.replace("-", "_") for key in given)}

    def settings(self, cls: type[T], **defaults: Any) -> T:
        """`cls` from its flags, `defaults` standing in for those not given. Raises ConfigError naming the flag."""
        standing = {name.replace("_", "-"): value for name, value in defaults.items()}
        return build(cls, standing | self.overrides(cls), "--")


class Flags:
    """What one command accepts. `parse` turns an argument list into `Given`, or raises ConfigError."""

    def __init__(self, command: str, summary: str = "") -> None:
        self._choices: tuple[str, Sequence[str]] = ("", ())
        self._parser = _Parser(
            prog=f"twofold {command}".strip(),
            description=summary,
            allow_abbrev=False,
            argument_default=None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def positional(
        self, name: str, help: str, *, required: bool = True, many: bool = False, choices: Sequence[str] | None = None
    ) -> None:
        """One word of the command line, or with `many` a list of any number of them."""
        nargs = "*" if many else None if required else "?"
        self._parser.add_argument(name, help=help, nargs=nargs, metavar=name.upper())
        if choices is not None:
            self._choices = (name, choices)

    def rest(self, name: str, help: str) -> None:
        """Everything after the positionals, flags included, handed on untouched."""
        self._parser.add_argument(name, nargs=argparse.REMAINDER, help=help)

    def add(
        self, name: str, help: str, *, many: bool = False, switch: bool = False, required: bool = False, short: str = ""
    ) -> None:
        """One flag that belongs to no settings class: text, a list of texts (`many`), or a `switch`."""
        names = [f"-{short}"] if short else []
        if switch:
            self._parser.add_argument(*names, f"--{name}", help=help, action="store_true", default=False)
        else:
            action = "append" if many else "store"
            metavar = name.split("-")[-1].upper()
            self._parser.add_argument(*names, f"--{name}", help=help, action=action, metavar=metavar, required=required)

    def settings(self, cls: type, *, skip: Iterable[str] = (), prefix: str = "") -> None:
        """A flag for each field of the dataclass `cls`, its help the field's documentation and default.

        A field that is itself a dataclass gives `--field.name` flags; metadata "flag" names one that takes all as JSON.
        """
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        group = self._parser.add_argument_group(cls.__name__)
        taken = {action.dest for action in self._parser._actions}
        for f in dataclasses.fields(cls):
            hint, dest = hints[f.name], prefix + f.name
            if f.name in skip or dest in taken or not f.init:
                continue
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                if "flag" in f.metadata:
                    help = f"the flags below as one JSON object, such as {f.metadata['example']}".replace("%", "%%")
                    group.add_argument(f"--{f.metadata['flag']}", dest=f"{dest}.json", help=help, metavar="JSON")
                self.settings(hint, prefix=f"{dest}.")
                continue
            kinds = _kinds(hint)
            default = "" if f.default in (dataclasses.MISSING, None, ()) else f" (default {f.default})"
            help = (docs.get(f.name, "") + default).strip().replace("%", "%%")
            flag = "--" + dest.replace("_", "-")
            if kinds == {bool}:
                group.add_argument(flag, dest=dest, help=help, action=argparse.BooleanOptionalAction, default=None)
            elif tuple in kinds:
                group.add_argument(flag, dest=dest, help=help, action="append", metavar="VALUE")
            elif kinds:
                metavar = "N" if kinds & {int, float} else "VALUE"
                group.add_argument(flag, dest=dest, help=help, metavar=metavar)

    def parse(self, argv: Sequence[str]) -> Given:
        """Read `argv`; `-h` prints the help and exits 0.

        Raises:
            ConfigError: an unknown flag (with the nearest one), a missing value, or a leftover word.
        """
        values, left = self._parser.parse_known_args(list(argv))
        known = sorted(self._parser._option_string_actions)
        for word in left:
            name = word.split("=")[0]
            if name.startswith("-") and name not in known:
                raise ConfigError(unknown("flag", name, [k for k in known if k.startswith("--")]))
        if left:
            raise ConfigError(f"'{left[0]}' is one word too many; {self._parser.prog} --help shows what is expected")
        name, choices = self._choices
        given = getattr(values, name, None)
        if given is not None and given not in choices:
            raise ConfigError(unknown(name, given, choices))
        return Given(values)


def _table(text: str, flag: str) -> dict[str, Any]:
    """A flag's JSON object, its keys as flags are spelled."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--{flag} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--{flag} must be a JSON object, not {text!r:.40}")
    return {name.replace("_", "-"): value for name, value in found.items()}


def _kinds(hint: Any) -> set[Any]:
    """The plain kinds that a flag can set of this annotation; empty when no flag can (tables, mappings)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {kind for arg in args if arg is not type(None) for kind in _kinds(arg)}
    if origin is tuple:
        return {tuple}
    if origin is typing.Literal:
        return {str}
    return {hint} if hint in (int, float, str, bool, Path) else set()


def field_docs(cls: type) -> dict[str, str]:
    """What a dataclass says of each field: the string after it, else the sentences of the docstring that name it."""
    docs: dict[str, str] = {}
    sentences = re.split(r"(?<=[.;])\s+", one_line(cls.__doc__ or ""))
    for f in dataclasses.fields(cls):
        docs[f.name] = " ".join(s for s in sentences if f"`{f.name}`" in s)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, SyntaxError):
        return docs
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for field, doc in itertools.pairwise(body):
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(field, ast.AnnAssign):
            docs[ast.unparse(field.target)] = one_line(str(doc.value.value))
    return docs


def one_line(text: str) -> str:
    """An error as the single line that the terminal shows."""
    return " ".join(text.split())


def complain(error: Exception) -> None:
    print(f"twofold: {one_line(str(error))}", file=sys.stderr)
