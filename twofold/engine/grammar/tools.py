"""tools_grammar: the form that makes calls of tools well formed, in whatever wrapping a model's format has.

open ─▶ begin ─▶ name ─▶ middle ─▶ arguments ─▶ end ─▶ separator ─▶ begin ...  ─▶ close

Hermes     begin '<tool_call>\\n{"name": "'  middle '", "arguments": '  end '}\\n</tool_call>'  separator '\\n'
Mistral    open '[TOOL_CALLS] ['  begin '{"name": "'  middle '", "arguments": '  end '}'  separator ', '  close ']'
pythonic   open '['  begin ''  middle '('  end ')'  separator ', '  close ']'
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...core import RequestError
from ..structured import StructuredOutputs


def tools_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None = "auto",
    *,
    begin: str,
    middle: str,
    end: str,
    open: str = "",
    separator: str = "",
    close: str = "",
    trigger: str = "",
    pythonic: bool = False,
    parallel: bool = True,
) -> StructuredOutputs | None:
    """What an answer to these tools (OpenAI's table) must look like; None where nothing is to be enforced.

    `choice` "required" wants at least one call, a named function exactly that one, "auto" leaves the text free until
    `trigger` is said and then wants a call (without a trigger it enforces nothing, since free text may say anything).
    `parallel` False stops after one call. `open` to `close` wrap the calls as drawn above; a text among them that
    spells a special token is that token.

    Raises:
        RequestError: a tool without a name, the same name twice, or a choice that names none of them.
    """
    known = _chosen(_functions(tools), choice)
    parallel = parallel and not isinstance(choice, Mapping)
    if not known or (choice == "auto" and not trigger):
        return None
    tags = [
        {"type": "tag", "begin": f"{begin}{name}{middle}", "content": _arguments(schema, pythonic), "end": end}
        for name, schema in known.items()
    ]
    calls: dict[str, Any] = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    if choice == "auto":
        if not (open or begin).startswith(trigger):
            raise RequestError(f"the calls begin with {open or begin!r}, not with the trigger {trigger!r}", "tools")
        if open:
            tags = [{"type": "tag", "begin": open, "content": calls, "end": close}]
        body: dict[str, Any] = {
            "type": "triggered_tags",
            "triggers": [trigger],
            "tags": tags,
            "stop_after_first": not parallel,
        }
    else:
        around = [{"type": "const_string", "value": text} if text else None for text in (open, close)]
        body = {"type": "sequence", "elements": [part for part in (around[0], calls, around[1]) if part]}
    return StructuredOutputs(structural_tag={"type": "structural_tag", "format": body})


def _chosen(known: dict[str, Any], choice: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The functions that may be called."""
    if choice in (None, "none"):
        return {}
    if isinstance(choice, Mapping):
        wanted = (choice.get("function") or {}).get("name", choice.get("name"))
        if wanted not in known:
            raise RequestError(f"tool_choice names {wanted!r:.80}, which is not among the tools", "tool_choice")
        return {str(wanted): known[str(wanted)]}
    if choice not in ("auto", "required"):
        raise RequestError(f"tool_choice must be none, auto, required or a function, not {choice!r:.80}", "tool_choice")
    return known


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of each function's arguments by its name."""
    found: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise RequestError(f"tools[{number}] has no function with a name", f"tools[{number}]")
        if name in found:
            raise RequestError(f"tools[{number}] is named {name!r:.80}, as another is", f"tools[{number}]")
        schema = function.get("parameters")
        found[name] = {"type": "object", "properties": {}} if schema is None else schema
    return found


def _arguments(schema: Any, pythonic: bool) -> dict[str, Any]:
    if not pythonic:
        return {"type": "json_schema", "json_schema": schema}
    return {"type": "grammar", "grammar": python_arguments(schema)}


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
