"""Form: how one family of models says a call, as data: states, the marks that lead from one to another, what is read.

A state reads in one of these ways until a mark of its own is met:

    start      nothing said yet: white space waits; any other character is OTHER
    text       content
    thought    reasoning
    space      white space alone; any other character is OTHER, or malformed without such a move
    name       a function's name
    word       something without meaning: a kind, an id
    key        a parameter's name
    value      a parameter's value, by its type in the tool's schema
    call       {"name": ..., "arguments": {...}}, and DONE
    calls      a JSON list of those, and DONE
    arguments  one JSON object, and DONE
    python     [name(key=literal, ...), ...], and DONE

"known call" and "known python" stand without a mark of their own, so the name must be one of the request's tools.
What a move does beside leading on: BEGIN, a call may begin here, and if none does the text goes back to content from
here; OPEN, its name is known; END, it is complete. Readers that know their own end open and end calls themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Reads = Literal[
    "start",
    "text",
    "thought",
    "space",
    "name",
    "word",
    "key",
    "value",
    "call",
    "known call",
    "calls",
    "arguments",
    "python",
    "known python",
]
Does = Literal["begin", "open", "end"]
Move = tuple[str, *tuple[Does, ...]]
"""The next state, and what happens on the way."""

BEGIN: Does = "begin"
OPEN: Does = "open"
END: Does = "end"
DONE = "(done)"
OTHER = "(other)"

ALWAYS: dict[str, Reads] = {"start": "start", "text": "text"}


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How calls are written when a grammar makes the model call: open before name between arguments after ... close.

    `separator` stands between calls. `needs` is a mark without which the vocabulary does not write so.
    """

    open: str = ""
    before: str = ""
    between: str
    after: str
    separator: str = ""
    close: str = ""
    pythonic: bool = False
    needs: str = ""

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """These calls, (name, text of the arguments)."""
        each = (f"{self.before}{name}{self.between}{arguments}{self.after}" for name, arguments in calls)
        return f"{self.open}{self.separator.join(each)}{self.close}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One table. Marks are written as the model writes them; those in `looks` are seen and not taken.

    What holds in "text" holds in "start" as well. `signs`: each inner tuple is a set of texts of which a chat template
    that speaks so holds all. `writes` are ways to write calls that it reads, none where they are not JSON.
    """

    name: str
    reads: Mapping[str, Reads]
    moves: Mapping[tuple[str, str], Move]
    looks: frozenset[str] = frozenset()
    signs: tuple[tuple[str, ...], ...] = ()
    writes: tuple[Writing, ...] = ()
    also: tuple[str, ...] = ()
    """Marks that only prompts hold: what users write of them is text, as it is for the others."""

    states: Mapping[str, Reads] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", {**ALWAYS, **self.reads})

    def leaving(self, state: str) -> dict[str, Move]:
        """The moves out of a state by their marks."""
        inherited = {**self.leaving("text"), OTHER: ("text",)} if state == "start" else {}
        return inherited | {mark: move for (left, mark), move in self.moves.items() if left == state}

    @property
    def marks(self) -> frozenset[str]:
        """All texts that lead from state to state."""
        return frozenset(mark for _, mark in self.moves if mark not in (DONE, OTHER))


@dataclass(frozen=True, kw_only=True)
class Thoughts:
    """How a family sets its reasoning apart: one row.

    `assumed`: it thinks from its first token on, unless the prompt has closed the thought (DeepSeek R1).
    """

    name: str
    opens: str
    closes: str
    assumed: bool = False

    @property
    def form(self) -> Form:
        """The row as a table of its own."""
        return Form(
            name=self.name,
            reads={"opened": "space", "thought": "thought"},
            moves={
                ("start", self.opens): ("opened",),
                ("opened", self.opens): ("opened",),
                ("opened", self.closes): ("start",),
                ("opened", OTHER): ("thought",),
                ("thought", self.closes): ("start",),
            },
        )


def joined(*forms: Form | None) -> Form:
    """One table of several, which share "start" and "text" alone."""
    given = [form for form in forms if form is not None]
    return Form(
        name="+".join(form.name for form in given),
        reads={state: reads for form in given for state, reads in form.reads.items()},
        moves={key: move for form in given for key, move in form.moves.items()},
        looks=frozenset[str]().union(*(form.looks for form in given)),
    )
