"""The cursor: a model's text while it arrives, the place that has been read, and what has been told of it.

    text   ......white space<tool_call>{"name": "f", "argu
                 ▲          ▲         ▲                   ▲
                 kept       mark      resume              at

What stands in front of `kept` has been told. While it is open whether a call stands here, `kept` stays; if none does,
what is up to `resume` is told as content and the text is read again from there. Once a call's name has been told there
is no way back: what then cannot be read is content from there on.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Reads on a cursor, and yields where the text ends for now."""


@dataclass(frozen=True, slots=True)
class Said:
    """Content."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins; calls of one answer are numbered from 0."""

    call: int
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of a call's arguments: joined they are the text of one JSON object, once the call is complete."""

    call: int
    text: str


Event = Said | Thought | Called | Argued


class Malformed(Exception):
    """What stands at the cursor cannot be."""


class Cut(Malformed):
    """The text ended in the middle."""


class Enough(Exception):
    """One call more than was asked for."""


class Cursor:
    """What readers see and tell. `known` are the names that calls without a mark must have; `most` calls are told."""

    def __init__(self, known: frozenset[str], most: int | None) -> None:
        self.text = ""
        self.at = self.kept = 0
        self.resume: int | None = None
        self.name = ""
        self.closed = False
        self.calls = 0
        self.called = False  # a call is told and not complete
        self.broken = False  # some call never was
        self.bare = False
        self._known, self._most = known, most
        self._events: list[Event] = []

    def more(self) -> Reading[None]:
        """Wait for text.

        Raises:
            Cut: there is none.
        """
        if self.closed:
            raise Cut
        if self.called:
            self.kept = self.at
        yield

    def tell(self, event: Event) -> None:
        """Add to what has been told; a text goes on the one before it."""
        last = self._events[-1] if self._events else None
        if isinstance(event, Said | Thought) and type(last) is type(event):
            self._events[-1] = type(event)(last.text + event.text)
        elif isinstance(event, Argued) and isinstance(last, Argued) and last.call == event.call:
            self._events[-1] = Argued(event.call, last.text + event.text)
        else:
            self._events.append(event)

    def told(self) -> list[Event]:
        """What has been told since the last time."""
        found, self._events = self._events, []
        return found

    def begin(self, resume: int | None = None) -> None:
        """A call may begin here; when it is open whether an earlier one did, that stays open."""
        if self.resume is None:
            self.resume = self.at if resume is None else resume

    def open(self, name: str) -> None:
        """It did.

        Raises:
            Malformed: without a mark only the request's tools are called.
            Enough: no further one was asked for.
        """
        if self.bare and name not in self._known:
            raise Malformed
        if self.calls == self._most:
            raise Enough
        self.tell(Called(self.calls, name))
        self.name, self.called, self.resume, self.kept = name, True, None, self.at
        self.calls += 1

    def argue(self, text: str) -> None:
        """More of its arguments."""
        if text:
            self.tell(Argued(self.calls - 1, text))

    def end(self) -> None:
        """It is complete."""
        self.called, self.kept = False, self.at
