"""PoolingEngine: texts become vectors and scores. The same verbs as `Engine`, which may have one beside generation.

    waiting ──▶ whole texts, first come first served, as many as fit the step's tokens ──▶ hidden states ──▶ Pooler

A text goes through in one step or not at all: it leaves no keys behind, so it needs no block of a cache, and a
decoder's texts are read as an encoder's are. Beside generation a step's tokens are shared (`turn`): while both have
work, pooling takes half of them over time; a text longer than its half goes when pooling has saved up for it, since
cutting it is no way out.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ConfigError, RequestError, StateError
from ..models.decoder import Decoder
from ..models.streaming import StreamError, refuse_new_weights
from ..models.weights import load_tensors
from .config import EngineConfig
from .kinds import step_tokens
from .limits import Limits
from .pooler import Pooler
from .request import Output, Request, State
from .stats import EngineStats
from .vectors import NO_TEXT, Pooled
from .whole import WholeTexts

TEXTS = 1024
"""Texts of one step at most."""
NOT_FINITE = "the model's numbers are not finite for this text: its weights or its dtype cannot hold them"


@dataclass(order=True, slots=True)
class _Waiting:
    """A request in the queue: the lowest urgency first, then the first that came."""

    urgency: int
    serial: int
    request: Request

    @property
    def tokens(self) -> int:
        return len(self.request.prompt_ids)


class PoolingEngine:
    """A decoder and the texts that wait for it.

    Raises:
        ConfigError: a context longer than the decoder was built for.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        pooler: Pooler,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        longest = config.max_model_len or decoder.max_len
        if longest > decoder.max_len:
            raise ConfigError(f"max_model_len is {longest}; this decoder was built for {decoder.max_len} at most")
        self.decoder, self.config, self.pooler, self.clock = decoder, config, pooler, clock
        self.abilities = pooler.abilities
        self.limits = Limits(max_model_len=longest, vocab=decoder.spec.vocab, cache_tokens=0)
        self.tokens = step_tokens(config, longest)
        self.texts = WholeTexts(decoder, tokens=self.tokens, texts=min(self.tokens, TEXTS))
        self.texts.compile()
        self.version = 0
        self.finished: Counter[State] = Counter()
        self.asleep = False
        self._waiting: list[_Waiting] = []
        self._by_id: dict[str, _Waiting] = {}
        self._outbox: list[Output] = []
        self._serial = 0
        self._saved = 0
        self._half_loaded = False
        self._steps = self._computed = 0
        self._busy, self._last = 0.0, (0, 0.0)

    # ------------------------------------------------------------------------------------ requests
    def submit(self, request: Request) -> None:
        """Queue a text; its one Output comes from `step`.

        Raises:
            RequestError: a task this model does not do, a text out of its context, or an id in use.
        """
        if request.pooling is None:
            raise RequestError(NO_TEXT)
        if request.id in self._by_id:
            raise RequestError(f"request id {request.id!r} is already running: choose another", "request_id")
        if request.adapter:
            raise RequestError("adapters are not pooled with: ask the base model", "model")
        self.abilities.check(request.pooling)
        self.limits.check_text(request, self.abilities.types)
        urgency = request.priority if self.config.scheduling_policy == "priority" else 0
        waiting = _Waiting(urgency, self._serial, request)
        self._serial += 1
        self._by_id[request.id] = waiting
        insort(self._waiting, waiting)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown and ended ids are ignored."""
        waiting = self._by_id.get(request_id)
        if waiting is not None:
            self._waiting.remove(waiting)
            self._end(waiting, State.ABORT)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._outbox)

    def step(self, tokens: int | None = None) -> list[Output]:
        """Pool as many texts as `tokens` hold (the whole budget by default), and tell what came of each.

        Raises:
            StateError: the engine sleeps, or its weights are half replaced.
        """
        if self._half_loaded:
            raise StateError("the last load_weights failed half-way: load a complete set of weights first")
        if self.asleep:
            raise StateError("the engine sleeps: wake it first")
        self._expire()
        batch = self._take(self.tokens if tokens is None else tokens)
        if batch:
            started = time.perf_counter()
            self._pool(batch)
            self._measure(sum(waiting.tokens for waiting in batch), time.perf_counter() - started)
        outputs, self._outbox = self._outbox, []
        return outputs

    def turn(self, budget: int, alone: bool) -> int:
        """How many of a step's `budget` tokens pooling takes, when generation has work too unless it is `alone`."""
        if not self._waiting:
            self._saved = 0
            return 0
        first = self._waiting[0].tokens
        if alone:
            return max(budget, first)
        self._saved = min(self._saved + budget // 2, max(budget // 2, first))
        if first > self._saved:
            return 0
        took = sum(waiting.tokens for waiting in self._fit(self._saved))
        self._saved -= took
        return took

    # ------------------------------------------------------------------------------------ a step
    def _expire(self) -> None:
        now = self.clock()
        for waiting in [w for w in self._waiting if w.request.deadline is not None and w.request.deadline <= now]:
            self._waiting.remove(waiting)
            self._end(waiting, State.TIMEOUT)

    def _fit(self, tokens: int) -> list[_Waiting]:
        """The first texts of the queue that `tokens` hold together."""
        found: list[_Waiting] = []
        for waiting in self._waiting[: self.texts.texts]:
            tokens -= waiting.tokens
            if tokens < 0:
                break
            found.append(waiting)
        return found

    def _take(self, tokens: int) -> list[_Waiting]:
        batch = self._fit(min(tokens, self.tokens))
        del self._waiting[: len(batch)]
        return batch

    @torch.inference_mode()
    def _pool(self, batch: list[_Waiting]) -> None:
        requests = [waiting.request for waiting in batch]
        for request in requests:
            request.move(State.RUNNING)
        lengths = [len(request.prompt_ids) for request in requests]
        try:
            hidden_TD = self.texts([r.prompt_ids for r in requests], [r.types for r in requests])
        except StreamError as error:
            for waiting in batch:
                self._end(waiting, State.ERROR, error=str(error))
            return
        whole = _finite(hidden_TD, lengths)
        made = iter(self.pooler(hidden_TD, lengths, [r.pooling for r in requests if r.pooling is not None]))
        for waiting, good in zip(batch, whole, strict=True):
            pooled = next(made)
            self._end(waiting, State.STOP if good else State.ERROR, pooled if good else None)

    def _end(self, waiting: _Waiting, state: State, pooled: Pooled | None = None, error: str | None = None) -> None:
        request = waiting.request
        del self._by_id[request.id]
        request.move(state)
        self.finished[state] += 1
        error = error or (NOT_FINITE if state is State.ERROR else None)
        self._outbox.append(Output(request.id, finish=state, error=error, pooled=pooled, version=self.version))

    def _measure(self, tokens: int, seconds: float) -> None:
        self._steps += 1
        self._computed += tokens
        self._busy += seconds
        self._last = tokens, seconds

    # ------------------------------------------------------------------------------------ weights and memory
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Take new weights under the checkpoint's names, as `Engine.load_weights` does; None: they are in place.

        Raises:
            ConfigError: a version that is not above the last one.
            CheckpointError: an unknown, missing or misshapen tensor.
        """
        if version <= self.version:
            raise ConfigError(f"weights version {version} is not above {self.version}: count versions upwards")
        refuse_new_weights(self.decoder)
        if named_tensors is not None:
            self._half_loaded = True
            load_tensors(self.decoder, named_tensors)
            self._half_loaded = False
        self.renew(self.decoder, version)

    def renew(self, decoder: Decoder, version: int) -> None:
        """Go on with a decoder whose weights are in place."""
        self.decoder = self.texts.decoder = self.pooler.decoder = decoder
        self.version = version
        if not self.asleep:
            self.texts.compile()

    def sleep(self) -> None:
        """Give back what a step works in; texts keep their places in the queue."""
        self.texts.forget()
        self.asleep = True

    def wake(self) -> None:
        """Take that memory again."""
        self.texts.compile()
        self.asleep = False

    # ------------------------------------------------------------------------------------ insight
    def stats(self) -> EngineStats:
        """Gauges and counters; there is no cache."""
        return EngineStats(
            waiting=len(self._waiting),
            step_tokens=self._last[0],
            step_seconds=self._last[1],
            steps=self._steps,
            busy_seconds=self._busy,
            computed_tokens=self._computed,
            prompt_tokens=self._computed,
            finished={state.value: count for state, count in self.finished.items()},
            version=self.version,
            asleep=self.asleep,
        )


def _finite(hidden_TD: Tensor, lengths: list[int]) -> list[bool]:
    """Whether all of a text's numbers are."""
    good_T = torch.isfinite(hidden_TD).all(-1)
    return [bool(part.all()) for part in good_T.split(lengths)]
