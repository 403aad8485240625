"""Calls written as Python, read while they arrive and told as JSON; nothing is ever evaluated.

    [f(a=1, b="x", c=[None, {'k': .5}]), g()]
       {"a": 1, "b": "x", "c": [null, {"k": 0.5}]}

Arguments have names, and are literals: strings (raw and byte ones as well, in one, three, single or double quotes),
numbers, True, False, None, lists, tuples and dictionaries of them.
"""

from __future__ import annotations

import json
import math
import re

from .cursor import Cursor, Cut, Malformed, Reading
from .jsons import DEEPEST, Emit, one_of, run_of, space

_NAME = re.compile(r"[\w.\-]*")
_NUMERIC = re.compile(r"[-+.\w]*")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9](?:_?\d)*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_SIMPLE = {
    **dict(zip("ntrabfv0", "\n\t\r\a\b\f\v\0", strict=True)),
    **dict(zip("\\'\"\n", ("\\", "'", '"', ""), strict=True)),
}
_HEX = {"x": 2, "u": 4, "U": 8}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


def calls(c: Cursor) -> Reading[None]:
    """A list of calls."""
    yield from one_of(c, "[")
    while True:
        yield from _call(c)
        if (yield from one_of(c, ",]")) == "]":
            return
        c.begin()
        yield from space(c)
        if c.text[c.at] == "]":
            c.at += 1
            return


def _call(c: Cursor) -> Reading[None]:
    yield from space(c)
    name = yield from run_of(c, _NAME)
    c.at += len(name)
    if not name or name[0].isdigit():
        raise Malformed
    yield from one_of(c, "(")
    c.open(name)
    c.argue("{")
    between = ""
    while True:
        yield from space(c)
        if c.text[c.at] == ")":
            break
        key = yield from run_of(c, _NAME)
        if not key:
            raise Malformed
        c.at += len(key)
        yield from one_of(c, "=")
        c.argue(f"{between}{json.dumps(key, ensure_ascii=False)}: ")
        between = ", "
        yield from literal(c, c.argue)
        if (yield from one_of(c, ",)")) == ")":
            c.at -= 1
            break
    c.at += 1
    c.argue("}")
    c.end()


def literal(c: Cursor, emit: Emit, depth: int = 0) -> Reading[None]:
    """One literal, told as JSON."""
    yield from space(c)
    first = c.text[c.at]
    if first in "\"'":
        yield from _string(c, emit, raw=False)
    elif first in _CLOSING:
        yield from _container(c, emit, depth)
    elif first in "-+.0123456789":
        number = yield from run_of(c, _NUMERIC)
        emit(_number(number))
        c.at += len(number)
    else:
        word = yield from run_of(c, _NAME)
        if word.lower() in ("r", "b", "rb", "br", "u") and c.text[c.at + len(word)] in "\"'":
            c.at += len(word)
            yield from _string(c, emit, raw="r" in word.lower())
        elif word in _WORDS:
            emit(_WORDS[word])
            c.at += len(word)
        else:
            raise Malformed


def _number(text: str) -> str:
    """A Python number as JSON writes it."""
    if _INTEGER.fullmatch(text):
        return text.lstrip("+").replace("_", "")
    if not _FLOAT.fullmatch(text) or not set(text) & set(".eE") or not math.isfinite(float(text)):
        raise Malformed
    return json.dumps(float(text))


def _container(c: Cursor, emit: Emit, depth: int) -> Reading[None]:
    if depth >= DEEPEST:
        raise Malformed
    opening = c.text[c.at]
    closing = _CLOSING[opening]
    c.at += 1
    emit("{" if opening == "{" else "[")
    between = ""
    while True:
        yield from space(c)
        if c.text[c.at] == closing:
            break
        emit(between)
        between = ", "
        if opening == "{":
            if c.text[c.at] not in "\"'":
                raise Malformed
            yield from _string(c, emit, raw=False)
            yield from one_of(c, ":")
            emit(": ")
        yield from literal(c, emit, depth + 1)
        if (yield from one_of(c, "," + closing)) == closing:
            c.at -= 1
            break
    c.at += 1
    emit("}" if opening == "{" else "]")


def _string(c: Cursor, emit: Emit, *, raw: bool) -> Reading[None]:
    quote = yield from _quote(c)
    stop = re.compile(r"[^\\" + quote[0] + "]*")
    emit('"')
    while True:
        match = stop.match(c.text, c.at)
        if match and match.end() > c.at:
            c.at = match.end()
            emit(_inside(match[0]))
        if c.at == len(c.text):
            yield from c.more()
            continue
        if c.text[c.at] == "\\":
            emit(_inside((yield from _escape(c, raw))))
        else:
            while len(c.text) - c.at < len(quote) and quote.startswith(c.text[c.at :]):
                yield from c.more()
            if c.text.startswith(quote, c.at):
                c.at += len(quote)
                emit('"')
                return
            emit(_inside(c.text[c.at]))
            c.at += 1


def _inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _quote(c: Cursor) -> Reading[str]:
    """The opening quote, one character or three: two of them are an empty string."""
    first = c.text[c.at]
    try:
        while len(c.text) - c.at < 3 and c.text[c.at :] == first * (len(c.text) - c.at):
            yield from c.more()
    except Cut:
        pass
    size = 3 if c.text.startswith(first * 3, c.at) else 1
    c.at += size
    return first * size


def _escape(c: Cursor, raw: bool) -> Reading[str]:
    """What a backslash and what follows it stand for; an unknown escape is itself, as in Python."""
    while len(c.text) - c.at < 2:
        yield from c.more()
    kind = c.text[c.at + 1]
    if raw or (kind not in _SIMPLE and kind not in _HEX):
        c.at += 2
        return "\\" + kind
    if kind in _SIMPLE:
        c.at += 2
        return _SIMPLE[kind]
    size = 2 + _HEX[kind]
    while len(c.text) - c.at < size:
        yield from c.more()
    digits = c.text[c.at + 2 : c.at + size]
    if not re.fullmatch(r"[0-9a-fA-F]+", digits) or int(digits, 16) > 0x10FFFF or 0xD800 <= int(digits, 16) < 0xE000:
        raise Malformed
    c.at += size
    return chr(int(digits, 16))
