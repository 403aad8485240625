"""TextStream: ids to text as they arrive; never half a character, never half a stop string.

    ids ──► characters ──► held back ──► shown
            a character    the longest end of the text
            may be 4 ids   that may still become a stop

The pieces joined are the text of the whole, whatever the ids were cut into.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from typing import Protocol

from .tokenizer import Tokenizer


class _Characters(Protocol):
    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class _FromBytes:
    """Byte-level vocabularies: each id is some bytes, and a UTF-8 decoder keeps the unfinished ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.stream_bytes(token) or b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _FromWindow:
    """Any other vocabulary: decode a short window of ids twice, with and without the new ones.

    The window starts with ids already shown, so that what a decoder does only at the start of a text (dropping the
    first space) happens in both. Ids stay out of the shown text while it may still change: at a run of raw bytes, and
    at an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        self._new.append(token)
        if self._tokenizer.is_open(token):
            return ""
        whole = self._decode(self._shown + self._new)
        return "" if whole.endswith("�") else self._take(whole)

    def finish(self) -> str:
        return self._take(self._decode(self._shown + self._new)) if self._new else ""

    def _take(self, whole: str) -> str:
        before = self._decode(self._shown)
        self._shown = self._new if self._decode(self._new) else self._shown + self._new
        self._new = []
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class TextStream:
    """The text of one answer while its ids arrive.

    `stop` strings end it: of all matches the one that completes first wins, and of those that complete together the
    longest; the text is cut before it, or after it with `include_stop`. The first `min_tokens` ids are shown as they
    are, whatever stop they spell. The tokens `marks` stay in the text, and `places` tells them from text that spells
    the same. `stopped` is the string that ended the text, `text` all that was shown, `tokens` how
    many ids it took, the one that completed a stop included. After a stop nothing more is shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Iterable[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._min_tokens = min_tokens
        self._marks = marks or {}
        self._places: list[tuple[int, str]] = []
        self._size = 0
        self._characters: _Characters = (
            _FromBytes(tokenizer) if tokenizer.spelling == "bytes" else _FromWindow(tokenizer)
        )
        self._skip = tokenizer.special_ids - self._marks.keys() if skip_special_tokens else frozenset[int]()
        self._stops = tuple(dict.fromkeys(text for text in stop if text))
        self._include = include_stop
        self._held = ""
        self._pieces: list[str] = []
        self.stopped: str | None = None
        self.tokens = 0

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._pieces)

    def push(self, ids: Iterable[int]) -> str:
        """Take new ids and return the text that can now be shown; "" while it may still change or stop."""
        shown = []
        for token in ids:
            if self.stopped is not None:
                break
            self.tokens += 1
            if token not in self._skip and self._tokenizer.token(token) is not None:
                new = self._characters.push(token)
                if token in self._marks and (place := new.rfind(self._marks[token])) >= 0:
                    self._places.append((self._size + place, self._marks[token]))
                self._size += len(new)
                shown.append(self._show(new))
        return "".join(shown)

    def places(self, end: int) -> list[tuple[int, str]]:
        """Marks that begin in front of character `end` of the text, each told once, with their places."""
        count = sum(place < end for place, _ in self._places)
        found, self._places = self._places[:count], self._places[count:]
        return found

    def finish(self) -> str:
        """No more ids: what was held back; an unfinished character reads as U+FFFD, as it does in the whole text."""
        if self.stopped is not None:
            return ""
        text = self._show(self._characters.finish())
        if self.stopped is None:
            self._pieces.append(self._held)
            text, self._held = text + self._held, ""
        return text

    def _show(self, new: str) -> str:
        if not new:
            return ""
        text = self._held + new
        if self.tokens <= self._min_tokens:
            self._pieces.append(text)
            return text
        match = self._first_stop(text)
        if match is not None:
            start, self.stopped = match
            end, self._held = start + (len(self.stopped) if self._include else 0), ""
        else:
            end = len(text) - self._may_stop(text)
            self._held = text[end:]
        self._pieces.append(text[:end])
        return text[:end]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _may_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
