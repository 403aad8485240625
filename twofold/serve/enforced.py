"""Enforced: the form of an answer that must call, or whose calls must fit their schema, with room to think before it.

    required, a named function    [a thought] then calls, and nothing else
    auto, with a strict function  any text; once a call begins, it is one of the tools' and fits
    auto, with a form             [a thought] then calls, or the form
    a form without tools          [a thought] then the form

A mark among the texts stands alone, so that the grammar takes the vocabulary's token for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from ..core import RequestError
from ..data.speech import Manner, Thoughts, Writing
from ..engine.grammar.pythonic import python_arguments
from ..engine.sampling import SamplingParams
from ..engine.structured import StructuredOutputs
from .hearing import Hearing
from .judge import Judge
from .tools import Tools

Part = dict[str, Any]

ANY_OBJECT: Part = {"type": "object"}


def form_of(manner: Manner, tools: Tools, form: StructuredOutputs | None, *, opened: bool) -> StructuredOutputs | None:
    """What the whole answer must look like; None where it may be anything. `opened`: the prompt began a thought.

    Raises:
        RequestError: tools and a form that cannot both be had.
    """
    if not enforces(tools, form):
        return form and _with_thought(manner, form, opened=opened)
    if tools.forced and form is not None:
        raise RequestError("calls that are enforced leave no room for a form of the answer: send one", "tool_choice")
    if form is not None:
        part = _part(form)
        if part is None:
            raise RequestError("tools and this form of the answer exclude each other: send one", "tools")
        either: Part = {"type": "or", "elements": [_calls(manner, tools), part]}
        return _tagged(_after_thought(manner.thoughts, [either], opened=opened))
    if not tools.forced:
        return _tagged(_when_begun(manner, tools))
    return _tagged(_after_thought(manner.thoughts, [_calls(manner, tools)], opened=opened))


def enforces(tools: Tools, form: StructuredOutputs | None) -> bool:
    """Whether calls are made by a grammar: they are asked for, held to a schema, or all that a form leaves room for."""
    return bool(tools) and (tools.forced or bool(tools.strict) or form is not None)


async def enforce(judge: Judge, hearing: Hearing, params: SamplingParams) -> tuple[SamplingParams, Hearing]:
    """The parameters with what the answer must look like, and how it is listened to then.

    Raises:
        RequestError: a tool's schema cannot be enforced.
    """
    form, manner, tools = params.structured_outputs, hearing.manner, hearing.tools
    wanted = form_of(manner, tools, form, opened=hearing.start in ("opened", "thought"))
    if wanted is None:
        return params, hearing
    if wanted is form:  # no thought can stand before it: all of the answer is content
        return params, replace(hearing, start="text") if manner.thoughts else hearing
    try:
        await judge.check(wanted)
    except RequestError as error:
        raise RequestError(f"a schema cannot be enforced: {error}", "tools" if tools else "response_format") from None
    return replace(params, structured_outputs=wanted), replace(hearing, enforced=enforces(tools, form))


def _tagged(part: Part) -> StructuredOutputs:
    return StructuredOutputs(structural_tag={"type": "structural_tag", "format": part})


# ------------------------------------------------------------------------------------------------------- calls


def _calls(manner: Manner, tools: Tools) -> Part:
    """One call or more, as the model's form writes them."""
    speaker, way = manner.forced
    marks = _marks(speaker)
    chosen = [tool for tool in tools.given if tools.choice != "named" or tool["function"]["name"] == tools.named]
    each = [_tag("", _call(way, tool["function"], marks, tools)) for tool in chosen]
    one = tools.most == 1
    calls: Part = {"type": "tags_with_separator", "tags": each, "separator": way.separator, "at_least_one": True}
    return _sequence([*_texts(way.open, marks), calls | {"stop_after_first": one}, *_texts(way.close, marks)])


def _call(way: Writing, function: Part, marks: re.Pattern[str], tools: Tools) -> list[Part]:
    schema = function["parameters"] if tools.forced or function["name"] in tools.strict else ANY_OBJECT
    written: Part = {"type": "json_schema", "json_schema": schema}
    if way.pythonic:
        written = {"type": "grammar", "grammar": python_arguments(schema)}
    before = f"{way.before}{function['name']}{way.between}"
    return [*_texts(before, marks), written, *_texts(way.after, marks)]


def _when_begun(manner: Manner, tools: Tools) -> Part:
    """Any text up to the first mark of a call; without a mark, a text that does not begin as a call does."""
    speaker, way = manner.forced
    marks = _marks(speaker)
    first = (_texts(way.open + way.before, marks) or [{"value": ""}])[0]["value"]
    calls = _calls(manner, tools)
    if not marks.fullmatch(first):
        start = re.escape((way.open + way.before)[:1])
        return {"type": "or", "elements": [calls, {"type": "regex", "pattern": rf"([^{start}\s](.|\n)*)?"}]}
    tags = []
    if way.open:
        inner = _sequence(calls["elements"][1:])
        tags.append({"type": "tag", "begin": first, "content": inner, "end": ""})
    else:
        for tool in tools.given:
            parts = _call(way, tool["function"], marks, tools)[1:]
            tags.append({"type": "tag", "begin": first, "content": _sequence(parts), "end": ""})
    return {"type": "triggered_tags", "triggers": [first], "tags": tags, "stop_after_first": tools.most == 1}


def _marks(manner: Manner) -> re.Pattern[str]:
    known = [mark for mark in (manner.calls.marks if manner.calls else ()) if len(mark) > 3]
    return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or r"(?!)")


def _texts(text: str, marks: re.Pattern[str]) -> list[Part]:
    """A text as its marks and what is between them."""
    pieces, last = [], 0
    for match in marks.finditer(text):
        pieces += [text[last : match.start()], match[0]]
        last = match.end()
    return [{"type": "const_string", "value": piece} for piece in [*pieces, text[last:]] if piece]


def _sequence(parts: list[Part]) -> Part:
    return parts[0] if len(parts) == 1 else {"type": "sequence", "elements": parts}


def _tag(begin: str, parts: list[Part], end: str = "") -> Part:
    return {"type": "tag", "begin": begin, "content": _sequence(parts), "end": end}


# ------------------------------------------------------------------------------------------------------- thoughts


def _after_thought(row: Thoughts | None, parts: list[Part], *, opened: bool) -> Part:
    if row is None:
        return _sequence(parts)
    anything: Part = {"type": "any_text"}
    space: Part = {"type": "regex", "pattern": r"\s{0,2}"}
    begin = "" if opened else row.opens
    thought = [{"type": "tag", "begin": begin, "content": anything, "end": row.closes}, space, *parts]
    return _sequence(thought) if opened else {"type": "or", "elements": [_sequence(thought), _sequence(parts)]}


def _with_thought(manner: Manner, form: StructuredOutputs, *, opened: bool) -> StructuredOutputs | None:
    """The form after a thought; as it is where it cannot stand in a tag, and then the answer is content alone."""
    if manner.thoughts is None:
        return form
    part = _part(form)
    return form if part is None else _tagged(_after_thought(manner.thoughts, [part], opened=opened))


def _part(form: StructuredOutputs) -> Part | None:
    if form.disable_any_whitespace or form.disable_additional_properties or form.whitespace_pattern is not None:
        return None
    if form.json is not None:
        return {"type": "json_schema", "json_schema": json.loads(str(form.json))} if form.strict else None
    if form.json_object:
        return {"type": "json_schema", "json_schema": ANY_OBJECT}
    if form.regex is not None:
        return {"type": "regex", "pattern": form.regex}
    if form.choice is not None:
        return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in form.choice]}
    return {"type": "grammar", "grammar": form.grammar} if form.grammar is not None else None
