"""Manner: how one checkpoint speaks: its form of calls and of reasoning, found by its chat template's marks or by name.

Where the vocabulary has a mark as a token of its own, that token is the mark, and text that spells it is text: a model
that quotes what a user wrote calls nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from ...core import ConfigError, unknown
from .form import Form, Thoughts, Writing, joined
from .forms import FORM_ALIASES, FORMS, HERMES, THOUGHT_ALIASES, THOUGHTS
from .listener import Listener

T = TypeVar("T")
AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Manner:
    """`calls` and `thoughts` None: it has none. `tokens` are the marks that its vocabulary has, by id."""

    calls: Form | None = None
    thoughts: Thoughts | None = None
    tokens: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Iterable[str], added: Mapping[str, int], *, calls: str = AUTO, thoughts: str = AUTO) -> Manner:
        """The manner of a checkpoint with these chat templates and added tokens, or the one that is named.

        Raises:
            ConfigError: nobody knows the name.
        """
        source = "\n".join(sources)
        form = _form_of(source) if calls == AUTO else _named("tool call parser", calls, FORMS, FORM_ALIASES)
        if thoughts == AUTO:
            row = _thoughts_of(source, added)
        else:
            row = _named("reasoning parser", thoughts, THOUGHTS, THOUGHT_ALIASES)
        marks = (form.marks if form else frozenset()) | ({row.opens, row.closes} if row else frozenset())
        return cls(form, row, {added[mark]: mark for mark in marks if mark in added})

    def __bool__(self) -> bool:
        return self.calls is not None or self.thoughts is not None

    @cached_property
    def _whole(self) -> Form:
        return joined(self.thoughts.form if self.thoughts else None, self.calls)

    @cached_property
    def _thinking(self) -> Form:
        return joined(self.thoughts.form if self.thoughts else None)

    def listen(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        start: str = "start",
        most: int | None = None,
    ) -> Listener:
        """A listener for one answer. Without `tools` calls are text.

        `tools` are JSON schemas of functions, as clients send them.
        """
        return Listener(
            self._whole if tools is not None else self._thinking,
            exact=frozenset(self.tokens.values()),
            tools={str(_function(tool)["name"]): _types(_function(tool)) for tool in tools or ()},
            start=start,
            most=most,
        )

    @property
    def forced(self) -> tuple[Manner, Writing]:
        """How calls are written and heard when a grammar makes the model call: in its own form, or in Hermes' where
        its own is not JSON."""
        form = self.calls if self.calls and self.calls.writes else HERMES
        fits = [way for way in form.writes if not way.needs or way.needs in self.tokens.values()]
        return replace(self, calls=form), fits[0]

    def kept(self, *, calls: bool) -> dict[int, str]:
        """The tokens that must stay in the text for `listen`, with their texts."""
        form = self._whole if calls else self._thinking
        return {token: mark for token, mark in self.tokens.items() if mark in form.marks}

    def start(self, prompt: str, continued: str | None = None) -> str:
        """The state in which an answer to `prompt` begins; `continued` is the message that it goes on with.

        Templates may open the thought themselves, or open and close it, so that the model does not think.
        """
        if self.thoughts is None:
            return "start"
        opens, closes = self.thoughts.opens, self.thoughts.closes
        if continued is not None:
            return "thought" if continued.rfind(opens) > continued.rfind(closes) else "text"
        end = prompt.rstrip()
        if end.endswith(opens):
            return "opened"
        return "opened" if self.thoughts.assumed and not end.endswith(closes) else "start"


def _named(kind: str, name: str, known: Mapping[str, T], aliases: Mapping[str, str]) -> T | None:
    if name == NONE:
        return None
    found = aliases.get(name, name)
    if found not in known:
        raise ConfigError(unknown(kind, name, [*known, *aliases, AUTO, NONE]))
    return known[found]


def _form_of(source: str) -> Form | None:
    if "tool" not in source:
        return None
    held = (form for form in FORMS.values() for signs in form.signs if all(sign in source for sign in signs))
    return next(held, None)


def _thoughts_of(source: str, added: Mapping[str, int]) -> Thoughts | None:
    """By the template; else by the vocabulary, since some templates speak of no thought and leave it to the model."""
    written = [row for row in THOUGHTS.values() if row.closes in source]
    return next(iter(written + [row for row in THOUGHTS.values() if {row.opens, row.closes} <= added.keys()]), None)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _types(function: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """What each parameter may be; empty where the schema does not say it plainly."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {str(name): frozenset(_kinds(schema)) for name, schema in properties.items()}


def _kinds(schema: Any) -> Iterable[str]:
    choices = [schema]
    for name in ("anyOf", "oneOf"):
        several = schema.get(name) if isinstance(schema, Mapping) else None
        choices += several if isinstance(several, list) else []
    for choice in choices:
        kind = choice.get("type") if isinstance(choice, Mapping) else None
        kinds = kind if isinstance(kind, list) else [kind]
        yield from (one for one in kinds if isinstance(one, str))
