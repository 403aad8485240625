"""Values that cross between judge and candidate as JSON; both sides build exact built-in types from it, nothing else.

plain            None, True, 1.5, "text", small integers
{"i": "0x1f"}    any other integer
{"l": [...]}     list       {"t": tuple}  {"s": set}  {"f": frozenset}  {"d": [[key, value], ...]}
{"b": "00ff"}    bytes      {"y": bytearray}  {"c": [re, im]}  {"r": [start, stop, step]}
{"a": 3}         the fourth changeable container of this call: lists stay the same list on both sides
{"h": ...}, {"k": ...}, ...   what only stands for something: `refer` makes it, `resolve` reads it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Refer = Callable[[Any], dict[str, Any]]
Resolve = Callable[[dict[str, Any]], Any]

_SMALL = 1 << 53
_CHANGEABLE = (list, set, dict, bytearray)
_LIBRARY = ("builtins", "collections")


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


def pack(value: Any, refer: Refer, shared: Shared, *, learn: bool = False) -> Any:
    """A value as JSON's own types; with `learn` its changeable containers get numbers."""
    if value is None or type(value) in (bool, str, float):
        return value
    if type(value) is int:
        return value if -_SMALL < value < _SMALL else {"i": hex(value)}
    number = shared.number(value)
    if number is not None:
        return {"a": number}
    if type(value).__module__ not in _LIBRARY:
        return refer(value)
    if learn and isinstance(value, _CHANGEABLE):
        shared.add(value)
    return content(value, refer, shared, learn=learn)


def content(value: Any, refer: Refer, shared: Shared, *, learn: bool = False) -> Any:
    """A container as JSON, item by item; anything else as `refer` has it."""

    def each(items: Any) -> list[Any]:
        return [pack(item, refer, shared, learn=learn) for item in items]

    for kind, tag in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f")):
        if isinstance(value, kind):
            return {tag: each(value)}
    if isinstance(value, dict):
        return {"d": [each(pair) for pair in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"b" if isinstance(value, bytes) else "y": value.hex()}
    if type(value) is complex:
        return {"c": [value.real, value.imag]}
    if type(value) is range:
        return {"r": each((value.start, value.stop, value.step))}
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
    if tag in ("l", "s", "d", "y"):
        empty: Any = {"l": list, "s": set, "d": dict, "y": bytearray}[tag]()
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
    if tag == "r":
        return range(*(unpack(item, resolve, shared) for item in inside))
    return resolve(data)


def refill(target: Any, data: dict[str, Any], resolve: Resolve, shared: Shared, *, learn: bool = False) -> None:
    """Give a changeable container what `content` wrote of it on the other side."""
    ((tag, inside),) = data.items()
    if tag == "y":
        target[:] = bytes.fromhex(inside)
        return
    if tag == "d":
        pairs = [[unpack(item, resolve, shared, learn=learn) for item in pair] for pair in inside]
        target.clear()
        target.update(pairs)
        return
    items = [unpack(item, resolve, shared, learn=learn) for item in inside]
    target.clear()
    (target.extend if tag == "l" else target.update)(items)
