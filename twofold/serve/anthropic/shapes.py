"""Requests and answers of the Messages API."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ..bodies import NotDone, check_done
from ..record import Timings

NOT_DONE: NotDone = {
    "service_tier": (("auto", "standard_only"), ""),
    "container": ((), ""),
    "context_management": (({},), ""),
    "mcp_servers": (([],), ""),
    "inference_geo": ((), ""),
}


class Block(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One block of content, of any type: which fields go with which is checked in `blocks.py`."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    source: dict[str, Any] | None = None
    citations: Any = None
    cache_control: Any = None
    caller: Any = None


class Turn(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: str
    content: str | list[Block]


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: OutputFormat | None = None
    effort: str | None = None


class Metadata(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    user_id: str | None = None


class CountRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages/count_tokens: what a prompt is made of."""

    model: str | None = None
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: Any = None
    context_management: Any = None
    mcp_servers: Any = None

    def check(self) -> None:
        """What no single field can say; raises RequestError."""
        check_done(self, NOT_DONE)


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None  # beside Anthropic's, as in chats
    timings: bool | None = None
    metadata: Metadata | None = None
    service_tier: Any = None
    container: Any = None
    inference_geo: Any = None


# -- answers -----------------------------------------------------------------------------------------------------------


class TextBlock(msgspec.Struct, tag="text"):
    text: str = ""


class ThinkingBlock(msgspec.Struct, tag="thinking"):
    """`signature` names the text, so that clients which want one have one; nothing here checks it."""

    thinking: str = ""
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any] = {}


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesUsage(msgspec.Struct):
    """Tokens; what was found in the cache is not in `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    timings: Timings | UnsetType = UNSET


class Answer(msgspec.Struct, tag="message"):
    id: str
    model: str
    usage: MessagesUsage
    content: list[ContentBlock]
    role: str = "assistant"
    stop_reason: str | None = None
    stop_sequence: str | None = None


class Count(msgspec.Struct):
    input_tokens: int
