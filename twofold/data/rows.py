"""What stands in a row of data: text or messages, and tools; checked, with errors that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]
Said = str | tuple[Message, ...]
"""Text, or messages as the API takes them."""


def said(row: Mapping[str, Any], name: str) -> Said:
    """A column that is a string or a list of messages.

    Raises:
        ValueError: it is missing or something else.
    """
    value = row.get(name)
    return value if isinstance(value, str) else messages(value, name, "a string or a list of messages")


def messages(value: Any, name: str, wanted: str = "a list of messages") -> tuple[Message, ...]:
    """A list of messages, each with a role and with content or tool calls (whose content may be null).

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{name}' must be {wanted}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message is an object with 'role' and 'content', not {message!s:.80}")
        if "content" not in message and not message.get("tool_calls"):
            raise ValueError(f"a message has 'role' and 'content' (or 'tool_calls'), this one has not: {message!s:.80}")
    return tuple(message if "content" in message else {**message, "content": None} for message in value)


def tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The `tools` column: JSON schemas of functions, or a string that spells their list; empty without one.

    Raises:
        ValueError: it is something else.
    """
    value = row.get("tools")
    value = json.loads(value) if isinstance(value, str) else value
    if value is not None and (not isinstance(value, list) or any(not isinstance(tool, dict) for tool in value)):
        raise ValueError(f"'tools' must be a list of function schemas, not {value!s:.80}")
    return tuple(value or ())


def plain(value: Said) -> str | list[dict[str, Any]]:
    """Text or messages as JSON knows them."""
    return value if isinstance(value, str) else [dict(message) for message in value]
