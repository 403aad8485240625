"""Builder: what a model says, step by step, as output items and the events that tell of them.

    created, in_progress
      output_item.added ─▶ content_part.added ─▶ reasoning_text.delta ... .done ─▶ content_part.done ─▶ output_item.done
      output_item.added ─▶ content_part.added ─▶ output_text.delta ... .done    ─▶ content_part.done ─▶ output_item.done
      output_item.added ─▶ function_call_arguments.delta ... .done              ─▶ output_item.done
    completed | incomplete | failed

Whole answers come from the same steps with the events left unheard, so both ways say the same.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from ..answers import Usage
from ..errors import HttpError
from ..said import CallDelta, Step
from .shapes import (
    FunctionCall,
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    Reasoning,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
)

Event = dict[str, Any]


class Builder:
    """Grows `response`; each event goes to `tell` at once, since what it refers to goes on changing."""

    def __init__(self, response: Response, tell: Callable[[Event], None]) -> None:
        self.response = response
        self._tell = tell
        self._count = 0
        self._item: OutputItem | None = None
        self._call = -1
        self._finish = ""

    def opening(self) -> None:
        self.response.status = "in_progress"
        self._event("response.created", response=self.response)
        self._event("response.in_progress", response=self.response)

    def take(self, said: Step) -> None:
        """What the model said next."""
        if said.reasoning:
            item = self._reasoning()
            item.content[0].text += said.reasoning
            self._event("response.reasoning_text.delta", **self._at(), delta=said.reasoning)
        if said.text or (said.logprobs and not said.reasoning):
            message = self._message()
            message.content[0].text += said.text
            message.content[0].logprobs.extend(said.logprobs)
            self._event("response.output_text.delta", **self._at(), delta=said.text, logprobs=said.logprobs)
        for call in said.calls:
            self._take_call(call)
        self._finish = said.finish or self._finish

    def close(self, usage: Usage) -> None:
        """The end of everything: completed, or incomplete when the tokens ran out."""
        cut = self._finish == "length"
        if not self.response.output:
            self._message()  # an answer of nothing is still a message
        self._end_item("incomplete" if cut else "completed")
        response, details = self.response, usage.completion_tokens_details
        response.usage = ResponseUsage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            InputDetails(usage.prompt_tokens_details.cached_tokens),
            OutputDetails(details.reasoning_tokens if details else 0),
            usage.timings,
        )
        response.status = "incomplete" if cut else "completed"
        response.incomplete_details = Incomplete("max_output_tokens") if cut else None
        response.completed_at = None if cut else int(time.time())
        self._event(f"response.{response.status}", response=response)

    def fail(self, error: HttpError) -> None:
        self._end_item("incomplete")
        self.response.status = "failed"
        self.response.error = ResponseError("server_error", str(error))
        self._event("response.failed", response=self.response)

    def cancel(self) -> None:
        """Stopped from outside; OpenAI has no event for it, so the last one shows the state."""
        self._end_item("incomplete")
        self.response.status = "cancelled"
        self._event("response.incomplete", response=self.response)

    # -- items ------------------------------------------------------------------------------------------------------

    def _message(self) -> OutputMessage:
        if isinstance(self._item, OutputMessage):
            return self._item
        item, part = OutputMessage(f"msg_{secrets.token_hex(12)}"), OutputText(annotations=[], logprobs=[])
        self._begin_part(item, part)
        item.content = [part]
        return item

    def _reasoning(self) -> Reasoning:
        if isinstance(self._item, Reasoning):
            return self._item
        item, part = Reasoning(f"rs_{secrets.token_hex(12)}"), ReasoningText()
        self._begin_part(item, part)
        item.content = [part]
        return item

    def _begin_part(self, item: OutputMessage | Reasoning, part: OutputText | ReasoningText) -> None:
        """Begin `item` with its one part of content."""
        self._begin_item(item)
        self._event("response.content_part.added", **self._at(), part=part)

    def _take_call(self, piece: CallDelta) -> None:
        if not isinstance(self._item, FunctionCall) or piece.index != self._call:
            self._call = piece.index
            name = f"fc_{secrets.token_hex(12)}"
            self._begin_item(FunctionCall(name, piece.id or f"call_{secrets.token_hex(12)}", piece.name))
        elif piece.name:
            self._item.name += piece.name
        if piece.arguments and isinstance(self._item, FunctionCall):
            self._item.arguments += piece.arguments
            self._event("response.function_call_arguments.delta", **self._at(False), delta=piece.arguments)

    def _begin_item(self, item: OutputItem) -> None:
        self._end_item("completed")
        self._item = item
        self.response.output.append(item)
        place = len(self.response.output) - 1
        self._event("response.output_item.added", output_index=place, item=item)

    def _end_item(self, status: str) -> None:
        item, at = self._item, self._at
        if item is None:
            return
        item.status = status
        if isinstance(item, OutputMessage):
            part = item.content[0]
            self._event("response.output_text.done", **at(), text=part.text, logprobs=part.logprobs)
            self._event("response.content_part.done", **at(), part=part)
        elif isinstance(item, Reasoning):
            self._event("response.reasoning_text.done", **at(), text=item.content[0].text)
            self._event("response.content_part.done", **at(), part=item.content[0])
        else:
            self._event("response.function_call_arguments.done", **at(False), name=item.name, arguments=item.arguments)
        self._event("response.output_item.done", output_index=len(self.response.output) - 1, item=item)
        self._item = None

    def _at(self, content: bool = True) -> dict[str, Any]:
        assert self._item is not None
        place: dict[str, Any] = {"item_id": self._item.id, "output_index": len(self.response.output) - 1}
        return place | {"content_index": 0} if content else place

    def _event(self, kind: str, **fields: Any) -> None:
        self._tell({"type": kind, "sequence_number": self._count, **fields})
        self._count += 1
