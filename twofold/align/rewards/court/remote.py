"""The candidate's functions, classes and objects as the tests see them: whatever is asked of one crosses the socket.

A plain value comes back as a plain value that was built here, so `f(2) == 4` compares two integers of this process.
Anything else stays on the candidate's side, and what would let it lie about itself is not asked: it never equals plain
data, has no arithmetic with plain data, and `in` walks its items.
"""

from __future__ import annotations

import builtins
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from . import values
from .candidate import MESSAGE


class Gone(BaseException):
    """The candidate's process ended, hung, or spoke nonsense: no test may catch this as the error it expected."""


class Link:
    """The judge's end of the socket: one call at a time, calls back included, until the deadline."""

    def __init__(self, link: socket.socket, deadline: float) -> None:
        self._link = link
        self._deadline = deadline
        self._rest = b""
        self._lent: list[Callable[..., Any]] = []
        self._errors: dict[str, type[Exception]] = {}
        self.gone = ""

    def lose(self, why: str) -> Gone:
        self.gone = self.gone or why
        self._link.close()
        return Gone(self.gone)

    def say(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MESSAGE:
            raise ValueError(f"arguments of {len(line)} bytes, at most {MESSAGE}")
        try:
            self._link.settimeout(max(0.001, self._deadline - time.monotonic()))
            self._link.sendall(line)
        except TimeoutError:
            raise self.lose("out of time") from None
        except OSError:
            raise self.lose("died") from None

    def hear(self) -> dict[str, Any]:
        """The next message. Raises Gone when there is none in time, none at all, or one that is no message."""
        if self.gone:
            raise Gone(self.gone)
        pieces, size = [self._rest], len(self._rest)
        while b"\n" not in pieces[-1]:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self.lose("out of time")
            self._link.settimeout(left)
            try:
                piece = self._link.recv(1 << 16)
            except TimeoutError:
                raise self.lose("out of time") from None
            except OSError:
                raise self.lose("died") from None
            size += len(piece)
            if not piece or size > MESSAGE:
                raise self.lose("answered too much" if piece else "died")
            pieces.append(piece)
        line, self._rest = b"".join(pieces).split(b"\n", 1)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self.lose("spoke nonsense")
        return message

    def ask(self, verb: str, of: int, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Any:
        """One verb done on the other side; changeable arguments come back as it left them."""
        if self.gone:
            raise Gone(self.gone)
        shared = values.Shared()
        packed = values.pack(args, self._refer, shared, learn=True)
        named = values.pack(options or {}, self._refer, shared, learn=True)
        self.say({"verb": verb, "of": of, "args": packed, "options": named})
        answer = self.hear()
        while "back" in answer:
            self.say(self._back(answer))
            answer = self.hear()
        if "raise" in answer:
            raise self._error(answer)
        try:
            for item, change in zip(shared.items, answer["changed"], strict=True):
                values.refill(item, change, self._resolve, shared)
            return values.unpack(answer["result"], self._resolve, shared)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise self.lose("spoke nonsense") from None

    def names(self, answer: dict[str, Any]) -> dict[str, Any]:
        """What the candidate's module defines, as the tests are to see it."""
        if "raise" in answer:
            raise self._error(answer)
        try:
            packed = answer["names"].items()
            return {name: values.unpack(data, self._resolve, values.Shared()) for name, data in packed}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self.lose("spoke nonsense") from None

    def _back(self, message: dict[str, Any]) -> dict[str, Any]:
        """A call of what the tests lent: only that, only with data, and its errors go to the candidate."""
        try:
            function = self._lent[message["back"]]
            result = function(*values.unpack(message["args"], self._resolve, values.Shared()))
            return {"result": values.pack(result, self._refer, values.Shared())}
        except Exception as error:
            return {"raise": [type(error).__name__], "text": str(error)[:500]}

    def _refer(self, thing: Any) -> dict[str, Any]:
        if type(thing) is Remote:
            return {"h": object.__getattribute__(thing, "_number")}
        if isinstance(thing, type) and issubclass(thing, Exception):
            return {"x": thing.__name__}
        if callable(thing):
            self._lent.append(thing)
            return {"k": len(self._lent) - 1}
        raise TypeError(
            f"a {type(thing).__name__} cannot be given to a candidate: plain data, its own things, functions"
        )

    def _resolve(self, data: dict[str, Any]) -> Any:
        if "x" in data:
            name, base = data["x"]
            kind = getattr(builtins, base, Exception)
            kind = kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception
            return self._errors.setdefault(name, kind if name == base else type(str(name), (kind,), {}))
        return Remote(self, int(data["h"]))

    def _error(self, answer: dict[str, Any]) -> BaseException:
        """The candidate's exception as one of this process: its nearest class that is known here."""
        for name in answer["raise"]:
            kind = self._errors.get(name) or getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    return kind(str(answer.get("text")))
                except TypeError:  # it wants other arguments; the next class up will do
                    continue
        return self.lose("left by an exception that is no error")


class Remote:
    """Something of the candidate's that is not plain data."""

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name != "__name__":
            return object.__getattribute__(self, name)
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        link: Link = object.__getattribute__(self, "_link")
        return link.ask("call", object.__getattribute__(self, "_number"), args, options)

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))

    def __instancecheck__(self, thing: Any) -> bool:
        return type(thing) is Remote and _ask(self, "isinstance", thing) is True

    def __bool__(self) -> bool:
        return _ask(self, "bool") is True

    def __str__(self) -> str:
        return str(_ask(self, "str"))

    def __repr__(self) -> str:
        return str(_ask(self, "repr"))

    def __exit__(self, *error: Any) -> None:
        _ask(self, "exit")

    def __iter__(self) -> Any:
        walk = _ask(self, "iter")
        while True:
            try:
                yield _ask(walk, "next")
            except StopIteration:
                return


def _ask(thing: Remote, verb: str, *args: Any) -> Any:
    link: Link = object.__getattribute__(thing, "_link")
    return link.ask(verb, object.__getattribute__(thing, "_number"), args)


def _plainly(verb: str) -> Callable[..., Any]:
    return lambda self, *args: _ask(self, verb, *args)


def _among_themselves(verb: str) -> Callable[[Remote, Any], Any]:
    """An operator between two of the candidate's objects; with plain data it is not defined."""
    return lambda self, other: _ask(self, verb, other) if type(other) is Remote else NotImplemented


_PLAIN = {"getitem": "item", "setitem": "put", "delitem": "drop"}
_PLAIN |= {name: name for name in ("len", "enter", "next", "neg")}
for _name, _verb in _PLAIN.items():
    setattr(Remote, f"__{_name}__", _plainly(_verb))
for _name in ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv"):
    setattr(Remote, f"__{_name}__", _among_themselves(_name))
