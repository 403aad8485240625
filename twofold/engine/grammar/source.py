"""StructuredOutputs as the grammar text that llguidance reads.

Options of JSON are given as overrides, so a schema that sets llguidance's own ("x-guidance") changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, grammar_from

from ...core import RequestError
from ..structured import StructuredOutputs
from .tags import tag_grammar

Special = Callable[[str], int | None]
"""The id of the special token that a text spells, if it spells one."""

WHITESPACE = r"[ \t]|\r?\n[ \t]{0,64}"
"""Between the parts of JSON, when nothing else is said: nothing, a blank, or a new line and its indentation. A model
that says nothing but blanks for ever, as models do when any amount is allowed, is kept from it."""
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
    }
    if not wanted.disable_any_whitespace:
        found["whitespace_pattern"] = wanted.whitespace_pattern or WHITESPACE
    return found


def _prepared(schema: Any, wanted: StructuredOutputs) -> dict[str, Any]:
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is a table or true, not {json.dumps(schema):.40}")
    return dict(_closed(schema)) if wanted.disable_additional_properties else schema


def _closed(part: Any) -> Any:
    """The schema with every table that names properties closed to others."""
    if isinstance(part, list):
        return [_closed(each) for each in part]
    if not isinstance(part, dict):
        return part
    found = {name: value if name in ("const", "enum") else _closed(value) for name, value in part.items()}
    named = isinstance(part.get("properties"), dict) or isinstance(part.get("patternProperties"), dict)
    if named and "additionalProperties" not in part:
        found["additionalProperties"] = False
    return found
