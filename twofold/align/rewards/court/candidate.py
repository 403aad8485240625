"""The candidate's process: runs its code behind the walls, then answers calls with data until the judge hangs up."""

from __future__ import annotations

import builtins
import copy
import importlib.abc
import importlib.machinery
import io
import json
import operator
import os
import random
import socket
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from . import values, walls

MODULE = "candidate"
MESSAGE = 4 * 1024 * 1024  # bytes of one message, either way
_PRINTED = 1 << 18  # characters that are told of what a call has printed
_LARGE = 1 << 16  # bytes: what a module holds beyond it is asked for item by item


class Source(importlib.abc.InspectLoader):
    """A module whose source is a string: no file of it exists."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, fullname: str) -> str:
        return self._text

    def module(self, name: str) -> types.ModuleType:
        """The module, not yet run: `exec_module` runs it."""
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, self)
        return made


def live(link: socket.socket, limits: walls.Limits) -> None:
    """This process's whole life; never returns."""
    _alone(link)
    stand = walls.wall_in(limits)
    sys.setrecursionlimit(3000)
    random.seed(0)
    answering = _Answering(link)
    answering.say({"walls": stand})
    answering.serve()
    os._exit(0)


def _alone(link: socket.socket) -> None:
    """Nothing is inherited but the link: no pipe to the verdict, no standard stream."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, link.fileno())
    os.closerange(link.fileno() + 1, 1024)


class _Answering:
    """Reads a message, does what it asks, says what came of it; a call may wait for a call back to the judge."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._lines = link.makefile("rb")
        self._things: dict[int, Any] = {}
        self._space: dict[str, Any] = {}
        self._printed = io.BytesIO()
        sys.stdout = io.TextIOWrapper(self._printed, encoding="utf-8", errors="replace")

    def say(self, message: dict[str, Any]) -> None:
        self._link.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        line = self._lines.readline(MESSAGE)
        if not line:
            os._exit(0)
        heard: dict[str, Any] = json.loads(line)
        return heard

    def serve(self) -> None:
        while True:
            self.say(self._answer(self.hear()))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._run(message["run"]) if "run" in message else self._call(message)
        except BaseException as error:  # a candidate may raise anything; the judge is told
            answer = self._failure(error)
        return answer | self._out()

    def _out(self) -> dict[str, Any]:
        """What was printed since the last answer."""
        try:
            sys.stdout.flush()
        except Exception:  # the candidate has put something else there
            return {}
        text = self._printed.getvalue().decode(errors="replace")[:_PRINTED]
        self._printed.seek(0)
        self._printed.truncate()
        return {"out": text} if text else {}

    def _failure(self, error: BaseException) -> dict[str, Any]:
        """The classes of an error that is one, nearest first, and what it carries."""
        kinds = [[kind.__module__, kind.__name__] for kind in type(error).__mro__ if issubclass(kind, Exception)]
        shared = values.Shared()
        told: dict[str, Any] = {"raise": kinds, "text": "", "args": [], "holds": {}}
        try:
            told["text"] = str(error)[:500]
            told["args"] = [values.pack(it, self._refer, shared) for it in error.args]
            told["holds"] = {name: values.pack(it, self._refer, shared) for name, it in vars(error).items()}
            return told if len(json.dumps(told)) < _LARGE else told | {"args": [told["text"]], "holds": {}}
        except BaseException:
            return told | {"args": [told["text"]], "holds": {}}

    def _run(self, code: str) -> dict[str, Any]:
        loader = Source(code)
        module = loader.module(MODULE)
        sys.modules[MODULE] = module
        loader.exec_module(module)
        self._space = vars(module)
        public = {name: thing for name, thing in self._space.items() if not name.startswith("__")}
        return {"names": {name: self._told(thing) for name, thing in public.items()}}

    def _told(self, thing: Any) -> Any:
        """What a name of the module stands for: as data where that is short, else as something to ask."""
        try:
            packed = values.pack(thing, self._refer, values.Shared())
            return packed if len(json.dumps(packed)) < _LARGE else self._refer(thing)
        except (RecursionError, TypeError, ValueError):
            return self._refer(thing)

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        shared = values.Shared()
        thing = self._things[message["of"]]
        arguments = values.unpack(message["args"], self._resolve, shared, learn=True)
        options = values.unpack(message["options"], self._resolve, shared, learn=True)
        result = _VERBS[message["verb"]](thing, *arguments, **options)
        given = values.Shared(shared.items)
        changed = [values.content(item, self._refer, given) for item in shared.items]
        return {"result": values.pack(result, self._refer, given), "changed": changed}

    def _refer(self, thing: Any) -> dict[str, Any]:
        if isinstance(thing, type) and issubclass(thing, Exception):
            if values.builtin(thing):
                return {"x": [thing.__name__]}
            return {"x": [thing.__name__, *(self._refer(it) for it in thing.__bases__ if issubclass(it, Exception))]}
        self._things[id(thing)] = thing  # kept, so that the number stays its own
        return {"h": id(thing)}

    def _resolve(self, data: dict[str, Any]) -> Any:
        if "h" in data:
            return self._things[data["h"]]
        if "x" in data:
            return self._space.get(data["x"]) or getattr(builtins, data["x"])
        if "g" in data:
            return _walk(self._lent(data["g"]))
        return self._lent(*data["k"])

    def _lent(self, number: int, name: str = "", doc: str = "") -> Callable[..., Any]:
        """A function of the tests'."""

        def back(*args: Any, **options: Any) -> Any:
            shared = values.Shared()
            packed, named = (values.pack(it, self._refer, shared) for it in (args, options))
            self.say({"back": number, "args": packed, "options": named} | self._out())
            heard = self.hear()
            while "verb" in heard:  # what was lent may itself call the candidate
                self.say(self._answer(heard))
                heard = self.hear()
            if "raise" in heard:
                kind = getattr(builtins, heard["raise"][0], ValueError)
                raise kind(heard["text"])
            return values.unpack(heard["result"], self._resolve, values.Shared())

        back.__name__, back.__doc__ = name, doc
        return back


def _walk(following: Callable[[], Any]) -> Iterator[Any]:
    """An iterator of the tests', one item at a time."""
    while True:
        try:
            yield following()
        except StopIteration:
            return


def _exit(thing: Any, error: tuple[str, str] | None = None) -> bool:
    """Leave a `with`, perhaps by an error; whether that is thereby dealt with."""
    made = getattr(builtins, error[0], Exception)(error[1]) if error else None
    return bool(type(thing).__exit__(thing, type(made) if made else None, made, None))


def _holds(thing: Any, item: Any, kinds: tuple[Any, ...]) -> bool | None:
    """What one of these classes says of an item; None where `thing` is of none of them."""
    of_one = isinstance(thing, tuple(kind for kind in kinds if isinstance(kind, type)))
    return item in thing if of_one and hasattr(type(thing), "__contains__") else None


TWO_SIDED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
"""Operators that may also stand between one of the candidate's objects and plain data."""
ORDERS = ("eq", "lt", "le", "gt", "ge")
NUMBERS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "bool": bool,
}
NUMBERS |= {"neg": operator.neg, "pos": operator.pos, "invert": operator.invert, "round": round}
"""What makes a number or a truth of an object."""
OTHERS: dict[str, Callable[..., Any]] = {
    "len": len,
    "str": str,
    "repr": repr,
    "hash": hash,
    "format": format,
    "reversed": reversed,
    "next": next,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "delattr": delattr,
    "copy": copy.copy,
    "enter": lambda thing: type(thing).__enter__(thing),
}


def _operators() -> dict[str, Callable[..., Any]]:
    found = {name: getattr(operator, f"__{name}__") for name in (*TWO_SIDED, *ORDERS)}
    for name in TWO_SIDED:
        found[f"i{name}"] = getattr(operator, f"__i{name}__")
        found[f"r{name}"] = lambda thing, other, act=found[name]: act(other, thing)
    return found


_VERBS: dict[str, Callable[..., Any]] = {
    "call": lambda thing, *args, **options: thing(*args, **options),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "exit": _exit,
    "holds": _holds,
    "plain": values.plainly,
    "isinstance": lambda kind, thing: isinstance(thing, kind),
    "issubclass": lambda kind, other: issubclass(other, kind),
    "deepcopy": copy.deepcopy,
    **NUMBERS,
    **OTHERS,
    **_operators(),
}
