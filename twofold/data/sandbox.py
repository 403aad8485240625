"""Chat templates are programs from a model folder: they run in jinja2's sandbox, with limits on time and size.

What jinja2's immutable sandbox leaves open, and what closes it here:

    loops inside loops            every turn of a loop looks at the clock
    9 ** 9 ** 9                   powers of more than 64 bits are refused
    text doubled in a loop        `+`, `*` and `~` measure what they would make
    text without end              output is counted while it is made
    a macro that calls itself     Python's own limit, told as a RequestError

A template can still spend memory in a filter's argument: folders are chosen by the operator, never by a request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..core import CheckpointError, RequestError

_CLOCK, _SIZE, _MARK = "twofold_deadline", "twofold_size", "twofold_mark"


@dataclass(frozen=True, kw_only=True)
class RenderLimits:
    """How long one rendering may take, in seconds, and how long its text may become, in characters."""

    seconds: float = 5.0
    characters: int = 8_000_000


class _Budget(jinja2.ext.Extension):
    """Wraps what a template loops over and what it concatenates in filters that look at the limits."""

    def wrap(self, template: nodes.Template) -> None:
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "twofold_turns", [], [], None, None, lineno=loop.lineno)
        for concat in template.find_all(nodes.Concat):
            pieces = nodes.List(list(concat.nodes), lineno=concat.lineno)
            concat.nodes = [nodes.Filter(pieces, "twofold_concat", [], [], None, None, lineno=concat.lineno)]
        template.set_environment(self.environment)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what the model itself is to write; its text is set between marks when one is given."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        mark = context.get(_MARK, "")
        return f"{mark}{caller()}{mark}"


class _Attributes(Namespace):
    """jinja2's namespace without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may call an attribute `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"a template may not set '{name}': names start with a letter")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"**", "*", "+"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        limit = context.get(_SIZE, 0)
        if operator == "**" and _bits(left) * abs(right if isinstance(right, int) else 1) > 64:
            raise jinja2.TemplateError("a power of more than 64 bits")
        size = _length(left) + _length(right)
        if operator == "*":
            times = [value for value in (left, right) if isinstance(value, int)]
            size *= max([1, *times]) if size else 0
            size += sum(map(_bits, times)) if len(times) == 2 else 0
        if size > limit:
            raise jinja2.TemplateError(f"text or a list of {size} items, at most {limit}")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Budget(self).wrap(template)
        return template


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


@jinja2.pass_context
def _turns(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    deadline = context[_CLOCK]
    for item in items:
        if time.monotonic() > deadline:
            raise _TooLong
        yield item


@jinja2.pass_context
def _concat(context: jinja2.runtime.Context, pieces: list[Any]) -> str:
    text = [str(piece) for piece in pieces]
    if sum(map(len, text)) > context[_SIZE]:
        raise jinja2.TemplateError(f"text of more than {context[_SIZE]} characters")
    return "".join(text)


class _TooLong(Exception):
    pass


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """A template in its sandbox, with the names that Hugging Face templates rely on.

    Raises:
        CheckpointError: the source is not a jinja2 template; the line is named.
    """
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    sandbox.filters |= {"tojson": _tojson, "twofold_turns": _turns, "twofold_concat": _concat}
    sandbox.globals |= {
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
        "dict": _dict,
        "namespace": _Attributes,
    }
    try:
        return sandbox.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not jinja2, line {error.lineno}: {error.message}") from None


def render_template(
    template: jinja2.Template, values: Mapping[str, Any], limits: RenderLimits, *, mark: str = ""
) -> str:
    """The text of a template for `values`; `mark` surrounds what stands in `{% generation %}` blocks.

    Raises:
        RequestError: the template refused the messages, failed on them, or went over a limit.
    """
    deadline = time.monotonic() + limits.seconds
    hidden = {_CLOCK: deadline, _SIZE: limits.characters, _MARK: mark}
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate({**values, **hidden}):
            pieces.append(piece)
            size += len(piece)
            if size > limits.characters:
                raise RequestError(f"the chat template wrote more than {limits.characters} characters", "messages")
            if time.monotonic() > deadline:
                raise _TooLong
    except RequestError:
        raise
    except _TooLong:
        raise RequestError(f"the chat template took more than {limits.seconds:g} s: send less", "messages") from None
    except Exception as error:  # a template is a program: it may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise RequestError(f"the chat template refused the messages: {kind}{error}", "messages") from None
    return "".join(pieces)
