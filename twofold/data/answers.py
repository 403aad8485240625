"""What of a chat is learned: the assistant's words and its end of turn, whether the chat is whole or goes on a prompt.

    <|user|>\n hello <|end|>\n <|assistant|>\n   hi there <|end|>   \n <|user|>\n ...
    └──────────────── asked ────────────────┘   └── learned ──┘    └── asked ──

A template's own `{% generation %}` blocks say what that is, to the character, as transformers has it; else it is what
the chat up to an answer adds to the chat up to its question with the generation prompt, up to the last special token
of it. When a template rewrites earlier turns, and so the one is not the beginning of the other, only the last answer is
learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core import RequestError
from .guard import Guard, Span
from .rows import Message
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat import ChatTemplate

ASSISTANT = ("assistant", "model")
"""Roles whose messages the model itself writes."""


def whole_chat(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], given: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """Ids of a whole chat, tokenised at once as transformers does it, and for each whether it is learned.

    Raises:
        RequestError: no message is the assistant's, or the template hides where its last one starts.
    """
    _check(messages, "a chat to learn from")
    guard = Guard(tokenizer)
    hidden, given = guard.hide_messages(messages), {name: guard.hide(value) for name, value in given.items()}
    pieces, exact = _pieces(template, hidden, given)
    return _masked(tokenizer, guard, pieces, exact)


def after_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    question: Sequence[Message],
    completion: Sequence[Message],
    given: Mapping[str, Any],
) -> tuple[list[int], list[int], list[bool]]:
    """Ids of the prompt that a rollout would begin with, ids of what follows, and which of those are learned.

    No token reaches over the border, and the last one is learned: an answer ends where a rollout does, without the
    white space that a template puts behind the end of a turn. Where a template's own blocks say what is learned and it
    writes the prompt otherwise once it is answered (without the thought that it opened), the prompt ends where the two
    part, as in TRL.

    Raises:
        RequestError: nothing of the completion is the assistant's, or the template hides where it starts.
    """
    _check(completion, "a completion")
    guard = Guard(tokenizer)
    hidden = guard.hide_messages([*question, *completion])
    given = {name: guard.hide(value) for name, value in given.items()}
    pieces, exact = _pieces(template, hidden, given, len(question))
    opened = completion[0].get("role") in ASSISTANT
    prompt = template.render(hidden[: len(question)], add_generation_prompt=opened, **given)
    before = guard.encode([prompt])[0]
    ids, mask = _masked(tokenizer, guard, pieces, exact)
    same = next((place for place, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))
    if not "".join(pieces).startswith(prompt):
        if not exact:
            raise _unknown()
        before = before[:same]
    if same < len(before):  # read at once, a token would reach over the border
        ids, mask = _masked(tokenizer, guard, _behind(pieces, len(prompt)), exact)
        same = 0
    return before, *_ended(tokenizer, ids[same:], mask[same:])


def _ended(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """A completion up to the last id that is learned, less white space behind the end of the turn."""
    if True not in mask:
        raise RequestError("this chat template shows nothing of the answer, so there is nothing to learn", "messages")
    end = last = len(mask) - mask[::-1].index(True)
    while end and ids[end - 1] not in tokenizer.special_ids and not tokenizer.decode([ids[end - 1]]).strip():
        end -= 1
    if not end or ids[end - 1] not in tokenizer.special_ids:
        end = last
    return ids[:end], mask[:end]


def _check(messages: Sequence[Message], what: str) -> None:
    if not any(message.get("role") in ASSISTANT for message in messages):
        raise RequestError(f"{what} needs a message with role 'assistant'", "messages")


def _unknown() -> RequestError:
    return RequestError(
        "this chat template's generation prompt is not how its answers begin, so what to learn is unknown: "
        "put {% generation %} ... {% endgeneration %} around the answer in the template",
        "messages",
    )


def _pieces(
    template: ChatTemplate, messages: list[Message], given: Mapping[str, Any], asked: int = 0
) -> tuple[list[str], bool]:
    """The chat's text in pieces, every second one learned; and whether the template's own blocks say so."""
    pieces = template.marked(messages, given)
    if len(pieces) > 1:
        return pieces, True
    return _between_prompts(template, pieces[0], messages, given, asked), False


def _between_prompts(
    template: ChatTemplate, whole: str, messages: list[Message], given: Mapping[str, Any], asked: int
) -> list[str]:
    """As `_pieces`, from what each answer behind the first `asked` messages adds to its question."""
    places = [place for place, message in enumerate(messages) if place >= asked and message["role"] in ASSISTANT]
    cuts: list[int] = []
    for place in places:
        question = template.render(messages[:place], add_generation_prompt=True, **given)
        last = place + 1 == len(messages)
        answer = whole if last else template.render(messages[: place + 1], add_generation_prompt=False, **given)
        if answer.startswith(question) and whole.startswith(answer):
            cuts += [len(question), len(answer)]
        elif place != places[-1]:
            cuts = []
        else:
            raise _unknown()
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)])]


def _behind(pieces: Sequence[str], border: int) -> list[str]:
    """The pieces without their first `border` characters, as many of them as before."""
    kept = []
    for piece in pieces:
        kept.append(piece[border:])
        border = max(0, border - len(piece))
    return kept


def _masked(tokenizer: Tokenizer, guard: Guard, pieces: Sequence[str], exact: bool) -> tuple[list[int], list[bool]]:
    """Ids of the pieces joined, and which are learned: of exact borders, every token with a character inside them."""
    ids, spans, borders = guard.encode_pieces(pieces)
    if exact:
        inside = [border for border in borders[1::2] if border[0] < border[1]]
        return ids, [any(start < last and first < end for first, last in inside) for start, end in spans]
    learned = [_to_end_of_turn(tokenizer, ids, spans, border) for border in borders[1::2]]
    return ids, [any(first <= start and end <= last for first, last in learned) for start, end in spans]


def _to_end_of_turn(tokenizer: Tokenizer, ids: list[int], spans: list[Span], border: Span) -> Span:
    """An answer's characters up to its last special token: what stands after it (a newline) is the template's."""
    start, end = border
    inside = [
        right
        for token, (left, right) in zip(ids, spans)
        if start <= left < right <= end and token in tokenizer.special_ids
    ]
    return (start, max(inside)) if inside else border
