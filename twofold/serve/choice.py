"""Choice: one sequence of a call as text: what it has said, and how it ended.

Stop strings live here, outside the engine, because only text has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..data import TextStream, Tokenizer
from ..data.speech import Event, Thought
from ..engine.request import Beam, Output, Request, State, TokenOut
from .errors import HttpError
from .fate import Fate
from .hearing import Hearing


@dataclass(slots=True)
class Piece:
    """What one choice has to say next. `offset` is where `text` starts in the choice's text.

    `said` is that text told apart, None where nobody listens.
    """

    index: int
    offset: int
    text: str = ""
    tokens: list[TokenOut] = field(default_factory=list)
    prompt: tuple[TokenOut, ...] | None = None
    finish: str | None = None
    stop_reason: int | str | None = None
    form_error: str | None = None
    said: list[Event] | None = None
    beam: Beam | None = None


class _Wordless:
    """The text of ids that nobody can read."""

    stopped: str | None = None
    tokens = 0

    def push(self, ids: Iterable[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""

    def places(self, upto: int) -> list[tuple[int, str]]:
        return []


class Choice:
    """One sequence: its request, the text so far, and how it ended. `checked` is the text, when it is to be looked at
    in the end. Without a tokenizer the text stays empty.
    """

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer | None, hearing: Hearing | None = None
    ) -> None:
        params, form = request.params, request.params.structured_outputs
        self.index = index
        self.request = request
        self.tokens = 0
        self.cached = 0
        self.shown = 0
        self.logprob = 0.0
        self.checked: list[str] | None = [] if form is not None and form.checked_after else None
        self.thoughts = 0
        self.finish: str | None = None
        self.fate = Fate()
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._stream: TextStream | _Wordless = _Wordless()
        if tokenizer is not None:
            self._stream = TextStream(
                tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                marks=hearing.marks if hearing else None,
            )
        self._listener = hearing.listener() if hearing else None
        self._silent = hearing is not None and hearing.silent

    def take(self, output: Output) -> Piece:
        """What an Output adds; after the end, nothing.

        Raises:
            HttpError: the engine gave the sequence up.
        """
        piece = Piece(self.index, self.shown, prompt=output.prompt)
        self.cached = max(self.cached, output.cached_tokens)
        if output.finish in (State.ERROR, State.TIMEOUT, State.ABORT):
            raise failure(output)
        ids = [token.id for token in output.tokens]
        # The token that ended a text is not part of it, unless asked for.
        silent = output.finish is State.STOP and not self.request.params.include_stop_str_in_output
        said = ids[:-1] if silent else ids
        before = self._stream.tokens
        for token in [said] if self._listener is None else [[token] for token in said]:
            self._show(piece, self._stream.push(token))
            if self._stream.stopped is not None or self._enough:
                break
        if self._stream.stopped is not None or self._enough:
            piece.tokens = list(output.tokens[: self._stream.tokens - before])
            piece.finish, piece.stop_reason = "stop", self._stream.stopped
        else:
            piece.tokens = list(output.tokens)
            if output.finish is not None:
                self._show(piece, self._stream.finish(), counts=False)
                piece.finish = "stop" if self._stream.stopped is not None else output.finish.value
                piece.stop_reason = self._stream.stopped or output.stop_reason
        self.tokens += len(piece.tokens)
        self.logprob += sum(token.logprob or 0.0 for token in piece.tokens)
        if self.checked is not None:
            self.checked.append(piece.text)
        self.finish = piece.finish
        if piece.finish is not None:
            self._conclude(piece)
        return piece

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens, by which the best of several samples is found."""
        return self.logprob / max(self.tokens, 1)

    @property
    def _enough(self) -> bool:
        """Whether a call began that was not asked for any more."""
        return self._listener is not None and self._listener.full

    def _show(self, piece: Piece, text: str, *, counts: bool = True) -> None:
        """More text of a piece, of one token where somebody listens."""
        start, self.shown = self.shown, self.shown + len(text)
        piece.text += text
        if self._listener is not None:
            self.thoughts += counts and self._listener.thinking
            marks = [(place - start, mark) for place, mark in self._stream.places(self.shown)]
            self._hear(piece, self._listener.push(text, marks))

    def _hear(self, piece: Piece, events: list[Event]) -> None:
        kept = [event for event in events if not (self._silent and isinstance(event, Thought))]
        piece.said = (piece.said or []) + kept

    def _conclude(self, piece: Piece) -> None:
        if self._listener is not None:
            self._hear(piece, self._listener.finish())
            if piece.finish == "stop" and self._listener.complete:
                piece.finish = "tool_calls"


def failure(output: Output) -> HttpError:
    """What a client is told of a sequence that came to no good end."""
    if output.finish is State.TIMEOUT:
        return HttpError(504, "the request's time is over: ask for less or allow more", code="timeout")
    if output.finish is State.ABORT:
        return HttpError(503, output.error or "the request was stopped", code="aborted", retry_after=2)
    if output.param is not None:
        return HttpError(400, output.error or "the request cannot be followed", param=output.param)
    return HttpError(500, output.error or "the engine gave the request up", code="engine_error")
