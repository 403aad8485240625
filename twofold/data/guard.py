"""Guard: what messages spell of special tokens, hidden while a template runs.

What a user writes may spell "<|im_end|>". The trick:

    1  hide    in every string of the messages, each spelled special token (and each end of one that stands at the
               edge of a string, where two strings could be joined into one) becomes a random number
    2  render  the template runs on that; whatever special token stands in its output, the template wrote
    3  reveal  the numbers become the user's text again, and their places are remembered as foreign
    4  encode  special tokens become special ids outside of foreign places, plain text inside

Some vocabularies do not call the marks of calls and thoughts special ("<tool_call>"). Those are hidden alike, but in
what the assistant and the system say: their words are read as the model wrote them, with the marks that they hold.

When nothing special stands in a foreign place, which is nearly always, step 4 is one call for the whole text, and the
ids are those of transformers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import Message
from .tokenizer import Tokenizer

TRUSTING = ("assistant", "model", "system", "developer")
TRUSTED = ("content", "reasoning_content", "reasoning", "thinking")
Span = tuple[int, int]
"""Characters from the first to the second, exclusive."""


class Guard:
    """Hides what spells special tokens in one call's messages, and reveals it in the rendered text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._key = random_digits()
        self._hidden: list[str] = []

    def hide_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with everything hidden but their roles, which are from a list and which templates compare."""
        return [self._hide_message(message) for message in messages]

    def _hide_message(self, message: Message) -> Message:
        trusted = TRUSTED if message.get("role") in TRUSTING else ()
        return {
            key: item if key == "role" else self.hide(item, trusted=key in trusted) for key, item in message.items()
        }

    def hide(self, value: Any, *, trusted: bool = False) -> Any:
        """A copy of plain data with every spelled special token replaced, in keys as well."""
        if isinstance(value, str):
            return self._hide_text(value, trusted)
        if isinstance(value, Mapping):
            return {self.hide(key, trusted=trusted): self.hide(item, trusted=trusted) for key, item in value.items()}
        return [self.hide(item, trusted=trusted) for item in value] if isinstance(value, list | tuple) else value

    def _hide_text(self, text: str, trusted: bool) -> str:
        tokenizer = self._tokenizer
        spelled = tokenizer.split_special(text) if trusted else tokenizer.split_control(text)
        starts, ends = tokenizer.special_edges if trusted else tokenizer.control_edges
        widest = max(map(len, starts), default=0)
        first, last = (spelled[0][0], spelled[-1][1]) if spelled else (len(text), 0)
        lead = next((n for n in range(min(first, widest), 0, -1) if text[:n] in ends), 0)
        room = min(len(text) - max(last, lead), widest)
        trail = next((n for n in range(room, 0, -1) if text[-n:] in starts), 0)
        pieces, place = [], 0
        for start, end in [(0, lead), *spelled, (len(text) - trail, len(text))]:
            if start < end:
                pieces += [text[place:start], self._replace(text[start:end])]
                place = end
        return "".join([*pieces, text[place:]])

    def _replace(self, spelled: str) -> str:
        self._hidden.append(spelled)
        return f"{self._key}{len(self._hidden) - 1:08d}"

    def _reveal(self, text: str, start: int) -> tuple[str, list[Span]]:
        if not self._hidden:
            return text, []
        pieces, foreign, last = [], [], 0
        for match in re.finditer(self._key + r"(\d{8})", text):
            pieces.append(text[last : match.start()])
            start += match.start() - last
            hidden = self._hidden[int(match[1])]
            foreign.append((start, start + len(hidden)))
            pieces.append(hidden)
            start, last = start + len(hidden), match.end()
        return "".join([*pieces, text[last:]]), foreign

    def encode(self, texts: Sequence[str]) -> tuple[list[int], list[Span]]:
        """Ids of the texts joined, and the characters of each."""
        ids, spans, _ = self.encode_pieces(texts)
        return ids, spans

    def encode_pieces(self, texts: Sequence[str]) -> tuple[list[int], list[Span], list[Span]]:
        """Ids of the texts joined, the characters of each id, and the characters of each text."""
        whole, foreign, borders = "", list[Span](), list[Span]()
        for text in texts:
            start = len(whole)
            clear, found = self._reveal(text, start)
            whole += clear
            foreign += found
            borders.append((start, len(whole)))
        ids, spans = _encode_around(self._tokenizer, whole, foreign)
        return ids, spans, borders


def _encode_around(tokenizer: Tokenizer, text: str, foreign: list[Span]) -> tuple[list[int], list[Span]]:
    spelled = tokenizer.split_control(text)
    if not any(a < right and left < b for a, b in spelled for left, right in foreign):
        return tokenizer.encode_spans(text, special=True)
    gaps = zip([0, *(end for _, end in foreign)], [*(start for start, _ in foreign), len(text)])
    own = [(left + a, left + b) for left, right in gaps for a, b in tokenizer.split_control(text[left:right])]
    ids: list[int] = []
    spans: list[Span] = []
    for start, end in [*own, (len(text), len(text))]:
        last = spans[-1][1] if spans else 0
        found, places = tokenizer.encode_foreign(text[last:start])
        ids += found
        spans += [(last + a, last + b) for a, b in places]
        if start < end:
            ids.append(tokenizer.control_tokens[text[start:end]])
            spans.append((start, end))
    return ids, spans


def random_digits() -> str:
    """Twenty random digits: no template trims them, changes their case or escapes them, and no user can guess them."""
    return f"{secrets.randbelow(9 * 10**19) + 10**19}"
