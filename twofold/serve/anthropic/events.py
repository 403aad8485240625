"""Blocks: what a model says, step by step, as content blocks and the events that tell of them.

message_start ─▶ content_block_start ─▶ content_block_delta ... ─▶ content_block_stop ─▶ ... ─▶ message_delta
                                                                                             ─▶ message_stop
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from ..answers import Usage
from ..said import CallDelta, Step
from .shapes import Answer, ContentBlock, MessagesUsage, TextBlock, ThinkingBlock, ToolUseBlock

Event = dict[str, Any]

STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Blocks:
    """Grows `answer`; each event goes to `tell` at once, since what it refers to goes on changing."""

    def __init__(self, answer: Answer, tell: Callable[[Event], None]) -> None:
        self.answer = answer
        self._tell = tell
        self._block: ContentBlock | None = None
        self._call = -1
        self._arguments = ""
        self._last = Step()

    def opening(self) -> None:
        self._tell({"type": "message_start", "message": self.answer})

    def take(self, said: Step) -> None:
        """What the model said next."""
        if said.reasoning:
            block = self._open(ThinkingBlock)
            block.thinking += said.reasoning
            self._delta({"type": "thinking_delta", "thinking": said.reasoning})
        if said.text:
            block = self._open(TextBlock)
            block.text += said.text
            self._delta({"type": "text_delta", "text": said.text})
        for call in said.calls:
            self._take_call(call)
        if said.finish is not None:
            self._last = said

    def close(self, usage: Usage) -> None:
        """The end: why, and what it cost."""
        if not self.answer.content:
            self._open(TextBlock)  # an answer of nothing is still a text
        self._end()
        answer, last = self.answer, self._last
        answer.stop_reason = STOPS.get(last.finish or "", "end_turn")
        if last.finish == "stop" and isinstance(last.stop_reason, str):
            answer.stop_reason, answer.stop_sequence = "stop_sequence", last.stop_reason
        answer.usage = tokens(usage)
        ending = {"stop_reason": answer.stop_reason, "stop_sequence": answer.stop_sequence}
        self._tell({"type": "message_delta", "delta": ending, "usage": answer.usage})
        self._tell({"type": "message_stop"})

    # -- blocks -----------------------------------------------------------------------------------------------------

    def _open(self, kind: type[Any]) -> Any:
        return self._block if isinstance(self._block, kind) else self._begin(kind())

    def _take_call(self, piece: CallDelta) -> None:
        if not isinstance(self._block, ToolUseBlock) or piece.index != self._call:
            self._begin(ToolUseBlock(piece.id or f"toolu_{secrets.token_hex(12)}", piece.name, {}))
            self._call, self._arguments = piece.index, ""
        if piece.arguments:
            self._arguments += piece.arguments
            self._delta({"type": "input_json_delta", "partial_json": piece.arguments})

    def _begin(self, block: Any) -> Any:
        self._end()
        self._block = block
        self.answer.content.append(block)
        self._tell({"type": "content_block_start", "index": len(self.answer.content) - 1, "content_block": block})
        return block

    def _end(self) -> None:
        block = self._block
        if block is None:
            return
        if isinstance(block, ThinkingBlock):
            block.signature = hashlib.sha256(block.thinking.encode()).hexdigest()
            self._delta({"type": "signature_delta", "signature": block.signature})
        elif isinstance(block, ToolUseBlock):
            block.input = _object(self._arguments)
        self._tell({"type": "content_block_stop", "index": len(self.answer.content) - 1})
        self._block = None

    def _delta(self, delta: dict[str, Any]) -> None:
        self._tell({"type": "content_block_delta", "index": len(self.answer.content) - 1, "delta": delta})


def tokens(usage: Usage) -> MessagesUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached, timings=usage.timings)


def _object(text: str) -> dict[str, Any]:
    """A call's arguments; what is no object (it was cut short) is shown as text rather than lost."""
    try:
        found = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        found = None
    return found if isinstance(found, dict) else {"unfinished": text}
