"""A request's body read as one of the known structs, with errors that name the field at fault."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import msgspec

from ..core import RequestError, nearest
from .errors import HttpError

T = TypeVar("T", bound=msgspec.Struct)
E = TypeVar("E", RequestError, HttpError, RequestError | HttpError)

NotDone = Mapping[str, tuple[tuple[Any, ...], str]]
"""By field: the values that ask for nothing, and what to do instead."""

_FIELD = re.compile(r"unknown field `(?P<name>[^`]{0,200})")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]*)`")
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>.*)`$")
_decoders: dict[type, msgspec.json.Decoder[Any]] = {}


def decode(kind: type[T], body: bytes) -> T:
    """Read a request's body.

    Raises:
        HttpError: 400 with the path of the field at fault and, for an unknown one, the nearest name.
    """
    decoder = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    try:
        found: T = decoder.decode(body)
        return found
    except msgspec.ValidationError as error:
        raise _explain(kind, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="bad_json") from None


def converted(kind: type[T], data: Any) -> T:
    """The same for data that is plain already; the errors of `decode`."""
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _explain(kind, str(error)) from None


def check_done(body: msgspec.Struct, not_done: NotDone) -> None:
    """Refuse a field that another server has and this version has not; raises RequestError."""
    for name, (harmless, instead) in not_done.items():
        value = getattr(body, name, None)
        if value is not None and value not in harmless:
            hint = f"leave it out, {instead}" if instead else "leave it out"
            raise RequestError(f"{name} is not done by this version: {hint}", name)


def renamed(error: E, names: Mapping[str, str]) -> E:
    """The same error with the field's name in another API: the longest beginning that is among `names` is replaced."""
    param = error.param or ""
    for name in sorted(names, key=len, reverse=True):
        if param == name or param.startswith((f"{name}.", f"{name}[")):
            error.param = names[name] + param[len(name) :]
            break
    return error


def _explain(kind: type, message: str) -> HttpError:
    place = _PATH.search(message)
    path = place["path"] if place else ""
    message = message[: place.start()] if place else message
    if found := _FIELD.search(message) or _MISSING.search(message):
        name = found["name"]
        param = f"{path}.{name}" if path else name
        if "missing" in message:
            return HttpError(400, f"{param} is missing", param=param, code="missing_field")
        known = kind.__struct_fields__ if not path else _names_within(kind)  # type: ignore[attr-defined]
        guess = nearest(name, known)
        hint = f": did you mean '{guess}'?" if guess else ": leave it out"
        return HttpError(400, f"unknown field '{name[:80]}'{hint}", param=param[:200], code="unknown_field")
    return HttpError(400, f"{path or 'the body'}: {message}", param=path or None, code="invalid_value")


def _names_within(kind: type) -> set[str]:
    """The fields of every struct that `kind` holds, however deep."""
    names: set[str] = set()
    seen: set[Any] = {kind}
    todo: list[Any] = [field.type for field in msgspec.structs.fields(kind)]
    while todo:
        held = todo.pop()
        if held in seen:
            continue
        seen.add(held)
        todo += get_args(held)
        if isinstance(held, type) and issubclass(held, msgspec.Struct):
            names.update(held.__struct_fields__)
            todo += [field.type for field in msgspec.structs.fields(held)]
    return names
