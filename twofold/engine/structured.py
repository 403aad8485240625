"""StructuredOutputs: the form that an answer must have, checked for size and sense before anything compiles it.

Names are those of vLLM's `structured_outputs`, so that clients carry over. What the forms mean is written in
docs/structured.md; turning one into a grammar, and a grammar into masks, is `engine/grammar/`.
"""

from __future__ import annotations

import json as standard
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..core import RequestError

MAX_TEXT = 64 << 10
"""Bytes of a schema, a pattern, a grammar or a structural tag."""
MAX_CHOICES = 10_000
"""Alternatives of `choice`, and of one `enum`."""
MAX_DEPTH = 64
"""How deep a schema may nest."""

FORMS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """Exactly one of: `json` (a JSON Schema, as text or a mapping), `json_object`, `regex`, `choice` (one of these
    texts), `grammar` (Lark, or GBNF with `::=`), `structural_tag` (free text with forms inside, as text or a mapping).

    `strict` refuses a schema with a keyword that no grammar can hold; without it that keyword is left out of the
    grammar, and the finished JSON is checked against the whole schema. The other three only shape JSON.

    Raises:
        RequestError: none or several forms, one that is too large, or a text that UTF-8 or JSON cannot hold.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("json", "structural_tag"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, _text(name, value))
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'no form'}: name exactly one of {', '.join(FORMS)}",
                "structured_outputs",
            )
        self._check_texts()
        if isinstance(self.json, str):
            _check_schema(_parsed("json", self.json))
        if isinstance(self.structural_tag, str):
            parsed = _parsed("structural_tag", self.structural_tag)
            if not isinstance(parsed, dict):
                raise _wrong("structural_tag", "must be a table")
            _check_schema(parsed)

    def _check_texts(self) -> None:
        if self.choice is not None:
            if not 1 <= len(self.choice) <= MAX_CHOICES:
                raise _wrong("choice", f"has {len(self.choice)} entries: send 1 to {MAX_CHOICES}")
            if not all(isinstance(text, str) and text for text in self.choice):
                raise _wrong("choice", "holds something else than texts of at least one character")
        for name in (*FORMS, "whitespace_pattern"):
            value = getattr(self, name)
            text = "".join(value) if isinstance(value, tuple) else value
            if not isinstance(text, str):
                continue
            try:
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError:
                raise _wrong(name, "holds a lone surrogate, which UTF-8 cannot carry") from None
            if not text:
                raise _wrong(name, "is empty")
            if size > MAX_TEXT:
                raise _wrong(name, f"has {size} bytes, at most {MAX_TEXT} are taken")
            if "\0" in text:
                raise _wrong(name, "holds a NUL character")

    @property
    def form(self) -> str:
        """Which of FORMS this is."""
        return next(name for name in FORMS if getattr(self, name) not in (None, False))

    @property
    def checked_after(self) -> bool:
        """Whether the finished text must still be checked against the schema."""
        return self.json is not None and not self.strict


def _text(name: str, value: object) -> str:
    try:
        return standard.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise _wrong(name, "is not JSON: it is too deep, refers to itself, or holds what JSON has not") from None


def _parsed(name: str, text: str) -> Any:
    try:
        return standard.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "it nests too deep" if isinstance(error, RecursionError) else str(error)
        raise _wrong(name, f"is not JSON: {why:.200}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_schema(schema: Any) -> None:
    for value, depth in walk(schema):
        if depth > MAX_DEPTH:
            raise _wrong("json", f"nests deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            choices = value.get("enum")
            if isinstance(choices, list) and len(choices) > MAX_CHOICES:
                raise _wrong("json", f"has an enum of {len(choices)} values, at most {MAX_CHOICES} are taken")
            if "x-guidance" in value:
                raise _wrong("json", "holds 'x-guidance', which is a setting of the server's: leave it out")


def walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Every part of a parsed JSON value with its depth, without recursion."""
    todo = [(value, 0)]
    while todo:
        part, depth = todo.pop()
        yield part, depth
        if depth > MAX_DEPTH:
            continue
        inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        todo.extend((each, depth + 1) for each in inside)


def _wrong(name: str, why: str) -> RequestError:
    return RequestError(f"structured_outputs.{name} {why}", f"structured_outputs.{name}")
