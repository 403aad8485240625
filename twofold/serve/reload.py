"""Reload: keys and limits read again while the server runs, by SIGHUP or POST /reload; a bad file changes nothing.

command line ─▶ base ─┬─▶ over it the TOML file of --config, and the keys of --api-keys-file ─▶ what holds now
                      └── at every reload from here again, so that a line taken out of a file is taken back
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..core import ConfigError, build, flatten, read_table, unknown
from .answers import json
from .config import Limits, ServeConfig
from .errors import HttpError

if TYPE_CHECKING:
    from .app import Api

log = logging.getLogger("twofold.serve")

CHANGEABLE = (
    *("api_keys_file", "allowed_hosts", "request_seconds", "ping_seconds", "drain_seconds", "lame_duck_seconds"),
    "limits",
)
MOST_BYTES = 1 << 20


class Reloaded(msgspec.Struct):
    """What has changed, by name, and how many keys are good now."""

    changed: list[str]
    keys: int
    object: str = "reload"


def read(base: ServeConfig) -> ServeConfig:
    """The settings of the command line with those of the files over them.

    Raises:
        ConfigError: a file cannot be read, names what cannot change while the server runs, or has a wrong value.
    """
    table = {name.replace("-", "_"): value for name, value in _table(base.config).items()}
    for name in table:
        if name not in CHANGEABLE:
            raise ConfigError(f"{base.config}: " + unknown("key", name, CHANGEABLE))
    given = table.pop("limits", {})
    if not isinstance(given, dict):
        raise ConfigError(f"{base.config}: limits is a table: [limits]")
    limits = build(Limits, asdict(base.limits) | {k.replace("-", "_"): v for k, v in given.items()}, "limits.")
    plain = {f.name: getattr(base, f.name) for f in fields(base)}
    found = build(ServeConfig, {**plain, **table, "limits": asdict(limits), "watch": asdict(base.watch)})
    if found.api_keys_file is None:
        return found
    return replace(found, api_keys=tuple(dict.fromkeys((*base.api_keys, *_keys(found.api_keys_file)))))


def _table(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return read_table(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _keys(path: Path) -> list[str]:
    """A key a line; empty lines and those that begin with # are none. A file without keys would let everybody in."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    keys = [line.strip() for line in text.splitlines()]
    found = [key for key in keys if key and not key.startswith("#")]
    if not found:
        raise ConfigError(f"{path} holds no key: write one a line")
    return found


class Reload:
    """What holds now, and who is told when that changes."""

    def __init__(self, base: ServeConfig, now: ServeConfig) -> None:
        self.base = base
        self.now = now
        self.told: list[Callable[[ServeConfig], None]] = []

    def again(self) -> Reloaded:
        """Read the files again and tell everybody.

        Raises:
            ConfigError: as `read`; nothing has changed.
        """
        try:
            new = read(self.base)
        except ConfigError as error:
            log.error("not reloaded, the old settings hold: %s", error)
            raise
        before, after = flatten(self.now), flatten(new)
        changed = sorted(name for name in after if after[name] != before.get(name))
        self.now = new
        for tell in self.told:
            tell(new)
        log.info("reloaded: %s", ", ".join(changed) or "nothing has changed")
        return Reloaded(changed, len(new.api_keys))

    def by_signal(self) -> None:
        """The same for SIGHUP, where only the log can say what is wrong."""
        try:
            self.again()
        except ConfigError:
            return


def overlay(mine: ServeConfig, new: ServeConfig) -> ServeConfig:
    """One model's settings with what may change taken from `new`."""
    return replace(mine, api_keys=new.api_keys, **{name: getattr(new, name) for name in CHANGEABLE})


class Reloads:
    """POST /reload, for clients with a key; without keys there is SIGHUP."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def routes(self) -> list[BaseRoute]:
        return [Route("/reload", self.reload, methods=["POST"])]

    async def reload(self, request: Request) -> Response:
        if not request.scope["owner"]:
            raise HttpError(403, "this needs an API key: set one, or send the server SIGHUP", code="not_allowed")
        try:
            return json(self.api.shared.reload.again())
        except ConfigError as error:
            raise HttpError(400, f"the old settings hold: {error}", code="bad_config") from None
