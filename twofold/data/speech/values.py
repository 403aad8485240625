"""Parameters written one by one, as in <parameter=a>1</parameter>, told as the text of one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable

_WORDS = {"True": "true", "False": "false", "None": "null"}


class Value:
    """The arguments of one call. A string's text is told as it arrives, without a line break at either border;
    what may be something else waits for its end: it is JSON if it reads as a type of its own, and else a string."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._first = True
        self._types = frozenset[str]()
        self._held = ""
        self._begun = False

    def key(self, name: str, types: frozenset[str]) -> None:
        """A parameter begins; `types` are JSON schema's names for what it may be."""
        self._emit(("{" if self._first else ", ") + json.dumps(name, ensure_ascii=False) + ": ")
        self._first, self._types, self._held, self._begun = False, types, "", False
        if self._plain:
            self._emit('"')

    @property
    def _plain(self) -> bool:
        return self._types == {"string"}

    def push(self, text: str) -> None:
        """More of its text."""
        self._held += text
        if not self._plain or not self._held:
            return
        if not self._begun:
            self._begun = True
            self._held = self._held.removeprefix("\n")
        end = len(self._held) - self._held.endswith("\n")
        self._emit(_inside(self._held[:end]))
        self._held = self._held[end:]

    def end(self) -> None:
        """All of it was there."""
        if self._plain:
            self._emit('"')
        else:
            self._emit(_typed(self._held.removeprefix("\n").removesuffix("\n"), self._types))
        self._held = ""

    def cut(self) -> None:
        """No more comes: what was held back."""
        self._emit(_inside(self._held) if self._plain else self._held)
        self._held = ""

    def close(self) -> None:
        """The call is complete."""
        self._emit("{}" if self._first else "}")


def _inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _typed(text: str, types: frozenset[str]) -> str:
    word = _WORDS.get(text.strip(), text.strip())
    try:
        found = json.loads(word)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    kinds = {dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    kind = kinds.get(type(found), "string")
    fits = not types or kind in types or (kind == "integer" and "number" in types) or "string" not in types
    return word if fits and word not in ("NaN", "Infinity", "-Infinity") else json.dumps(text, ensure_ascii=False)
