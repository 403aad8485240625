"""Text, code and JSON out of a completion."""

from __future__ import annotations

import json
import re
from typing import Any

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def text_of(said: Any) -> str:
    """A prompt or completion as text: itself, or what its last message says."""
    if isinstance(said, str):
        return said
    for message in reversed(said or []):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            return content
        if isinstance(content, list):
            return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def fenced(text: str, *languages: str) -> str | None:
    """The last fenced block in one of these languages, else the last without a language, else None."""
    blocks = _FENCE.findall(text)
    for wanted in (languages, ("",)):
        found: list[str] = [inside for language, inside in blocks if language.lower() in wanted]
        if found:
            return found[-1]
    return None


def code_of(prompt: Any, completion: Any, *, prefix: bool) -> str:
    """The program: a fenced block of Python, else all of it; with `prefix` behind the prompt."""
    text = text_of(completion)
    if not prefix:
        block = fenced(text, "python", "py", "python3")
        return text if block is None else block
    return text_of(prompt) + text


def json_of(completion: Any) -> Any:
    """The JSON that a completion is, or that its last fenced block holds. Raises ValueError."""
    text = text_of(completion)
    block = fenced(text, "json")
    return json.loads(text if block is None else block, parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
