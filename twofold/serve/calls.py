"""Call: one API call as the sequences it is made of, and what each has said, as text.

    engine ──Output──▶ Call.sink ──▶ Choice.take ──▶ Piece ──▶ whole answer | stream
                        (queue)       text, stops,
                                      log-probabilities

Stop strings live here, in text: when one appears the engine is told to forget the sequence.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from ..core import RequestError
from ..data import TextStream, Tokenizer
from ..engine.limits import Limits
from ..engine.request import Output, Request, State, TokenOut
from ..engine.sampling import SamplingParams
from .answers import Usage, PromptTokensDetails
from .client import EngineClient
from .errors import HttpError
from .metrics import Metrics

_numbers = itertools.count()


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


class Choice:
    """One sequence: its request, the text so far, and how it ended."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        self.index = index
        self.request = request
        self.tokens = 0
        self.cached = 0
        self.shown = 0
        self.finish: str | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
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
        # The token that ended a text is not part of it, unless asked for.
        silent = output.finish is State.STOP and not self.request.params.include_stop_str_in_output
        said = ids[:-1] if silent else ids
        before = self._stream.tokens
        piece.text = self._stream.push(said)
        if self._stream.stopped is not None:
            piece.tokens = list(output.tokens[: self._stream.tokens - before])
            piece.finish, piece.stop_reason = "stop", self._stream.stopped
        else:
            piece.tokens = list(output.tokens)
            if output.finish is not None:
                piece.text += self._stream.finish()
                piece.finish = "stop" if self._stream.stopped is not None else output.finish.value
                piece.stop_reason = self._stream.stopped or output.stop_reason
        self.tokens += len(piece.tokens)
        self.shown += len(piece.text)
        self.finish = piece.finish
        return piece


def _failure(output: Output) -> HttpError:
    if output.finish is State.TIMEOUT:
        return HttpError(504, "the request's time is over: ask for less or allow more", code="timeout")
    if output.finish is State.ABORT:
        return HttpError(503, output.error or "the request was stopped", code="aborted", retry_after=2)
    return HttpError(500, output.error or "the engine gave the request up", code="engine_error")


class Call:
    """All sequences of one API call. Use as an async context: leaving it, however, frees everything in the engine."""

    def __init__(self, client: EngineClient, metrics: Metrics, tokenizer: Tokenizer) -> None:
        self.client = client
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.choices: list[Choice] = []
        self.prompts: list[list[int]] = []
        self.arrived = time.monotonic()
        self._by_id: dict[str, Choice] = {}
        self._queue: deque[Output] = deque()
        self._news = asyncio.Event()

    def add(
        self, ids: list[int], params: SamplingParams, limits: Limits, *, priority: int, deadline: float, salt: str
    ) -> None:
        """Plan `params.n` sequences that continue `ids`.

        Raises:
            RequestError: the prompt and the answer do not fit the model.
            CapacityError: nor the cache.
        """
        self.prompts.append(ids)
        seed = -1
        for sample in range(params.n):
            request = Request(
                id=f"{next(_numbers):x}",
                prompt_ids=tuple(ids),
                params=params,
                sample=sample,
                priority=priority,
                deadline=deadline,
                salt=salt,
                seed=seed,
            )
            seed = request.seed  # samples of one prompt share it and differ in their number
            if sample == 0:
                _fits(limits, request)
            choice = Choice(len(self.choices), request, self.tokenizer)
            self.choices.append(choice)
            self._by_id[request.id] = choice

    def submit(self) -> None:
        """Hand all sequences to the engine, or none; the errors of `EngineClient.check`."""
        self.client.submit([choice.request for choice in self.choices], self._sink)

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.client.abort([c.request.id for c in self.choices if c.finish is None])
        self.metrics.ended(self)

    def _sink(self, output: Output) -> None:
        self._queue.append(output)
        self._news.set()

    async def pieces(self, patience: float | None = None) -> AsyncIterator[list[Piece]]:
        """Everything said since the last time, in batches; an empty one after `patience` seconds of silence.

        Raises:
            HttpError: a sequence failed.
        """
        while any(choice.finish is None for choice in self.choices):
            try:
                async with asyncio.timeout(patience):
                    await self._news.wait()
            except TimeoutError:
                yield []
                continue
            self._news.clear()
            batch = []
            while self._queue:
                piece = self._take(self._queue.popleft())
                if piece is not None:
                    batch.append(piece)
            if batch:
                yield batch

    def _take(self, output: Output) -> Piece | None:
        choice = self._by_id[output.request_id]
        if choice.finish is not None:
            return None
        if output.tokens:
            self.metrics.tokens(choice, len(output.tokens))
        piece = choice.take(output)
        if piece.finish is not None:
            if output.finish is None:  # a stop string: the engine does not know yet
                self.client.abort([choice.request.id])
            self.metrics.finished(choice, self.arrived)
        return piece

    @property
    def usage(self) -> Usage:
        prompt = sum(map(len, self.prompts))
        said = sum(choice.tokens for choice in self.choices)
        cached = max((choice.cached for choice in self.choices), default=0)
        return Usage(prompt, said, prompt + said, PromptTokensDetails(cached))


def _fits(limits: Limits, request: Request) -> None:
    try:
        limits.room(request)
    except RequestError as error:
        if error.param == "prompt" and "context" in str(error):
            raise HttpError(400, str(error), param="prompt", code="context_length_exceeded") from None
        raise
