"""python_arguments: a tool's schema as the keyword arguments of a call in Python, for models that call that way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def python_arguments(schema: Any) -> str:
    """Lark of keyword arguments `a=1, b="x"` in the schema's order; what is not required may be left out.

    Values are Python's: True, False and None instead of JSON's words; tables and lists inside are displays of these.
    """
    table = schema if isinstance(schema, Mapping) else {}
    properties = table.get("properties") or {}
    required = set(table.get("required") or ())
    rules = _Python()
    # after: what may follow once an argument stands; alone: what may come while none does
    after, alone = '""', '""'
    for name in reversed(properties):
        value = rules.value(properties[name])
        one = f"{json.dumps(name + '=', ensure_ascii=False)} {value}"
        skip = name not in required
        alone_now = rules.add(f"{one} {after}" + (f" | {alone}" if skip else ""))
        after = rules.add(f'", " {one} {after}' + (f" | {after}" if skip else ""))
        alone = alone_now
    return "\n".join(["%llguidance {}", f"start: {alone}", *rules.lines, *_PYTHON]) + "\n"


class _Python:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, body: str) -> str:
        self.lines.append(f"p{len(self.lines)}: {body}")
        return f"p{len(self.lines) - 1}"

    def value(self, schema: Any) -> str:
        """A rule for a Python value of this schema."""
        table = schema if isinstance(schema, Mapping) else {}
        if "enum" in table or "const" in table:
            choices = table["enum"] if "enum" in table else [table["const"]]
            return self.add(" | ".join(json.dumps(_spelled(each), ensure_ascii=False) for each in choices))
        kinds = table.get("type")
        if isinstance(kinds, list):
            return self.add(" | ".join(self.value({**table, "type": kind}) for kind in kinds))
        if kinds == "boolean":
            return "truth"
        if kinds == "null":
            return "nothing"
        if kinds == "array":
            item = self.value(table.get("items", True))
            return self.add(f'"[" ({item} (", " {item})*)? "]"')
        if kinds in ("string", "integer", "number"):
            return self.add("%json " + json.dumps(dict(table), ensure_ascii=False))
        return "thing" if kinds is None else "display"


def _spelled(value: Any) -> str:
    """A JSON value as Python spells it, strings as JSON does."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_spelled, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_spelled(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


_PYTHON = (
    'truth: "True" | "False"',
    'nothing: "None"',
    'text: %json {"type": "string"}',
    'count: %json {"type": "number"}',
    "thing: text | count | truth | nothing | row | display",
    'row: "[" (thing (", " thing)*)? "]"',
    'display: "{" (text ": " thing (", " text ": " thing)*)? "}"',
)
