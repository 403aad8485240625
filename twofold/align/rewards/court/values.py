"""Values that cross between judge and candidate as JSON; both sides build exact built-in types from it, nothing else.

plain            None, True, 1.5, "text", small integers
{"i": "0x1f"}    any other integer
{"l": [...]}     list       {"t": tuple}  {"s": set}  {"f": frozenset}  {"d": [[key, value], ...]}
{"b": "00ff"}    bytes      {"y": bytearray}  {"c": [re, im]}  {"r": [start, stop, step]}  {"z": slice}
{"C": [...]}     Counter    {"O": OrderedDict}  {"u": [maxlen, item, ...]} deque
{"q": ["Fraction", 1, 3]}   a value of the library's, from what it is made of
{"n": "int"}     a class of the language's own
{"a": 3}         the fourth changeable container of this call: lists stay the same list on both sides
{"h": ...}, {"k": ...}, ...   what only stands for something: `refer` makes it, `resolve` reads it
"""

from __future__ import annotations

import builtins
import operator
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

Refer = Callable[[Any], dict[str, Any]]
Resolve = Callable[[dict[str, Any]], Any]

_SMALL = 1 << 53
_CHANGEABLE = (list, set, dict, bytearray, deque)
_LIBRARY = ("builtins", "collections")
_KINDS: tuple[tuple[type, str], ...] = ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f"))
_EMPTY: dict[str, Callable[[], Any]] = {
    "l": list,
    "s": set,
    "d": dict,
    "y": bytearray,
    "C": Counter,
    "O": OrderedDict,
}
_MADE_OF: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    Fraction: operator.attrgetter("numerator", "denominator"),
    Decimal: lambda value: (str(value),),
    date: operator.attrgetter("year", "month", "day"),
    time: operator.attrgetter("hour", "minute", "second", "microsecond"),
    datetime: operator.attrgetter("year", "month", "day", "hour", "minute", "second", "microsecond"),
    timedelta: operator.attrgetter("days", "seconds", "microseconds"),
}
_NAMED = {kind.__name__: kind for kind in _MADE_OF}
_PLAINLY: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    *((int, int.__pos__), (float, float.__pos__), (complex, complex.__pos__), (str, str.__str__)),
    *((bytes, bytes), (bytearray, bytearray), (list, list), (tuple, tuple)),
    *((set, set), (frozenset, frozenset), (dict, dict), (deque, deque)),
)


class Shared:
    """The changeable containers of one call, numbered in the order in which they are met, on both sides alike."""

    def __init__(self, items: list[Any] | None = None) -> None:
        self.items: list[Any] = items if items is not None else []
        self._place = {id(item): number for number, item in enumerate(self.items)}

    def number(self, value: Any) -> int | None:
        return self._place.get(id(value))

    def add(self, value: Any) -> None:
        self._place[id(value)] = len(self.items)
        self.items.append(value)


def builtin(thing: Any) -> bool:
    """Whether it is a class of the language's own, which both sides have; errors are not meant."""
    return isinstance(thing, type) and vars(builtins).get(thing.__name__) is thing


def named(name: str) -> type:
    """Such a class. Raises ValueError for another name."""
    kind = vars(builtins).get(name)
    if not isinstance(kind, type):
        raise ValueError(f"'{name}' is no class of the language")
    return kind


def plainly(thing: Any) -> tuple[Any] | None:
    """What something whose class is made from a built-in one (a named tuple, an IntEnum) is without its own class."""
    return next(((strip(thing),) for kind, strip in _PLAINLY if isinstance(thing, kind)), None)


def pack(value: Any, refer: Refer, shared: Shared, *, learn: bool = False) -> Any:
    """A value as JSON's own types; with `learn` its changeable containers get numbers."""
    if value is None or type(value) in (bool, str, float):
        return value
    if type(value) is int:
        return value if -_SMALL < value < _SMALL else {"i": hex(value)}
    number = shared.number(value)
    if number is not None:
        return {"a": number}
    if type(value) in _MADE_OF and getattr(value, "tzinfo", None) is None:
        return {"q": [type(value).__name__, *_MADE_OF[type(value)](value)]}
    if type(value).__module__ not in _LIBRARY:
        return refer(value)
    if learn and isinstance(value, _CHANGEABLE):
        shared.add(value)
    return content(value, refer, shared, learn=learn)


def content(value: Any, refer: Refer, shared: Shared, *, learn: bool = False) -> Any:
    """A container as JSON, item by item; anything else as `refer` has it."""

    def each(items: Any) -> list[Any]:
        return [pack(item, refer, shared, learn=learn) for item in items]

    for kind, tag in _KINDS:
        if isinstance(value, kind):
            return {tag: each(value)}
    if isinstance(value, dict):
        tag = {Counter: "C", OrderedDict: "O"}.get(type(value), "d")
        return {tag: [each(pair) for pair in value.items()]}
    if type(value) is deque:
        return {"u": each((value.maxlen, *value))}
    if isinstance(value, bytes | bytearray):
        return {"b" if isinstance(value, bytes) else "y": value.hex()}
    if type(value) is complex:
        return {"c": [value.real, value.imag]}
    if type(value) is range:
        return {"r": each((value.start, value.stop, value.step))}
    if type(value) is slice:
        return {"z": each((value.start, value.stop, value.step))}
    if builtin(value) and not issubclass(value, BaseException):
        return {"n": value.__name__}
    return refer(value)


def unpack(data: Any, resolve: Resolve, shared: Shared, *, learn: bool = False) -> Any:
    """What `pack` wrote. Raises ValueError, KeyError, TypeError or RecursionError for anything that it did not."""
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise ValueError("a bare list")
        return data
    ((tag, inside),) = data.items()
    if tag == "a":
        return shared.items[inside]
    if tag in _EMPTY or tag == "u":
        empty: Any = deque(maxlen=inside[0]) if tag == "u" else _EMPTY[tag]()
        if learn:
            shared.add(empty)
        refill(empty, data, resolve, shared, learn=learn)
        return empty
    if tag in ("t", "f"):
        items = [unpack(item, resolve, shared, learn=learn) for item in inside]
        return tuple(items) if tag == "t" else frozenset(items)
    if tag == "i":
        return int(inside, 16)
    if tag == "b":
        return bytes.fromhex(inside)
    if tag == "c":
        return complex(float(inside[0]), float(inside[1]))
    if tag in ("r", "z"):
        return (range if tag == "r" else slice)(*(unpack(item, resolve, shared) for item in inside))
    if tag == "q":
        return _NAMED[inside[0]](*inside[1:])
    if tag == "n":
        return named(inside)
    return resolve(data)


def refill(target: Any, data: dict[str, Any], resolve: Resolve, shared: Shared, *, learn: bool = False) -> None:
    """Give a changeable container what `content` wrote of it on the other side."""
    ((tag, inside),) = data.items()
    if tag == "y":
        target[:] = bytes.fromhex(inside)
        return
    if tag in ("d", "C", "O"):
        pairs = [[unpack(item, resolve, shared, learn=learn) for item in pair] for pair in inside]
        target.clear()
        target.update(dict(pairs))  # a Counter would count bare pairs
        return
    items = [unpack(item, resolve, shared, learn=learn) for item in inside[tag == "u" :]]
    target.clear()
    (target.update if tag == "s" else target.extend)(items)
