"""Requests, items and answers of the Responses API.

What OpenAI has and this server has not is in NOT_DONE with the values that ask for nothing, as in `openai.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ...core import RequestError
from ..answers import ChatLogprob
from ..bodies import NotDone, check_done
from ..record import Timings

MAX_METADATA = 16
MAX_KEY, MAX_VALUE = 64, 512

NOT_DONE: NotDone = {
    "conversation": ((), "send previous_response_id"),
    "prompt": ((), "send the text itself"),
    "context_management": (([],), ""),
    "max_tool_calls": ((), "only functions are called, and by you"),
    "moderation": ((), ""),
    "service_tier": (("auto", "default"), ""),
}
INCLUDES = ("message.output_text.logprobs", "reasoning.encrypted_content")


class Item(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One item of an input: a message (the only one that may leave its type out), a call, its output, or reasoning."""

    type: str | None = None
    id: str | None = None
    status: str | None = None
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


class Format(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: Format | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class ResponseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses. `input` may be left out when `previous_response_id` says what goes before."""

    model: str | None = None
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # beside OpenAI's, as in chats
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    timings: bool | None = None
    # harmless: they ask for nothing that shows in the answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    # in NOT_DONE
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    service_tier: Any = None

    def check(self) -> None:
        """What no single field can say; raises RequestError."""
        check_done(self, NOT_DONE)
        if self.background and self.store is False:
            raise RequestError("background needs store: what is not kept cannot be fetched later", "background")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        for name in self.include or ():
            if name not in INCLUDES:
                raise RequestError(f"include knows {', '.join(INCLUDES)}, not {name!r:.60}", "include")
        check_metadata(self.metadata)

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)


def check_metadata(given: dict[str, str] | None) -> None:
    """OpenAI's bounds on what a client may write beside an object; raises RequestError."""
    if given is None:
        return
    if len(given) > MAX_METADATA:
        raise RequestError(f"metadata holds {len(given)} pairs, at most {MAX_METADATA}", "metadata")
    if any(len(key) > MAX_KEY or len(value) > MAX_VALUE for key, value in given.items()):
        raise RequestError(f"metadata's keys have at most {MAX_KEY} characters, its values {MAX_VALUE}", "metadata")


# -- output items ------------------------------------------------------------------------------------------------------


class OutputText(msgspec.Struct, tag="output_text"):
    text: str = ""
    annotations: list[dict[str, Any]] = []
    logprobs: list[ChatLogprob] = []


class ReasoningText(msgspec.Struct, tag="reasoning_text"):
    text: str = ""


class OutputMessage(msgspec.Struct, tag="message"):
    id: str
    status: str = "in_progress"
    role: str = "assistant"
    content: list[OutputText] = []


class Reasoning(msgspec.Struct, tag="reasoning"):
    id: str
    status: str = "in_progress"
    summary: list[dict[str, Any]] = []
    content: list[ReasoningText] = []
    encrypted_content: str | None = None


class FunctionCall(msgspec.Struct, tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"


OutputItem = OutputMessage | Reasoning | FunctionCall


# -- answers -----------------------------------------------------------------------------------------------------------


class InputDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails
    timings: Timings | UnsetType = UNSET


class ResponseError(msgspec.Struct):
    code: str
    message: str


class Incomplete(msgspec.Struct):
    reason: str


class Response(msgspec.Struct, kw_only=True):
    """An answer; `status` is queued, in_progress, completed, incomplete, failed or cancelled."""

    id: str
    created_at: int
    model: str
    status: str = "in_progress"
    object: str = "response"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: None = None
    metadata: dict[str, str] = {}
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: ReasoningConfig = msgspec.field(default_factory=ReasoningConfig)
    service_tier: str = "default"
    store: bool = True
    temperature: float = 1.0
    text: TextConfig = msgspec.field(default_factory=lambda: TextConfig(format=Format(type="text")))
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_logprobs: int = 0
    top_p: float = 1.0
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ItemList(msgspec.Struct):
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class ResponseDeleted(msgspec.Struct):
    id: str
    object: str = "response"
    deleted: bool = True
