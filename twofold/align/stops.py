"""Stops: whether a stop string may just have been completed, for little more than a look at each id.

Bytes of a turn's last ids are compared with those of the stops; when one is there, `TextStream` reads the turn from
its beginning and has the last word. So the text of a turn is made once, and not token by token.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..data import TextStream, Tokenizer
from ..engine.sampling import SamplingParams


class Stops:
    """The stop strings of one rollout. In vocabularies that do not spell bytes, every id may complete one."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._stops = [stop.encode("utf-8", "surrogatepass") for stop in params.stop]
        self._keep = max(map(len, self._stops), default=1) - 1
        self._exact = tokenizer.spelling == "bytes" and not any("�" in stop for stop in params.stop)
        self._skip = tokenizer.special_ids if params.skip_special_tokens else frozenset[int]()
        self._spelled: dict[int, bytes] = {}

    def __bool__(self) -> bool:
        return bool(self._stops)

    def near(self, tail: bytes, ids: Iterable[int]) -> tuple[bytes, bool]:
        """The end of a turn's bytes, with new ids behind it, and whether a stop may be in it."""
        for token in ids:
            known = self._spelled.get(token)
            if known is None:
                hidden = token in self._skip or self._tokenizer.token(token) is None
                known = self._spelled[token] = b"" if hidden else self._tokenizer.stream_bytes(token) or b""
            tail += known
        near = not self._exact or any(stop in tail for stop in self._stops)
        return tail[max(0, len(tail) - self._keep) :], near

    def stream(self) -> TextStream:
        """A reader of a turn from its beginning."""
        params = self._params
        return TextStream(
            self._tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
