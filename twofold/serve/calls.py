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

from ..core import CapacityError, RequestError
from ..data import Tokenizer
from ..engine.limits import Limits
from ..engine.request import Output, Request
from ..engine.sampling import SamplingParams
from ..engine.vectors import NO_TEXT
from .answers import CompletionTokensDetails, PromptTokensDetails, Usage
from .choice import Choice, Piece
from .client import EngineClient
from .errors import HttpError
from .hearing import Hearing
from .judge import Judge
from .metrics import Metrics

_numbers = itertools.count()


class Call:
    """All sequences of one API call. Use as an async context: leaving it, however, frees everything in the engine."""

    def __init__(
        self,
        client: EngineClient,
        metrics: Metrics,
        tokenizer: Tokenizer,
        hearing: Hearing | None = None,
        judge: Judge | None = None,
    ) -> None:
        if client.info is not None and not client.info.abilities.generates:
            raise HttpError(400, NO_TEXT, code="no_text")
        self.client = client
        self.judge = judge
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.hearing = hearing
        self.choices: list[Choice] = []
        self.prompts: list[list[int]] = []
        self.arrived = time.monotonic()
        self.submitted = False
        self.failed = False
        self._by_id: dict[str, Choice] = {}
        self._queue: deque[Output] = deque()
        self._news = asyncio.Event()

    def add(
        self,
        ids: list[int],
        params: SamplingParams,
        limits: Limits,
        *,
        priority: int,
        deadline: float,
        salt: str,
        adapter: str = "",
    ) -> None:
        """Plan `params.n` sequences that continue `ids`; `adapter` is an adapter's key.

        Raises:
            RequestError, HttpError: the prompt, the answer or a token id does not fit the model or its cache.
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
                adapter=adapter,
                seed=seed,
            )
            seed = request.seed  # samples of one prompt share it and differ in their number
            if sample == 0:
                _fits(limits, request)
            choice = Choice(len(self.choices), request, self.tokenizer, self.hearing)
            self.choices.append(choice)
            self._by_id[request.id] = choice

    def submit(self) -> None:
        """Hand all sequences to the engine, or none; the errors of `EngineClient.check`."""
        self.client.submit([choice.request for choice in self.choices], self._sink)
        self.submitted = True
        self.metrics.accepted(self.choices)

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.submitted:
            self.client.abort([choice.request.id for choice in self.choices if choice.finish is None])
            self.metrics.ended(self.choices, self.failed)

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
            for piece in batch:
                await self._check(piece)
            if batch:
                yield batch

    async def _check(self, piece: Piece) -> None:
        """Hold a finished text against the schema that no grammar could hold whole."""
        choice = self.choices[piece.index]
        form = choice.request.params.structured_outputs
        if piece.finish == "stop" and choice.checked is not None and form is not None and self.judge is not None:
            piece.form_error = await self.judge.validate(form, "".join(choice.checked))

    def _take(self, output: Output) -> Piece | None:
        choice = self._by_id[output.request_id]
        if choice.finish is not None:
            return None
        if output.tokens:
            self.metrics.tokens(choice, len(output.tokens), self.arrived)
        try:
            piece = choice.take(output)
        except HttpError:
            self.failed = True
            raise
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
        usage = Usage(prompt, said, prompt + said, PromptTokensDetails(cached))
        if self.hearing is not None and self.hearing.manner.thoughts is not None:
            usage.completion_tokens_details = CompletionTokensDetails(sum(choice.thoughts for choice in self.choices))
        return usage


def _fits(limits: Limits, request: Request) -> None:
    try:
        limits.room(request)
    except CapacityError as error:  # no queue helps: it never fits
        raise HttpError(400, str(error), param="max_tokens", code="context_length_exceeded") from None
    except RequestError:
        if len(request.prompt_ids) < limits.max_model_len:
            raise
        raise HttpError(
            400,
            f"the prompt has {len(request.prompt_ids)} tokens and the context is {limits.max_model_len}, which must "
            f"hold an answer too: send at most {limits.max_model_len - 1} tokens",
            param="prompt",
            code="context_length_exceeded",
        ) from None
