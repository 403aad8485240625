"""The answers of OpenAI's API, whole and in pieces, as typed structs that msgspec writes.

Fields that OpenAI always sends are always sent, null included; those that vLLM adds appear when they were asked for.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from .record import Timings

PromptLogprobs = list[dict[str, "PromptLogprob"] | None]


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    structured_output_error: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    cumulative_logprob: float | UnsetType = UNSET
    beam_score: float | UnsetType = UNSET


class Text(msgspec.Struct):
    """A completion, and a piece of one: OpenAI gives both the same shape."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
    system_fingerprint: str | None = None


class CalledFunction(msgspec.Struct):
    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """A call, or a piece of one: `index` is a piece's, and a call's first piece alone has id, type and name."""

    function: CalledFunction
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    """`reasoning` is a second name of `reasoning_content`, for the clients that know that one."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    structured_output_error: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    cumulative_logprob: float | UnsetType = UNSET
    beam_score: float | UnsetType = UNSET


class Chat(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(msgspec.Struct):
    content: str | UnsetType = UNSET
    role: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    structured_output_error: str | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Chunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


_encoder = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def encode(answer: Any) -> bytes:
    """JSON; a log-probability of minus infinity is written as -9999, since JSON has no infinity."""
    return _encoder.encode(answer)


def event(answer: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(answer) + b"\n\n"


def json(answer: Any, status: int = 200) -> Response:
    return Response(encode(answer), status, media_type="application/json")
