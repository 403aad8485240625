"""Choice: one sequence of a call as text: what it has said, and how it ended.

Stop strings live here, outside the engine, because only text has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data import TextStream, Tokenizer
from ..engine.request import Beam, Output, Request, State, TokenOut
from .errors import HttpError


@dataclass(slots=True)
class Piece:
    """What one choice has to say next. `offset` is where `text` starts in the choice's text."""

    index: int
    offset: int
    text: str = ""
    tokens: list[TokenOut] = field(default_factory=list)
    prompt: tuple[TokenOut, ...] | None = None
    finish: str | None = None
    stop_reason: int | str | None = None
    beam: Beam | None = None


class Choice:
    """One sequence: its request, the text so far, and how it ended. Without a tokenizer the text stays empty."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.index = index
        self.request = request
        self.tokens = 0
        self.cached = 0
        self.shown = 0
        self.logprob = 0.0
        self.finish: str | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._stream: TextStream | None = None
        if tokenizer is not None:
            self._stream = TextStream(
                tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )

    def take(self, output: Output) -> Piece:
        """What an Output adds; after the end, nothing.

        Raises:
            HttpError: the engine gave the sequence up.
        """
        piece = Piece(self.index, self.shown, prompt=output.prompt)
        self.cached = max(self.cached, output.cached_tokens)
        if output.finish in (State.ERROR, State.TIMEOUT, State.ABORT):
            raise _failure(output)
        ids = [token.id for token in output.tokens]
        piece.tokens = list(output.tokens)
        if output.finish is not None:
            piece.finish, piece.stop_reason = output.finish.value, output.stop_reason
        if self._stream is not None:
            # The token that ended a text is not part of it, unless asked for.
            silent = output.finish is State.STOP and not self.request.params.include_stop_str_in_output
            before = self._stream.tokens
            piece.text = self._stream.push(ids[:-1] if silent else ids)
            if self._stream.stopped is not None:
                del piece.tokens[self._stream.tokens - before :]
            elif output.finish is not None:
                piece.text += self._stream.finish()
            if self._stream.stopped is not None:
                piece.finish, piece.stop_reason = "stop", self._stream.stopped
        self.tokens += len(piece.tokens)
        self.logprob += sum(token.logprob or 0.0 for token in piece.tokens)
        self.shown += len(piece.text)
        self.finish = piece.finish
        return piece

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens, by which the best of several samples is found."""
        return self.logprob / max(self.tokens, 1)


def _failure(output: Output) -> HttpError:
    if output.finish is State.TIMEOUT:
        return HttpError(504, "the request's time is over: ask for less or allow more", code="timeout")
    if output.finish is State.ABORT:
        return HttpError(503, output.error or "the request was stopped", code="aborted", retry_after=2)
    return HttpError(500, output.error or "the engine gave the request up", code="engine_error")
