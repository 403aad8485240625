"""The candidate's functions, classes and objects as the tests see them: whatever is asked of one crosses the socket.

A plain value comes back as a plain value that was built here, so `f(2) == 4` compares two integers of this process.
Anything else stays on the candidate's side, and what would let it lie about itself is not asked:

    object == data      what its class is made from (named tuples, IntEnum) compares as the data it holds; else False
    object + data       done there when another object comes of it, which then is neither number nor truth:
                        `abs(f(x) - 3) < 1` finds no difference that a candidate has made up
    data in object      walks its items; classes that the tests call by a Name are asked for their `__contains__`
    with object:        may deal with an error, never with a failed assertion
"""

from __future__ import annotations

import builtins
import json
import operator
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import values
from .candidate import MESSAGE, NUMBERS, ORDERS, OTHERS, TWO_SIDED


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
        self._remotes: dict[int, Remote] = {}  # so that `a.next is b`
        self.kinds: tuple[Any, ...] = ()
        """The candidate's classes whose word on `in` is taken."""
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
        answer = self._heard()
        while "back" in answer:
            self.say(self._back(answer))
            answer = self._heard()
        if "raise" in answer:
            raise self._error(answer)
        try:
            for item, change in zip(shared.items, answer["changed"], strict=True):
                values.refill(item, change, self._resolve, shared)
            return values.unpack(answer["result"], self._resolve, shared)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise self.lose("spoke nonsense") from None

    def _heard(self) -> dict[str, Any]:
        """An answer; what was printed on the way to it is printed here."""
        answer = self.hear()
        if "out" in answer:
            print(answer["out"], end="")
        return answer

    def names(self) -> dict[str, Any]:
        """What the candidate's module defines, once it has run."""
        answer = self._heard()
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
            given = [values.unpack(message[name], self._resolve, values.Shared()) for name in ("args", "options")]
            result = function(*given[0], **given[1])
            return {"result": values.pack(result, self._refer, values.Shared())}
        except Exception as error:
            return {"raise": [type(error).__name__], "text": str(error)[:500]}

    def _refer(self, thing: Any) -> dict[str, Any]:
        if type(thing) is Remote:
            return {"h": object.__getattribute__(thing, "_number")}
        if isinstance(thing, type) and issubclass(thing, Exception):
            return {"x": thing.__name__}
        if isinstance(thing, Iterator):
            self._lent.append(thing.__next__)
            return {"g": len(self._lent) - 1}
        if callable(thing):
            self._lent.append(thing)
            told = (getattr(thing, name, None) for name in ("__name__", "__doc__"))
            return {"k": [len(self._lent) - 1, *(it if isinstance(it, str) else "" for it in told)]}
        raise TypeError(
            f"a {type(thing).__name__} cannot be given to a candidate: plain data, its own things, functions, iterators"
        )

    def _resolve(self, data: dict[str, Any]) -> Any:
        if "x" in data:
            return self._known(data["x"])
        number = int(data["h"])
        return self._remotes.setdefault(number, Remote(self, number))

    def _known(self, told: list[Any]) -> type[Exception]:
        """A class of errors: the language's own, or one like the candidate's, made here from its name and bases."""
        name, bases = str(told[0]), told[1:]
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind
        if name not in self._errors:
            above = tuple(dict.fromkeys(self._known(base["x"]) for base in bases))
            self._errors[name] = type(name, above, {"__str__": _said})
        return self._errors[name]

    def _error(self, answer: dict[str, Any]) -> BaseException:
        """The candidate's exception as one of this process: its nearest class that is known here."""
        try:
            for module, name in answer["raise"]:
                library = sys.modules.get(module) if module.partition(".")[0] in sys.stdlib_module_names else None
                kind = self._errors.get(name) or getattr(library or builtins, str(name), None)
                if isinstance(kind, type) and issubclass(kind, Exception):
                    return self._raised(kind, answer)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return self.lose("spoke nonsense")
        return self.lose("left by an exception that is no error")

    def _raised(self, kind: type[Exception], answer: dict[str, Any]) -> Exception:
        shared = values.Shared()
        error = kind.__new__(kind, *(values.unpack(it, self._resolve, shared) for it in answer["args"]))
        for name, held in answer["holds"].items():
            if not name.startswith("__"):
                setattr(error, name, values.unpack(held, self._resolve, shared))
        if type(error).__str__ is _said:
            error.__said__ = str(answer["text"])  # type: ignore[attr-defined]
        return error


def _said(error: Exception) -> str:
    """What the candidate's error said of itself there; one that the tests have made says what any would."""
    return str(vars(error).get("__said__", Exception.__str__(error)))


_OPEN = {"__name__", "__qualname__", "__doc__", "__dict__", "__wrapped__", "__annotations__"}
"""Names with underscores that are asked of the object itself, not of what stands for it."""


class Remote:
    """Something of the candidate's that is not plain data. `mixed`: made of plain data, see above."""

    def __init__(self, link: Link, number: int, mixed: bool = False) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_mixed", mixed)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in _OPEN:
            return object.__getattribute__(self, name)
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        link: Link = object.__getattribute__(self, "_link")
        return link.ask("call", object.__getattribute__(self, "_number"), args, options)

    def __instancecheck__(self, thing: Any) -> bool:
        return type(thing) is Remote and _ask(self, "isinstance", thing) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return type(kind) is Remote and _ask(self, "issubclass", kind) is True

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if error is None or isinstance(error, AssertionError) or not isinstance(error, Exception):
            _ask(self, "exit")
            return False
        return _ask(self, "exit", (type(error).__name__, str(error))) is True

    def __iter__(self) -> Any:
        return _items(_ask(self, "iter"))

    def __reversed__(self) -> Any:
        return _items(_ask(self, "reversed"))

    def __contains__(self, item: Any) -> bool:
        link: Link = object.__getattribute__(self, "_link")
        told = _ask(self, "holds", item, link.kinds) if link.kinds else None
        return any(it is item or it == item for it in self) if told is None else told is True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _ask(self, "deepcopy")

    def __bool__(self) -> bool:
        return _number(self, "bool") is True


def _items(walk: Any) -> Iterator[Any]:
    while True:
        try:
            item = _ask(walk, "next")
        except StopIteration:
            return
        yield item


def _ask(thing: Remote, verb: str, *args: Any) -> Any:
    link: Link = object.__getattribute__(thing, "_link")
    return link.ask(verb, object.__getattribute__(thing, "_number"), args)


def _plainly(verb: str) -> Callable[..., Any]:
    return lambda self, *args: _ask(self, verb, *args)


def _number(thing: Remote, verb: str, *args: Any) -> Any:
    if object.__getattribute__(thing, "_mixed"):
        raise TypeError("an object that was reckoned with plain data is neither a number nor true")
    return _ask(thing, verb, *args)


def _as_number(verb: str) -> Callable[..., Any]:
    return lambda self, *args: _number(self, verb, *args)


def _as_data(thing: Remote, act: Callable[[Any, Any], Any], other: Any) -> Any:
    """An operator with plain data, on the data that an object is by its class, if it is."""
    plain = _ask(thing, "plain")
    return act(plain[0], other) if type(plain) is tuple and type(plain[0]) is not Remote else NotImplemented


def _ordered(verb: str) -> Callable[[Remote, Any], Any]:
    act = getattr(operator, verb)
    return lambda self, other: _ask(self, verb, other) if type(other) is Remote else _as_data(self, act, other)


def _reckoned(verb: str, act: Callable[[Any, Any], Any]) -> Callable[[Remote, Any], Any]:
    """An operator of arithmetic, or its reflected or in-place form."""

    def of(self: Remote, other: Any) -> Any:
        made = _ask(self, verb, other)
        if type(other) is Remote:
            return made
        if type(made) is not Remote:
            return _as_data(self, act, other)
        return Remote(object.__getattribute__(self, "_link"), object.__getattribute__(made, "_number"), True)

    return of


def _turned(act: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda one, other: act(other, one)


for _name in OTHERS:
    setattr(Remote, f"__{_name}__", _plainly(_name))
for _name in NUMBERS.keys() - {"bool"}:
    setattr(Remote, f"__{_name}__", _as_number(_name))
for _name in ORDERS:
    setattr(Remote, f"__{_name}__", _ordered(_name))
for _name in TWO_SIDED:
    _act = getattr(operator, f"__{_name}__")
    setattr(Remote, f"__{_name}__", _reckoned(_name, _act))
    setattr(Remote, f"__i{_name}__", _reckoned(f"i{_name}", _act))
    setattr(Remote, f"__r{_name}__", _reckoned(f"r{_name}", _turned(_act)))
