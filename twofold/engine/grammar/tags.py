"""Structural tags as Lark: free text with forms inside, in xgrammar's notation, as vLLM takes it.

    {"type": "structural_tag", "format": F}                      F is one of
    {"type": "structural_tag", "structures": [...], "triggers": [...]}    the older notation

    const_string {value}      json_schema {json_schema}   regex {pattern}   grammar {grammar}   any_text
    sequence {elements}       or {elements}               tag {begin, content, end}
    triggered_tags {triggers, tags, at_least_one, stop_after_first}
    tags_with_separator {tags, separator, at_least_one, stop_after_first}

A begin or an end that spells a special token is that token, never its characters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

Special = Callable[[str], int | None]
EmbedSchema = Callable[[Any], str]

ANYTHING = r"/(.|\n)*/"
MAX_PARTS = 2000


def tag_grammar(tag: dict[str, Any], special: Special, schema: EmbedSchema) -> str:
    """The grammar of a structural tag.

    Raises:
        ValueError: a part that is not one of the above; the message says where.
    """
    made = _Writer(special, schema)
    if "structures" in tag or "triggers" in tag:
        _only(tag, "structural_tag", ("type", "structures", "triggers"))
        tags = [
            {"type": "tag", "begin": each.get("begin"), "end": each.get("end", ""),
             "content": {"type": "json_schema", "json_schema": each.get("schema", True)}}
            for each in _tables(tag.get("structures"), "structures")
        ]  # fmt: skip
        body = made.triggered({"triggers": tag.get("triggers"), "tags": tags}, "structural_tag")
    else:
        _only(tag, "structural_tag", ("type", "format"))
        body = made.part(tag.get("format"), "format")
    return made.grammar(body)


class _Writer:
    """Rules so far; each method gives what stands for its part in the rule around it."""

    def __init__(self, special: Special, schema: EmbedSchema) -> None:
        self.special = special
        self.schema = schema
        self.rules: list[str] = []
        self.others: list[dict[str, str]] = []

    def grammar(self, body: str) -> str:
        lark = "\n".join(["%llguidance {}", f"start: {body}", *self.rules]) + "\n"
        return json.dumps({"grammars": [{"name": "tags", "lark_grammar": lark}, *self.others]}, ensure_ascii=False)

    def rule(self, body: str, flags: str = "") -> str:
        if len(self.rules) >= MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} parts")
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{flags}: {body}")
        return name

    def part(self, part: Any, where: str) -> str:
        if not isinstance(part, dict):
            raise ValueError(f"{where} must be a table with a type")
        kind = part.get("type")
        writer = _PARTS.get(kind) if isinstance(kind, str) else None
        if writer is None:
            raise ValueError(f"{where}.type is {json.dumps(kind):.40}; choose one of {', '.join(_PARTS)}")
        return writer(self, part, where)

    # ------------------------------------------------------------------------------------ leaves
    def literal(self, text: str) -> str:
        token = self.special(text)
        return f"<[{token}]>" if token is not None else json.dumps(text, ensure_ascii=False)

    def const(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "value"))
        return self.literal(_string(part, "value", where))

    def json_schema(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "json_schema"))
        return self.rule(self.schema(part.get("json_schema", True)))

    def regex(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "pattern"))
        return f"/{regex_to_lark(_string(part, 'pattern', where))}/"

    def other(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "grammar"))
        text = _string(part, "grammar", where)
        name = f"g{len(self.others)}"
        self.others.append({"name": name, "lark_grammar": gbnf_to_lark(text) if "::=" in text else text})
        return f"@{name}"

    def any_text(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type",))
        return ANYTHING

    # ------------------------------------------------------------------------------------ nodes
    def sequence(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "elements"))
        return self.rule(" ".join(self._elements(part, where)))

    def either(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "elements"))
        return self.rule(" | ".join(self._elements(part, where)))

    def _elements(self, part: dict[str, Any], where: str) -> list[str]:
        elements = _tables(part.get("elements"), f"{where}.elements")
        return [self.part(each, f"{where}.elements[{at}]") for at, each in enumerate(elements)]

    def tag(self, part: dict[str, Any], where: str, skip: int = 0) -> str:
        """A tag; the first `skip` characters of its begin have been said already."""
        _only(part, where, ("type", "begin", "content", "end"))
        begin, content = _string(part, "begin", where, empty=True)[skip:], part.get("content")
        ends = part.get("end", "")
        ends = ends if isinstance(ends, list) else [ends]
        if not ends or not all(isinstance(end, str) for end in ends):
            raise ValueError(f"{where}.end must be a text, or a list of texts")
        start = f"{self.literal(begin)} " if begin else ""
        if isinstance(content, dict) and content.get("type") == "any_text":
            bodies = [self._until(end) for end in ends]
        else:
            body = self.part(content, f"{where}.content")
            bodies = [f"{body} {self.literal(end)}" if end else body for end in ends]
        return self.rule(" | ".join(f"{start}{body}" for body in bodies))

    def _until(self, end: str) -> str:
        """Any text, and the first `end` after it."""
        if not end:
            return ANYTHING
        if self.special(end) is not None:
            return f"{ANYTHING} {self.literal(end)}"
        return self.rule(f"{ANYTHING} {json.dumps(end, ensure_ascii=False)}", "[lazy]")

    def triggered(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "triggers", "tags", "at_least_one", "stop_after_first", "excludes"))
        if part.get("excludes"):
            raise ValueError(f"{where}.excludes is not done: leave it out")
        triggers = part.get("triggers")
        if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
            raise ValueError(f"{where}.triggers must be a list of texts")
        tags, left = _tables(part.get("tags"), f"{where}.tags"), set(range(len(part.get("tags") or ())))
        calls, plain = [], []
        for trigger in dict.fromkeys(triggers):
            mine = [at for at in sorted(left) if str(tags[at].get("begin", "")).startswith(trigger)]
            if not mine:
                continue
            left -= set(mine)
            rests = [self.tag(tags[at], f"{where}.tags[{at}]", len(trigger)) for at in mine]
            rest = self.rule(" | ".join(rests))
            if self.special(trigger) is not None:
                calls.append(f"{ANYTHING} {self.literal(trigger)} {rest}")
            else:
                calls.append(f"{self.rule(f'{ANYTHING} {json.dumps(trigger, ensure_ascii=False)}', '[lazy]')} {rest}")
            plain.append(f"{self.literal(trigger)} {rest}")
        if left:
            raise ValueError(f"{where}.tags[{min(left)}].begin starts with none of the triggers")
        call = self.rule(" | ".join(calls))
        first = self.rule(" | ".join(plain))  # where a call must come, no text stands before it
        if part.get("at_least_one"):
            return first if part.get("stop_after_first") else self.rule(f"{first} {call}* {ANYTHING}")
        return self.rule(f"{call} | {ANYTHING}" if part.get("stop_after_first") else f"{call}* {ANYTHING}")

    def separated(self, part: dict[str, Any], where: str) -> str:
        _only(part, where, ("type", "tags", "separator", "at_least_one", "stop_after_first"))
        tags = _tables(part.get("tags"), f"{where}.tags")
        one = self.rule(" | ".join(self.tag(each, f"{where}.tags[{at}]") for at, each in enumerate(tags)))
        separator = _string(part, "separator", where, empty=True) if "separator" in part else ""
        between = f"{self.literal(separator)} " if separator else ""
        some = one if part.get("stop_after_first") else self.rule(f"{one} ({between}{one})*")
        return some if part.get("at_least_one") else self.rule(f'{some} | ""')


_PARTS: dict[str, Callable[[_Writer, dict[str, Any], str], str]] = {
    "const_string": _Writer.const,
    "json_schema": _Writer.json_schema,
    "regex": _Writer.regex,
    "grammar": _Writer.other,
    "any_text": _Writer.any_text,
    "sequence": _Writer.sequence,
    "or": _Writer.either,
    "tag": _Writer.tag,
    "triggered_tags": _Writer.triggered,
    "tags_with_separator": _Writer.separated,
}


def _only(part: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    for name in part:
        if name not in known:
            raise ValueError(f"{where} has no field {name!r:.60}; it has {', '.join(known)}")


def _string(part: dict[str, Any], name: str, where: str, *, empty: bool = False) -> str:
    value = part.get(name)
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{where}.{name} must be a text")
    return value


def _tables(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{where} must be a list of tables")
    return value
