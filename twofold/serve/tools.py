"""Tools: what a chat may call, and what it has called, as clients send it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ..core import RequestError

MOST_TOOLS = 256
_NAME = re.compile(r"[a-zA-Z0-9_.\-]{1,64}")


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """A function that may be called; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class Named(msgspec.Struct, forbid_unknown_fields=True):
    """`tool_choice` of one function."""

    function: FunctionName
    type: Literal["function"] = "function"


class Called(msgspec.Struct, forbid_unknown_fields=True):
    """The function of a call that was made; `arguments` is the text of a JSON object, or the object."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call that was made. `index` is what a stream had beside it, and means nothing here."""

    function: Called
    id: str = ""
    type: Literal["function"] = "function"
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": "{}" if arguments in (None, "") else arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The tools of one request as a template and a grammar read them, and what is to be done with them.

    `choice` is "auto", "none", "required" or the one function's name, then in `named`. `strict` are the functions whose
    arguments must fit their schema whatever the choice.
    """

    given: tuple[dict[str, Any], ...] = ()
    choice: Literal["auto", "none", "required", "named"] = "auto"
    named: str = ""
    parallel: bool = True
    strict: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        """Whether anything may be called."""
        return bool(self.given) and self.choice != "none"

    @property
    def forced(self) -> bool:
        return self.choice in ("required", "named")

    @property
    def most(self) -> int | None:
        """How many calls one answer may make."""
        return None if self.parallel and self.choice != "named" else 1


def asked(tools: list[Tool] | None, choice: str | Named | None, parallel: bool | None) -> Tools:
    """The tools of a request.

    Raises:
        RequestError: too many, a name that cannot be or comes twice, or a choice that is none of them.
    """
    tools = tools or []
    if len(tools) > MOST_TOOLS:
        raise RequestError(f"tools holds {len(tools)} tools, at most {MOST_TOOLS}: send fewer", "tools")
    given: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(tools):
        name = tool.function.name
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"a function's name is 1 to 64 letters, digits, '_', '.' and '-', not {name!r:.80}",
                f"tools[{place}].function.name",
            )
        if name in given:
            raise RequestError(f"two functions are named '{name}'", f"tools[{place}].function.name")
        given[name] = _plain(tool.function, place)
    named = choice.function.name if isinstance(choice, Named) else ""
    kind: Any = "named" if isinstance(choice, Named) else choice or ("auto" if given else "none")
    if kind not in ("auto", "none", "required", "named"):
        raise RequestError(f"tool_choice is none, auto, required or a function, not {kind!r:.40}", "tool_choice")
    if kind in ("required", "named") and not given:
        raise RequestError("tool_choice needs tools", "tool_choice")
    if kind == "named" and named not in given:
        raise RequestError(f"tool_choice names '{named:.80}', which is not one of the tools", "tool_choice")
    strict = frozenset(tool.function.name for tool in tools if tool.function.strict)
    return Tools(given=tuple(given.values()), choice=kind, named=named, parallel=parallel is not False, strict=strict)


def _plain(function: Function, place: int) -> dict[str, Any]:
    parameters = function.parameters if function.parameters is not None else {"type": "object", "properties": {}}
    if parameters and parameters.get("type", "object") != "object":
        raise RequestError(
            "a function's parameters are a JSON schema of type object", f"tools[{place}].function.parameters"
        )
    found = {"name": function.name, "description": function.description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in found.items() if value is not None}}
