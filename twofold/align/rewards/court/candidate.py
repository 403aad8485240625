"""The candidate's process: runs its code behind the walls, then answers calls with data until the judge hangs up."""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import json
import operator
import os
import random
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from . import values, walls

MODULE = "candidate"
MESSAGE = 4 * 1024 * 1024  # bytes of one message, either way


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
            return self._run(message["run"]) if "run" in message else self._call(message)
        except BaseException as error:  # a candidate may raise anything; the judge is told
            return self._failure(error)

    def _failure(self, error: BaseException) -> dict[str, Any]:
        names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, Exception)]
        try:
            return {"raise": names, "text": str(error)[:500]}
        except BaseException:
            return {"raise": names, "text": ""}

    def _run(self, code: str) -> dict[str, Any]:
        loader = Source(code)
        module = loader.module(MODULE)
        sys.modules[MODULE] = module
        loader.exec_module(module)
        self._space = vars(module)
        shared = values.Shared()
        public = {name: thing for name, thing in self._space.items() if not name.startswith("__")}
        return {"names": {name: values.pack(thing, self._refer, shared) for name, thing in public.items()}}

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
            known = [base.__name__ for base in thing.__mro__ if base.__module__ == builtins.__name__]
            return {"x": [thing.__name__, known[0]]}
        self._things[id(thing)] = thing  # kept, so that the number stays its own
        return {"h": id(thing)}

    def _resolve(self, data: dict[str, Any]) -> Any:
        if "h" in data:
            return self._things[data["h"]]
        if "x" in data:
            return self._space.get(data["x"]) or getattr(builtins, data["x"])
        number: int = data["k"]

        def back(*args: Any) -> Any:
            shared = values.Shared()
            packed = values.pack(args, self._refer, shared)
            self.say({"back": number, "args": packed})
            heard = self.hear()
            while "verb" in heard:  # what was lent may itself call the candidate
                self.say(self._answer(heard))
                heard = self.hear()
            if "raise" in heard:
                kind = getattr(builtins, heard["raise"][0], ValueError)
                raise kind(heard["text"])
            return values.unpack(heard["result"], self._resolve, values.Shared())

        return back


_VERBS: dict[str, Callable[..., Any]] = {
    "call": lambda thing, *args, **options: thing(*args, **options),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "put": operator.setitem,
    "drop": operator.delitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "enter": lambda thing: type(thing).__enter__(thing),
    "exit": lambda thing: type(thing).__exit__(thing, None, None, None),
    "isinstance": lambda kind, thing: isinstance(thing, kind),
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "neg")},
}
