"""Messages between the panel and a reward's process: four bytes of length, then JSON. No pickle, no surprises.

panel ─▶ process   RewardConfig once, then a Batch for each call
process ─▶ panel   Ready once, then Scored for each call
"""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

HEAD = struct.Struct(">I")
LARGEST = 256 * 1024 * 1024
"""Bytes of one message."""

T = TypeVar("T")


class Batch(msgspec.Struct, frozen=True):
    """What is to be judged: entry i of every list and column belongs to completion i."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    step: int

    def __len__(self) -> int:
        return len(self.completions)


class Ready(msgspec.Struct, frozen=True):
    """The process can be asked; or why it never can."""

    error: str = ""


class Fault(msgspec.Struct, frozen=True):
    """Something that left completions without a value: the reason in a word, how many, and one line for people."""

    reason: str
    count: int
    note: str


class Scored(msgspec.Struct):
    """What a reward said of a batch."""

    values: list[float | None]
    faults: list[Fault] = []
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}


class Broken(Exception):
    """The other side closed, was too slow, or sent what is no message; `reason` is a fault's."""

    def __init__(self, reason: str, note: str) -> None:
        super().__init__(note)
        self.reason = reason


def encode(message: Any) -> bytes:
    """A whole frame. Raises Broken for what is not JSON or is too large."""
    try:
        body = msgspec.json.encode(message)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise Broken("columns", f"cannot be given what is not JSON: {error}") from None
    if len(body) > LARGEST:
        raise Broken("too large", f"a batch of {len(body)} bytes, at most {LARGEST}")
    return HEAD.pack(len(body)) + body


def send(link: socket.socket, frame: bytes, deadline: float | None = None) -> None:
    """Raises Broken when the other side does not take it in time, or is gone."""
    try:
        link.settimeout(_left(deadline))
        link.sendall(frame)
    except TimeoutError:
        raise Broken("timeout", "took too long") from None
    except OSError:
        raise Broken("died", "died") from None


def receive(link: socket.socket, kind: type[T], deadline: float | None = None) -> T:
    """The next message. Raises Broken when there is none in time, none at all, or one that is not a `kind`."""
    (size,) = HEAD.unpack(_exactly(link, HEAD.size, deadline))
    if size > LARGEST:
        raise Broken("too large", f"answered {size} bytes, at most {LARGEST}")
    try:
        return msgspec.json.decode(_exactly(link, size, deadline), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Broken("type", f"answered what is no answer: {error}") from None


def _exactly(link: socket.socket, size: int, deadline: float | None) -> bytes:
    pieces: list[bytes] = []
    while size:
        try:
            link.settimeout(_left(deadline))
            piece = link.recv(min(size, 1 << 20))
        except TimeoutError:
            raise Broken("timeout", "took too long") from None
        except OSError:
            piece = b""
        if not piece:
            raise Broken("died", "died")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def checked(given: Any, count: int) -> Scored:
    """What a reward returned as numbers and None, each fault counted: not a list, too many, no number, not finite."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        note = f"returned {type(given).__name__}, not a list of {count} numbers"
        return Scored([None] * count, [Fault("type", count, note)])
    if len(given) != count:
        note = f"returned {len(given)} values for {count} completions"
        return Scored([None] * count, [Fault("count", count, note)])
    values: list[float | None] = []
    wrong: dict[str, list[str]] = {"type": [], "not finite": []}
    for value in given:
        number = value.item() if hasattr(value, "item") else value
        if number is None or (isinstance(number, int | float) and math.isfinite(number)):
            values.append(None if number is None else float(number))
            continue
        values.append(None)
        reason = "not finite" if isinstance(number, float) else "type"
        wrong[reason].append(repr(number)[:80])
    notes = {"type": "returned {} among its numbers", "not finite": "returned {}"}
    faults = [Fault(reason, len(seen), notes[reason].format(seen[0])) for reason, seen in wrong.items() if seen]
    return Scored(values, faults)
