"""Steps: what a chat's one answer says next, for the APIs that chat in shapes of their own.

Reasoning, tool calls and text are told apart once, in the shape of OpenAI's chunks; the other APIs read those.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from .answers import ChatLogprob, ChunkChoice, ToolCall
from .calls import Call
from .shape import ChatShape, by_choice


@dataclass(slots=True)
class CallDelta:
    """A piece of tool call number `index`; `id` and `name` come with its first piece."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Step:
    """One step of an answer. `finish` is OpenAI's reason and comes once, with the last."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)
    finish: str | None = None
    stop_reason: int | str | None = None


async def spoken(call: Call, shape: ChatShape, patience: float | None = None) -> AsyncIterator[Step | None]:
    """What the first choice of a call says, step by step; None after `patience` seconds of silence.

    Raises:
        HttpError: the engine gave it up.
    """
    async for batch in call.pieces(patience):
        if not batch:
            yield None
        for piece in by_choice(batch):
            if shape.worth(piece):
                for part in shape.parts(piece):
                    yield _step(shape.chunk(call, [part]).choices[0])


def _step(choice: ChunkChoice) -> Step:
    delta = choice.delta
    return Step(
        text=delta.content or "",
        reasoning=delta.reasoning_content or "",
        calls=[_call(call) for call in delta.tool_calls or ()],
        logprobs=choice.logprobs.content if choice.logprobs else [],
        finish=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


def _call(call: ToolCall) -> CallDelta:
    return CallDelta(call.index or 0, call.id or "", call.function.name or "", call.function.arguments)
