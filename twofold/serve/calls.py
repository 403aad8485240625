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
from .ledger import Ledger
from .metrics import Metrics
from .record import Record

_numbers = itertools.count()


class Call:
    """All sequences of one API call. Use as an async context: leaving it, however, frees everything in the engine."""

    def __init__(
        self,
        client: EngineClient,
        metrics: Metrics,
        tokenizer: Tokenizer | None,
        hearing: Hearing | None = None,
        judge: Judge | None = None,
        *,
        record: Record | None = None,
        ledger: Ledger | None = None,
        timed: bool = False,
    ) -> None:
        if client.info is not None and not client.info.abilities.generates:
            raise HttpError(400, NO_TEXT, code="no_text")
        self.client = client
        self.judge = judge
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.hearing = hearing
        self.record = record
        self.ledger = ledger
        self.timed = timed
        self.choices: list[Choice] = []
        self.prompts: list[list[int]] = []
        self.arrived = time.monotonic()
        self.submitted = False
        self.failed = False
        self._by_id: dict[str, list[Choice]] = {}
        self._all: list[Choice] = []
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
        """Plan `params.n` sequences that continue `ids`, or more to choose the best of. Beams are one request.

        `adapter` is an adapter's key.

        Raises:
            RequestError, HttpError: the prompt, the answer or a token id does not fit the model or its cache.
        """
        self.prompts.append(ids)
        seed = -1
        if params.width > params.n and not params.use_beam_search and params.logprobs is None:
            params = params.with_(logprobs=0)
        for sample in range(1 if params.use_beam_search else params.width):
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
            made = self._by_id[request.id] = []
            for _ in range(params.n if params.use_beam_search else 1):
                made.append(Choice(len(self.choices), request, self.tokenizer, self.hearing))
                self.choices.append(made[-1])
                self._all.append(made[-1])

    def submit(self) -> None:
        """Hand all sequences to the engine, or none; the errors of `EngineClient.check`."""
        self.client.submit([made[0].request for made in self._by_id.values()], self._sink)
        self.submitted = True
        for choice in self._all:
            choice.fate = self.client.live[choice.request.id].fate
        self.metrics.accepted(self.choices)
        if self.record is not None and self.ledger is not None:
            self.record.submit([len(ids) for ids in self.prompts], self._all, self.choices[0].request.params)
            self.ledger.begin(self.record)

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.record is not None and self.ledger is not None:
            self.ledger.end(self.record, error)
            self.metrics.waited(self.record.told().timings.waits)
        if self.submitted:
            self.client.abort([choice.request.id for choice in self._all if choice.finish is None])
            self.metrics.ended(self._all, self.failed)

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
                output = self._queue.popleft()
                made = self._by_id[output.request_id]
                for choice, part in zip(made, output.parts(len(made))):
                    piece = self._take(choice, part)
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

    def _take(self, choice: Choice, output: Output) -> Piece | None:
        if choice.finish is not None:
            return None
        if output.tokens:
            self.metrics.tokens(choice, len(output.tokens), self.arrived)
        try:
            piece = choice.take(output)
            piece.beam = next(iter(output.beams), None)
        except HttpError:
            self.failed = True
            raise
        if piece.finish is not None:
            if output.finish is None:  # a stop string: the engine does not know yet
                self.client.abort([choice.request.id])
            self.metrics.finished(choice, self.arrived)
        return piece

    def settle(self, pieces: list[list[Piece]]) -> list[list[Piece]]:
        """Of the `best_of` samples of each prompt keep the `n` with the highest mean log-probability, best first."""
        width = max(len(self.choices) // max(len(self.prompts), 1), 1)
        n = self.choices[0].request.params.n
        if width == n:
            return pieces
        kept: list[Choice] = []
        for start in range(0, len(self.choices), width):
            group = self.choices[start : start + width]
            kept += sorted(group, key=lambda choice: -choice.mean_logprob)[:n]
        found = [pieces[choice.index] for choice in kept]
        for index, (choice, parts) in enumerate(zip(kept, found)):
            choice.index = index
            for piece in parts:
                piece.index = index
        self.choices = kept
        return found

    @property
    def usage(self) -> Usage:
        prompt = sum(map(len, self.prompts))
        said = sum(choice.tokens for choice in self._all)
        cached = max((choice.cached for choice in self._all), default=0)
        usage = Usage(prompt, said, prompt + said, PromptTokensDetails(cached))
        if self.hearing is not None and self.hearing.manner.thoughts is not None:
            usage.completion_tokens_details = CompletionTokensDetails(sum(choice.thoughts for choice in self._all))
        if self.timed and self.record is not None:
            usage.timings = self.record.timings()
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
