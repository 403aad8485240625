"""The messages of a chat, as clients send them and as a chat template reads them."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from ..core import RequestError
from .tools import ToolCall


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of a message's content; `text` is the one kind that is done."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    video_url: Any = None
    file: Any = None
    refusal: str | None = None
    uuid: str | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None

    ROLES: ClassVar[dict[str, str]] = {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
    }

    def plain(self, path: str) -> dict[str, Any]:
        """What a chat template reads; `path` names the message in errors."""
        if self.role not in self.ROLES:
            raise RequestError(f"role must be one of {', '.join(self.ROLES)}, not {self.role!r:.40}", f"{path}.role")
        for name in ("function_call", "audio"):
            if getattr(self, name) not in (None, []):
                raise RequestError(f"{name} is not done by this version: leave it out", f"{path}.{name}")
        self._check_calls(path)
        content = self.content
        if content is None and self.role != "assistant":
            raise RequestError("a message needs content", f"{path}.content")
        if isinstance(content, list):
            for i, part in enumerate(content):
                if part.type != "text" or part.text is None:
                    raise RequestError(
                        f"content of type {part.type!r:.40} is not done by this version: send text",
                        f"{path}.content[{i}].type",
                    )
            content = "\n".join(part.text or "" for part in content)
        found: dict[str, Any] = {"role": self.ROLES[self.role], "content": content or ""}
        if self.name:
            found["name"] = self.name
        if self.reasoning_content or self.reasoning:
            found["reasoning_content"] = self.reasoning_content or self.reasoning
        if self.tool_calls:
            found["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found

    def _check_calls(self, path: str) -> None:
        if self.tool_calls and self.role != "assistant":
            raise RequestError("only the assistant calls tools", f"{path}.tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise RequestError(
                "a message of the role 'tool' has the id of the call that it answers, and no other has",
                f"{path}.tool_call_id",
            )


def plain(messages: list[Message], most: int) -> list[dict[str, Any]]:
    """Messages as a chat template reads them; raises RequestError for none, too many, or a bad one."""
    if not 1 <= len(messages) <= most:
        raise RequestError(f"messages holds {len(messages)} messages: send 1 to {most}", "messages")
    return [message.plain(f"messages[{i}]") for i, message in enumerate(messages)]
