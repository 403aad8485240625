"""Listener: the one machine that runs every form, on text that arrives in pieces of any size.

Whole answers go through it as well, in one piece: what it tells depends on the text alone, never on how it was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from . import jsons, pythons
from .cursor import Argued, Called, Cursor, Cut, Enough, Event, Malformed, Reading, Said, Thought
from .form import BEGIN, DONE, END, OPEN, OTHER, Does, Form, Move
from .values import Value

_SPACE = re.compile(r"[ \t\r\n]*")
_FUNCTION = re.compile(r"[\w.\-:/]{1,128}")
_LONGEST = 200  # characters of a name, with white space around it
VALUES: dict[str, Callable[[Cursor], Reading[None]]] = {
    "call": jsons.call,
    "known call": jsons.call,
    "calls": jsons.calls,
    "arguments": jsons.arguments,
    "python": pythons.calls,
    "known python": pythons.calls,
}


class _Over(Exception):
    """All has been read."""


@dataclass(frozen=True)
class _Found:
    start: int
    end: int
    mark: str


class _Exits:
    """The marks that lead out of a state: as text, or as tokens alone."""

    def __init__(self, form: Form, state: str, exact: frozenset[str]) -> None:
        self.moves: dict[str, Move] = form.leaving(state)
        marks = [mark for mark in self.moves if mark not in (DONE, OTHER)]
        self.exact = frozenset(mark for mark in marks if mark in exact)
        self.texts = sorted((mark for mark in marks if mark not in exact), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.texts))) if self.texts else None
        self.begun = frozenset(mark[:size] for mark in self.texts for size in range(1, len(mark)))
        self.widest = max(map(len, self.texts), default=1) - 1


class Listener(Cursor):
    """Tells content, reasoning and calls of one answer. Push pieces, then finish.

    `exact` marks count where the vocabulary's own token stands, not where text spells it. `tools` are the names that
    may be called, each with the types of its parameters; `most` calls are told, and nothing behind them.
    """

    def __init__(
        self,
        form: Form,
        *,
        exact: frozenset[str] = frozenset(),
        tools: Mapping[str, Mapping[str, frozenset[str]]] | None = None,
        start: str = "start",
        most: int | None = None,
    ) -> None:
        super().__init__(frozenset(tools or ()), most)
        self.form, self.tools, self.state = form, tools or {}, start
        self.full = False
        self._thought = start != "start"
        self._value: Value | None = None
        self._exits = {state: _Exits(form, state, exact) for state in form.states}
        self._marks: list[tuple[int, str]] = []
        self._machine = self._run()
        next(self._machine)

    # ----------------------------------------------------------------------------------------------- from outside
    def push(self, text: str, marks: Iterable[tuple[int, str]] = ()) -> list[Event]:
        """Take more text and tell what is certain. `marks` are places in it where one token spells a mark."""
        gone = min(self.kept, self.at)
        self.text = self.text[gone:]
        self.at, self.kept = self.at - gone, self.kept - gone
        self.resume = None if self.resume is None else self.resume - gone
        kept = [(place - gone, mark) for place, mark in self._marks if place >= gone]
        self._marks = kept + [(len(self.text) + place, mark) for place, mark in marks]
        self.text += text
        return self._advance()

    def finish(self) -> list[Event]:
        """No more text: tell what was held back."""
        self.closed = True
        return self._advance()

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning."""
        return self.state in ("opened", "thought")

    @property
    def complete(self) -> bool:
        """Whether there are calls, and all of them whole."""
        return self.calls > 0 and not self.called and not self.broken

    def _advance(self) -> list[Event]:
        next(self._machine, None)
        return self.told()

    # ----------------------------------------------------------------------------------------------- the machine
    def _run(self) -> Reading[None]:
        yield
        while True:
            try:
                mark = yield from self._read()
                self.state = self._move(mark)
            except Malformed as error:
                if not self._retreat(isinstance(error, Cut)):
                    return
            except Enough:
                self.full = True
                return
            except _Over:
                return

    def _read(self) -> Reading[str]:
        """What the state reads, and the mark that ends it."""
        reads = self.form.states[self.state]
        if reads in VALUES:
            self.bare = reads.startswith("known")
            yield from VALUES[reads](self)
            return DONE
        if reads == "start":
            return (yield from self._start())
        if reads == "space":
            return (yield from self._here())
        if reads in ("text", "thought"):
            return (yield from self._until(Said if reads == "text" else Thought))
        if reads == "value":
            return (yield from self._argument())
        return (yield from self._short(reads))

    def _move(self, mark: str) -> str:
        where, *does = self._exits[self.state].moves[mark]
        for what in does:
            self._do(what, mark)
        if self.resume is None and not self.called:
            self._settle(where)
        return where

    def _do(self, what: Does, mark: str) -> None:
        if what == BEGIN:
            self.begin(self.at + (mark in self.form.looks))
        elif what == OPEN:
            self.bare = False
            self.open(self.name)
            self._value = Value(self.argue)
        elif what == END:
            if self._value is not None:
                self._value.close()
                self._value = None
            self.end()

    def _settle(self, where: str) -> None:
        """What led here has been understood: it is told, or a mark."""
        self._thought = self._thought or where in ("opened", "thought")
        if where == "text":  # white space that waited in "start"
            if self.calls or self._thought:
                while self.kept < self.at and self.text[self.kept] in "\r\n":
                    self.kept += 1
        else:
            self.kept = self.at

    def _retreat(self, cut: bool) -> bool:
        """What cannot be read is content; False when nothing is left to read."""
        if self.called:
            if cut and self.form.states[self.state] in VALUES:
                self.argue(self.text[self.at :])
                self.at = len(self.text)
            self.called, self.broken, self.kept = False, True, self.at
        elif self.resume is not None:
            self.tell(Said(self.text[self.kept : self.resume]))
            self.at = self.kept = self.resume
            self.resume = None
        elif cut:
            return False
        else:
            self.at = self.kept
        self._value = None
        self.state = "text"
        return True

    # ----------------------------------------------------------------------------------------------- reading
    def _find(self) -> _Found | None:
        """The first mark that leads out of the state."""
        exits = self._exits[self.state]
        match = exits.pattern.search(self.text, self.at) if exits.pattern else None
        found = [_Found(match.start(), match.end(), match[0])] if match else []
        for place, mark in self._marks:
            if place >= self.at and mark in exits.exact and self.text.startswith(mark, place):
                found.append(_Found(place, place + len(mark), mark))
                break
        return min(found, key=lambda one: one.start, default=None)

    def _safe(self) -> int:
        """Up to where no mark can begin."""
        if self.closed:
            return len(self.text)
        exits = self._exits[self.state]
        end = len(self.text)
        for size in range(min(exits.widest, end - self.at), 0, -1):
            if self.text[end - size :] in exits.begun:
                end -= size
                break
        return min([end, *(place for place, mark in self._marks if place >= self.at and mark in exits.exact)])

    def _take(self, found: _Found) -> str:
        self.at = found.start if found.mark in self.form.looks else found.end
        return found.mark

    def _until(self, kind: type[Said] | type[Thought]) -> Reading[str]:
        """Text up to a mark; white space at its end waits for what follows."""
        while True:
            found = self._find()
            self.at = found.start if found else self._safe()
            end = self.kept + len(self.text[self.kept : self.at].rstrip(" \t\r\n"))
            if self.closed and not found:
                end = len(self.text)
            if end > self.kept:
                self.tell(kind(self.text[self.kept : end]))
                self.kept = end
            if found:
                return self._take(found)
            if self.closed:
                raise _Over
            yield

    def _start(self) -> Reading[str]:
        try:
            return (yield from self._here())
        except Cut:
            if not self.calls and not self._thought:
                self.tell(Said(self.text[self.kept :]))
            raise _Over from None

    def _here(self) -> Reading[str]:
        """White space, then a mark or another character."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            found = self._find()
            if found is not None and found.start == self.at:
                return self._take(found)
            if self._safe() > self.at:
                if OTHER not in self._exits[self.state].moves:
                    raise Malformed
                return OTHER
            yield from self.more()

    def _short(self, reads: str) -> Reading[str]:
        """A name, a key or a word, whole."""
        while True:
            found = self._find()
            end = found.start if found else self._safe()
            words = self.text[self.at : end].strip()
            legal = _FUNCTION.fullmatch(words) if reads == "name" else "\n" not in words and "<" not in words
            if end - self.at > _LONGEST or (words and not legal):
                raise Malformed
            if found:
                if not words and reads != "word":
                    raise Malformed
                if reads == "name":
                    self.name = words
                elif reads == "key" and self._value is not None:
                    types = self.tools.get(self.name, {})
                    self._value.key(words, types.get(words, frozenset({"string"})))
                return self._take(found)
            yield from self.more()

    def _argument(self) -> Reading[str]:
        assert self._value is not None
        while True:
            found = self._find()
            end = found.start if found else self._safe()
            self._value.push(self.text[self.at : end])
            self.at = end
            if found:
                self._value.end()
                return self._take(found)
            if self.closed:
                self._value.cut()
            yield from self.more()


@dataclass
class Heard:
    """An answer as it was meant: calls are (name, the text of the arguments)."""

    content: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> Heard:
        """This, and what was told since."""
        for event in events:
            match event:
                case Said(text):
                    self.content += text
                case Thought(text):
                    self.thought += text
                case Called(_, name):
                    self.calls.append((name, ""))
                case Argued(call, text):
                    name, before = self.calls[call]
                    self.calls[call] = (name, before + text)
        return self
