"""Bodies that no route may take: not JSON, JSON of another kind, unknown fields, and a wrong value for each field."""

from __future__ import annotations

import json
import random
from typing import Any, get_args

import msgspec

NOT_JSON = [
    b"", b" ", b"{", b"}", b"[", b"{]", b"nul", b"'a'", b"{'a': 1}", b'{"a" 1}', b'{"a": }', b'{"a": 1,}',
    b'{"a": NaN}',
    b'{"a": Infinity}', b'{"a": 0x1}', b'{"a": 01}', b'{"a": 1} {}', b'{"a": 1}x', b'\xff\xfe{\x00}\x00', b"\x00",
    b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}x', b'{"a": "\n"}', b'\xef\xbb\xbf{"a": 1}', b"--1",
    b"[" * 100_000, b'{"a":' * 100_000, b"[" * 500 + b"]" * 500, b'{"a":' * 500 + b"1" + b"}" * 500,
    b"<xml/>", b"a=1&b=2", b"\x80\x04\x95cos\nsystem\n", b"\x81\xa1a\x01", b"\x1f\x8b\x08\x00",
]  # fmt: skip
NOT_OBJECTS: list[Any] = [None, True, 0, -1, 1e400, "x", "", [], [{}], [[]], [1, 2], ["prompt"]]
HOSTILE_NAMES = [
    "__proto__", "constructor", "__class__", "", " ", "\x00", "a" * 5000, "model ", "Model", "$where",
    "../model", "🙂", "{}",
]  # fmt: skip
WRONG: list[Any] = [{"x": {"x": {}}}, [[[]]], [None], -(2**70), 2**70, 1e308, "\x00", "x" * 3000, {"": None}]


def malformed(kind: type[msgspec.Struct], least: int = 100) -> list[tuple[str, bytes]]:
    """At least `least` bodies with a word each on what is wrong with them."""
    found = [("not JSON", body) for body in NOT_JSON]
    found += [("not an object", json.dumps(value).replace("Infinity", "1e400").encode()) for value in NOT_OBJECTS]
    found += [("unknown field", json.dumps({name: 1}).encode()) for name in HOSTILE_NAMES]
    drawn = random.Random(7)
    fields = [field for field in msgspec.structs.fields(kind) if Any not in (field.type, *get_args(field.type))]
    while len(found) < least or len(found) < 60 + len(fields):
        field, value = drawn.choice(fields), drawn.choice(WRONG)
        if not _fits(field.type, value):
            found.append((f"wrong {field.encode_name}", json.dumps({field.encode_name: value}).encode()))
    return found


def _fits(kind: Any, value: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
