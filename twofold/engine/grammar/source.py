"""StructuredOutputs as the grammar text that llguidance reads.

Options of JSON are given as overrides, so a schema that sets llguidance's own ("x-guidance") changes nothing. Two of
llguidance's liberties are taken away, because through them JSON passes that its schema forbids:

- `\\u0066oo` is another spelling of the property `foo`, which would pass as a property that the schema does not name:
  only the escapes of one letter are allowed, so every text has one spelling.
- `{"a": 1, "a": 1}` is one property to a reader, and would pass for two: `minProperties` is a keyword that no grammar
  holds, unless as many are required.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, grammar_from

from ...core import RequestError
from ...data.schema import MANY, NAMED, ONE
from ..structured import StructuredOutputs, walk
from .tags import tag_grammar

Special = Callable[[str], int | None]
"""The id of the special token that a text spells, if it spells one."""

WHITESPACE = r"[ \t]|\r?\n[ \t]{0,64}"
"""Between the parts of JSON, when nothing else is said: nothing, a blank, or a new line and its indentation. A model
that says nothing but blanks for ever, as models do when any amount is allowed, is kept from it."""
ESCAPES = '"\\bfnrt'
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
JSON_OBJECT = '{"type": "object"}'


def grammar_source(wanted: StructuredOutputs, special: Special) -> str:
    """The grammar of one form.

    Raises:
        RequestError: it cannot be one; the message says which part.
    """
    form = wanted.form
    try:
        if wanted.regex is not None:
            return LLMatcher.grammar_from_regex(wanted.regex)
        if wanted.choice is not None:
            return _lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice))
        if wanted.grammar is not None:
            return grammar_from("ebnf" if "::=" in wanted.grammar else "lark", wanted.grammar)
        if wanted.structural_tag is not None:
            tag = json.loads(str(wanted.structural_tag))
            return tag_grammar(tag, special, lambda schema: embedded(schema, wanted))
        schema = JSON_OBJECT if wanted.json_object else str(wanted.json)
        return _schema_grammar(json.loads(schema), wanted)
    except (ValueError, RecursionError, IndexError) as error:
        raise RequestError(
            f"structured_outputs.{form} cannot be compiled: {error!s:.400}", f"structured_outputs.{form}"
        ) from None


def _lark(text: str) -> str:
    return LLMatcher.grammar_from_lark(text)


def _schema_grammar(schema: Any, wanted: StructuredOutputs) -> str:
    return LLMatcher.grammar_from_json_schema(_prepared(schema, wanted), overrides=options(wanted))  # type: ignore[arg-type]


def embedded(schema: Any, wanted: StructuredOutputs) -> str:
    """A schema with its options inside, as a piece of Lark."""
    return "%json " + json.dumps({**_prepared(schema, wanted), "x-guidance": options(wanted)}, ensure_ascii=False)


def options(wanted: StructuredOutputs) -> dict[str, Any]:
    """llguidance's options of JSON; `lenient` leaves out of the grammar what no grammar can hold."""
    found: dict[str, Any] = {
        "whitespace_flexible": not wanted.disable_any_whitespace,
        "coerce_one_of": not wanted.strict,
        "lenient": not wanted.strict,
        "json_allowed_escapes": ESCAPES,
    }
    if not wanted.disable_any_whitespace:
        found["whitespace_pattern"] = wanted.whitespace_pattern or WHITESPACE
    return found


def _prepared(schema: Any, wanted: StructuredOutputs) -> dict[str, Any]:
    """A schema as llguidance is to see it."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is a table or true, not {json.dumps(schema):.40}")
    for text, _ in walk(schema):
        names = text if isinstance(text, dict) else (text,)
        if any(isinstance(name, str) and _UNWRITABLE.search(name) for name in names):
            raise ValueError("it holds a control character, which only \\u could write: leave it out")
    changed: dict[str, Any] = _changed(schema, wanted)
    return changed


def _changed(schema: Any, wanted: StructuredOutputs) -> Any:
    """The schema with all within it, at every place where a schema stands."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for word, value in schema.items():
        if word in ONE:
            found[word] = _changed(value, wanted)
        elif word in MANY and isinstance(value, list):
            found[word] = [_changed(part, wanted) for part in value]
        elif word in NAMED and isinstance(value, dict):
            found[word] = {name: _changed(part, wanted) for name, part in value.items()}
    named = isinstance(schema.get("properties"), dict) or isinstance(schema.get("patternProperties"), dict)
    if wanted.disable_additional_properties and named:
        found.setdefault("additionalProperties", False)
    if schema.get("uniqueItems") is False:
        del found["uniqueItems"]
    _count(found, wanted)
    if not wanted.strict and isinstance(pattern := schema.get("pattern"), str) and not _regular(pattern):
        del found["pattern"]
    return found


def _count(schema: dict[str, Any], wanted: StructuredOutputs) -> None:
    """`minProperties` is refused, or left out, unless it says nothing beyond `required`, or that there is one."""
    least, required = schema.get("minProperties"), schema.get("required")
    sure = len(set(map(str, required))) if isinstance(required, list) else 0
    if not wanted.strict:
        schema.pop("minProperties", None)
        schema.pop("maxProperties", None)
    elif isinstance(least, int) and least > max(1, sure):
        raise ValueError('no grammar holds the keyword "minProperties" above 1 and above the count of required ones')


def _regular(pattern: str) -> bool:
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern))
