"""What a tool says, as the ids that go behind a model's turn: never the model's own words encoded again.

    ... <|start|>assistant ⏎ the model's ids <|end|>    as they were sampled
                                             <|end|> ⏎ <|start|>tool ⏎ 42 <|end|> ⏎ <|start|>assistant ⏎
                                                     └──────────────────────────────────────────────────┘ the reply

A text behind a plain prompt is encoded as it stands. In a chat it is a message: the template is rendered around an
answer that nobody gave, and what follows that answer's end of turn is taken (verl's delta tokenization).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..core import RequestError
from ..data import ChatTemplate, Tokenizer
from .episode import Prompt

Message = Mapping[str, Any]
Reply = str | Sequence[int] | Message | None
Turn = Callable[[Prompt, list[dict[str, Any]]], Reply]
"""(prompt, messages behind it so far, the last being the model's) to what a tool says, or None: nothing, it is done.

A text is what the tool "tool" said, a message is rendered with its own role, ids go as they are. Called from several
threads at once, since generation goes on meanwhile.
"""

ANSWER = "31415926535897932384"


class Words(Protocol):
    """A model's tokenizer, and its chat template where it has one."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template(self) -> ChatTemplate | None: ...


def in_chat(turn: Turn) -> Turn:
    """A tool whose texts are messages, for prompts that are chats although the data show them as texts."""

    def spoken(prompt: Prompt, messages: list[dict[str, Any]]) -> Reply:
        reply = turn(prompt, messages)
        return {"role": "tool", "content": reply} if isinstance(reply, str) else reply

    return spoken


def reply_ids(words: Words, prompt: Prompt, last: int, reply: str | Sequence[int] | Message) -> tuple[int, ...]:
    """The ids of a reply behind a turn of the model that ended with the id `last`. No special id comes from its text.

    Raises:
        RequestError: a message without a template, or a template that does not show where an answer ends.
    """
    if not isinstance(reply, str | Mapping):
        return tuple(reply)
    if isinstance(reply, str) and (words.template is None or isinstance(prompt.shown, str)):
        return tuple(words.tokenizer.encode(reply))
    if words.template is None:
        raise RequestError("a message needs a chat template, and this model has none: return a text or ids", "turn")
    message: Message = {"role": "tool", "content": reply} if isinstance(reply, str) else reply
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}, message]
    before, found, _ = words.template.render(talk, add_generation_prompt=True).partition(ANSWER)
    ids = words.template.encode(words.tokenizer, talk, add_generation_prompt=True)
    special = [place for place, token in enumerate(ids) if token in words.tokenizer.special_ids]
    earlier = len(words.tokenizer.split_special(before))
    if not found or len(special) <= earlier:
        raise RequestError(
            "this chat template shows no end of an answer, so where a reply begins is unknown: return ids", "turn"
        )
    end = special[earlier]
    return tuple(ids[end + (ids[end] == last) :])
