"""JSON as a model writes it, read while it arrives: values are passed on as they stand, a call's keys are understood.

Every reader is a generator that runs on a cursor and yields where the text ends; it raises Malformed with the cursor on
the character that cannot be. A line break inside a string, which JSON forbids and models write, is passed
on escaped. Values nested deeper than `DEEPEST` are malformed, so that no answer reaches Python's own limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from .cursor import Cursor, Malformed, Reading

Emit = Callable[[str], None]

DEEPEST = 64
NAMES = ("name",)
ARGUMENTS = ("arguments", "parameters")

_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_NUMERIC = re.compile(r"[-+.0-9eE]*")
_LETTERS = re.compile(r"[a-zA-Z]*")


def nothing(text: str) -> None:
    """For what is read and means nothing."""


def space(c: Cursor, emit: Emit = nothing) -> Reading[None]:
    """White space, up to a character that is there."""
    while True:
        end = _end(_SPACE, c)
        if end > c.at:
            emit(c.text[c.at : end])
            c.at = end
        if c.at < len(c.text):
            return
        yield from c.more()


def _end(pattern: re.Pattern[str], c: Cursor) -> int:
    match = pattern.match(c.text, c.at)
    return match.end() if match else c.at


def one_of(c: Cursor, choices: str, emit: Emit = nothing) -> Reading[str]:
    """White space, then one of these characters: which it is."""
    yield from space(c, emit)
    found = c.text[c.at]
    if found not in choices:
        raise Malformed
    c.at += 1
    emit(found)
    return found


def run_of(c: Cursor, pattern: re.Pattern[str]) -> Reading[str]:
    """All characters that `pattern` takes, known to be all; the cursor stays in front of them."""
    while (end := _end(pattern, c)) == len(c.text):
        yield from c.more()
    return c.text[c.at : end]


def value(c: Cursor, emit: Emit, depth: int = 0) -> Reading[None]:
    """Any one value."""
    yield from space(c, emit)
    first = c.text[c.at]
    if first == '"':
        yield from string(c, emit)
    elif first in "{[":
        yield from _container(c, emit, depth)
    else:
        number = first in "-0123456789"
        word = yield from run_of(c, _NUMERIC if number else _LETTERS)
        if not (_NUMBER.fullmatch(word) if number else word in ("true", "false", "null")):
            raise Malformed
        c.at += len(word)
        emit(word)


def string(c: Cursor, emit: Emit) -> Reading[None]:
    """A string with its quotes, the first of which is there."""
    emit('"')
    c.at += 1
    while True:
        end = _end(_PLAIN, c)
        if end > c.at:
            emit(c.text[c.at : end])
            c.at = end
        if c.at == len(c.text):
            yield from c.more()
            continue
        first = c.text[c.at]
        if first == '"':
            c.at += 1
            emit('"')
            return
        if first != "\\":  # a raw control character
            c.at += 1
            emit(json.dumps(first)[1:-1])
            continue
        while (escape := _ESCAPE.match(c.text, c.at)) is None:
            if _end(_BEGUN, c) < len(c.text):
                raise Malformed
            yield from c.more()
        c.at = escape.end()
        emit(escape[0])


def _container(c: Cursor, emit: Emit, depth: int) -> Reading[None]:
    if depth >= DEEPEST:
        raise Malformed
    closing = "}" if c.text[c.at] == "{" else "]"
    emit(c.text[c.at])
    c.at += 1
    yield from space(c, emit)
    if c.text[c.at] == closing:
        c.at += 1
        emit(closing)
        return
    while True:
        if closing == "}":
            yield from space(c, emit)
            if c.text[c.at] != '"':
                raise Malformed
            yield from string(c, emit)
            yield from one_of(c, ":", emit)
        yield from value(c, emit, depth + 1)
        if (yield from one_of(c, "," + closing, emit)) == closing:
            return


def text_of(c: Cursor, reading: Callable[[Cursor, Emit], Reading[None]]) -> Reading[str]:
    """What a reader passes on, as one text."""
    pieces: list[str] = []
    yield from reading(c, pieces.append)
    return "".join(pieces)


def arguments(c: Cursor) -> Reading[None]:
    """The arguments of a call whose name is `c.name`: an object, told as it arrives."""
    yield from space(c)
    if c.text[c.at] != "{":
        raise Malformed
    c.open(c.name)
    yield from value(c, c.argue)
    c.end()


def call(c: Cursor) -> Reading[None]:
    """One object with a name and arguments, in either order; other keys mean nothing.

    Arguments in front of the name wait for it; arguments that are a string must spell an object; none are {}.
    """
    yield from one_of(c, "{")
    name = waiting = None
    told = False
    while True:
        key = yield from _key(c)
        if key in NAMES and name is None:
            name = yield from _name(c)
        elif key in ARGUMENTS and name is not None and not told and c.text[c.at] == "{":
            c.open(name)
            told = True
            yield from value(c, c.argue)
        elif key in ARGUMENTS and not told and waiting is None:
            waiting = yield from _spelled(c)
        else:
            yield from value(c, nothing)
        if waiting is not None and name is not None and not told:
            told = True
            c.open(name)
            c.argue(waiting)
        if (yield from one_of(c, ",}")) == "}":
            break
    if name is None:
        raise Malformed
    if not told:
        c.open(name)
        c.argue("{}")
    c.end()


def _key(c: Cursor) -> Reading[str]:
    yield from space(c)
    if c.text[c.at] != '"':
        raise Malformed
    key: str = json.loads((yield from text_of(c, string)))
    yield from one_of(c, ":")
    yield from space(c)
    return key


def _name(c: Cursor) -> Reading[str]:
    if c.text[c.at] != '"':
        raise Malformed
    name: str = json.loads((yield from text_of(c, string)))
    if not name.strip():
        raise Malformed
    return name


def _spelled(c: Cursor) -> Reading[str]:
    """Arguments that cannot be told as they arrive."""
    found = yield from text_of(c, value)
    if found == "null":
        return "{}"
    inner: str = json.loads(found) if found.startswith('"') else found
    try:
        if not isinstance(json.loads(inner), dict):
            raise Malformed
    except (ValueError, RecursionError):
        raise Malformed from None
    return inner


def calls(c: Cursor) -> Reading[None]:
    """A list of calls."""
    yield from one_of(c, "[")
    while True:
        yield from call(c)
        if (yield from one_of(c, ",]")) == "]":
            return
        c.begin()
