"""EngineClient: the front's end of the model's process, which it starts, watches, and starts again.

The front is the memory of every accepted request: prompt ids, tokens so far, seed. Random numbers depend on
(seed, sample, position) alone, so a new process continues the same text from there, and a token that was handed on
is never asked for again.

             Ready               process dies
  STARTING ────────▶ READY ◀──────────────────▶ RESTARTING     requests are resubmitted when READY again
      │                     Ready                   │
      ▼ what cannot be loaded                       ▼ too many deaths in a row
    FAILED ◀────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import zip_longest
from typing import Any

import msgspec

from ..core import CapacityError, CheckpointError, ConfigError, RequestError, WorkerError
from ..engine.request import Output, Request, State
from ..engine.stats import EngineStats
from . import wire
from .asks import Asks
from .config import ServeConfig
from .fate import Fate
from .process import COMMAND, ModelProcess

log = logging.getLogger("twofold.serve")

# Trying again cannot help.
HOPELESS = {kind.__name__: kind for kind in (ConfigError, CheckpointError, CapacityError)}
HEALTHY_SECONDS = 10.0
TICK = 0.25
Sink = Callable[[Output], None]


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class Accepted:
    """One accepted request. `crashes` counts the deaths of the process since its last token."""

    __slots__ = ("crashes", "fate", "prompt_told", "request", "sent", "sink", "started")

    def __init__(self, request: Request, sink: Sink) -> None:
        self.request = request
        self.sink = sink
        self.sent = False
        self.started: float | None = None
        self.prompt_told = False
        self.crashes = 0
        self.fate = Fate()


class EngineClient:
    """Requests in, Outputs to each request's sink, whatever becomes of the process in between.

    Single-threaded: every method is called on the event loop. `start` is what each process is told to load.
    """

    def __init__(self, config: ServeConfig, start: wire.Start, command: Sequence[str] = COMMAND) -> None:
        self.config = config
        self.phase = Phase.STARTING
        self.info: wire.Ready | None = None
        self.stats = EngineStats()
        self.past = EngineStats()  # counters of processes that are gone
        self.restarts = 0
        self.live: dict[str, Accepted] = {}
        self.live_tokens = 0
        self.asks = Asks()
        self.first_ready: asyncio.Future[wire.Ready] = asyncio.get_running_loop().create_future()
        self.on_started: Callable[[Accepted, float], None] = lambda accepted, seconds: None
        self._start = start
        self._command = command
        self._process: ModelProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._killing: asyncio.Task[None] | None = None
        self._heard = 0.0
        self._useful = False
        self._why = ""
        self._pace = 1.0  # seconds between two finished sequences, smoothed
        self._last_finish = time.monotonic()

    # -- the front's verbs ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process, for the first time or after `stop`."""
        if self.first_ready.done():
            self.first_ready, self.phase = asyncio.get_running_loop().create_future(), Phase.STARTING
        self._task = asyncio.create_task(self._supervise(), name="model-supervisor")
        self._task.add_done_callback(self._supervisor_ended)

    async def stop(self) -> None:
        """Tell the process to leave; whatever still runs ends as an abort."""
        deaf, self.phase = not self.ready, Phase.STOPPED
        if self._process is not None:
            if deaf:  # loading, or silent
                await self._process.kill(stacks=False)
            else:
                self._process.send(wire.Stop())
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._task), 3.0)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for accepted in list(self.live.values()):
            self._finish(accepted, State.ABORT, "the server is going down")
        self.asks.lost("the server is going down", unsent=True)
        if not self.first_ready.done():
            self.first_ready.cancel()
        self.past, self.stats = add(self.past, self.stats), EngineStats()

    @property
    def ready(self) -> bool:
        """Whether the process is loaded and has been heard of just now."""
        return self.phase is Phase.READY and time.monotonic() - self._heard < self.config.watch.late

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def room(self) -> int:
        """How many sequences may be accepted at once, running and waiting together."""
        given = self.config.limits.queue_requests
        if given is not None:
            return given
        return 4 * self.info.max_running if self.info else 0

    def check(self, count: int, tokens: int = 0) -> None:
        """Whether `count` more sequences of `tokens` prompt tokens in all may come in.

        Raises:
            RequestError: they would not even fit an empty queue.
            CapacityError: not now.
            WorkerError: there is no model, and why.
        """
        if self.phase is Phase.FAILED:
            raise WorkerError(f"the model could not be kept running: {self._why}")
        if self.phase is Phase.STOPPED:
            raise WorkerError("the server is going down")
        if self.info is None:
            raise WorkerError("the model is still loading: try again soon")
        limit = self.config.limits.queue_tokens
        if count > self.room or tokens > limit:
            raise RequestError(
                f"{count} sequences of {tokens} prompt tokens in all are more than the queue ever holds "
                f"({self.room} sequences, {limit} tokens): split the request"
            )
        if len(self.live) + count > self.room or self.live_tokens + tokens > limit:
            raise CapacityError(f"the queue is full ({len(self.live)} of {self.room} sequences): try again later")

    @property
    def retry_after(self) -> int:
        """Whole seconds after which room is likely, from how fast sequences finish."""
        return min(max(math.ceil(self._pace), 1), 60)

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        """Accept all of `requests` or none (the errors of `check`); Outputs go to `sink`, the last with `finish`."""
        self.check(len(requests), sum(len(r.prompt_ids) for r in requests))
        for request in requests:
            self.live[request.id] = Accepted(request, sink)
            self.live_tokens += len(request.prompt_ids)
        self._feed()

    def abort(self, ids: Sequence[str]) -> None:
        """Forget these; unknown and finished ones are fine. Their sinks hear no more."""
        known = [self._forget(name) for name in dict.fromkeys(ids) if name in self.live]
        sent = [accepted.request.id for accepted in known if accepted.sent]
        if sent and self._process is not None:
            self._process.send(wire.Abort(sent))
        if known:
            self._feed()

    async def ask(self, verb: str, **what: Any) -> dict[str, Any]:
        """What the model's process answers; one that is being started again is waited for.

        Raises:
            WorkerError: there is no model, or it died before it answered.
            TwofoldError: what the process said against it, of its kind.
        """
        self.check(0)
        answer = self.asks.add(verb, what)
        self._feed()
        return await answer

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        """A mistake of ours in the supervisor must not leave requests waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the supervisor failed", exc_info=error)
            self._why = f"{type(error).__name__}: {error}"
            self._give_up(wire.Fatal("bug", self._why))

    # -- the process's life -----------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        deaths = 0
        while True:
            self._useful = False
            fatal = await self._one_life()
            if self.phase is Phase.STOPPED:
                return
            deaths = 0 if self._useful else deaths + 1
            self._why = fatal.message
            log.error("the model's process is gone: %s", fatal.message, extra={"requests": len(self.live)})
            if (not self.first_ready.done() and fatal.kind in HOPELESS) or deaths >= self.config.watch.tries:
                self._give_up(fatal)
                return
            self._mourn()
            await asyncio.sleep(min(self.config.watch.backoff * 2 ** (deaths - 1), 10.0) if deaths else 0.0)

    async def _one_life(self) -> wire.Fatal:
        """Start the process and listen until it is gone; returns why."""
        try:
            process = await ModelProcess.spawn(self._command)
        except OSError as error:
            return wire.Fatal("OSError", f"it cannot be started: {error}")
        self._process = process
        process.send(self._start)
        self._heard = time.monotonic()
        watch = asyncio.create_task(self._watch(process), name="model-watch")
        fatal: wire.Fatal | None = None
        try:
            while (message := await process.receive()) is not None:
                self._heard = time.monotonic()
                if isinstance(message, wire.Fatal):
                    fatal = message
                else:
                    self._take(message)
        except WorkerError as error:
            fatal = wire.Fatal("WorkerError", str(error))
        finally:
            watch.cancel()
            self._process = None
            code = await process.close(patience=1.0 if self.phase is Phase.STOPPED or fatal else 0.2)
        return fatal or wire.Fatal("exit", f"it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")

    async def _watch(self, process: ModelProcess) -> None:
        """Kill a process that was not heard of for too long, and end requests whose deadline passed without it."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            if now - last > 4 * TICK:  # it was this process that stood still: the frames wait in the socket
                self._heard = now
            last = now
            self._sweep(now)
            limit = self.config.watch.dead if self.phase is Phase.READY else self.config.watch.start
            if now - self._heard > limit:
                log.error("the model's process has not been heard of for %.1f s: killing it", now - self._heard)
                await process.kill()

    def _take(self, message: wire.ToFront) -> None:
        if isinstance(message, wire.Outputs):
            for name, seconds in message.started:
                if accepted := self.live.get(name):
                    accepted.started = seconds
                    accepted.fate.start(message.seconds)
                    self.on_started(accepted, seconds)
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, wire.Told):
            self.asks.told(message)
        elif isinstance(message, wire.Stats):
            self.stats = message.stats
        elif isinstance(message, wire.Beat):
            if message.step_seconds > self.config.watch.step and self._process is not None:
                log.error("one step has taken %.0f s: killing the model's process", message.step_seconds)
                self._killing = asyncio.create_task(self._process.kill())
        elif isinstance(message, wire.Ready):
            self.info = message
            self.phase = Phase.READY
            asyncio.get_running_loop().call_later(HEALTHY_SECONDS, self._grew_old, self._process)
            if not self.first_ready.done():
                self.first_ready.set_result(message)
            for ask in self.asks.replay():
                self._send(ask)
            self._feed()

    def _grew_old(self, process: ModelProcess | None) -> None:
        if process is self._process:
            self._useful = True

    def _mourn(self) -> None:
        """Keep what the dead process had counted, and mark its requests to be sent again."""
        self.phase = Phase.RESTARTING if self.first_ready.done() else Phase.STARTING
        self.restarts += 1
        self.past = add(self.past, self.stats)
        self.stats = EngineStats()
        self.asks.lost(f"the model's process died: {self._why}")
        for accepted in list(self.live.values()):
            if accepted.sent:
                accepted.sent = False
                accepted.fate.die()
                accepted.crashes += 1
                if accepted.crashes >= self.config.watch.suspects:
                    self._finish(
                        accepted, State.ERROR, f"the model's process died {accepted.crashes} times on this request"
                    )

    def _give_up(self, fatal: wire.Fatal) -> None:
        self.phase = Phase.FAILED
        for accepted in list(self.live.values()):
            self._finish(accepted, State.ERROR, f"the model could not be kept running: {fatal.message}")
        self.asks.lost(f"the model could not be kept running: {fatal.message}", unsent=True)
        if not self.first_ready.done():
            self.first_ready.set_exception(HOPELESS.get(fatal.kind, WorkerError)(fatal.message))
        log.critical("giving up on the model's process: %s", fatal.message)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Send what is not with the process yet, questions first, then requests, oldest first.

        A request that was there at two deaths in a row without a token between is a suspect: suspects go alone,
        one after the other, so that the one that kills the process is found and the others live.
        """
        if self.phase is not Phase.READY or self._process is None:
            return
        for ask in self.asks.unsent():
            self._send(ask)
        suspects = [a for a in self.live.values() if a.crashes >= self.config.watch.suspects - 1]
        if suspects:
            chosen = [] if any(a.sent for a in suspects) else suspects[:1]
        else:
            chosen = [a for a in self.live.values() if not a.sent]
        for accepted in chosen:
            accepted.sent = True
            self._process.send(wire.Submit(**accepted.request.wire()))

    def _send(self, message: wire.ToWorker) -> None:
        if self._process is not None:
            self._process.send(message)

    def _deliver(self, output: Output) -> None:
        accepted = self.live.get(output.request_id)
        if accepted is None:  # aborted while this was on its way
            return
        if output.prompt is not None:
            if accepted.prompt_told:
                output = msgspec.structs.replace(output, prompt=None)
            accepted.prompt_told = True
        if output.finish is not None:
            self._forget(output.request_id)
            now = time.monotonic()
            self._pace += 0.1 * (min(now - self._last_finish, 60.0) - self._pace)
            self._last_finish = now
        if output.tokens:
            self._useful = True
            accepted.request.output_ids.extend(token.id for token in output.tokens)
        if accepted.crashes and (output.tokens or output.finish):
            accepted.crashes = 0
            self._feed()
        accepted.fate.hear(output.facts)
        accepted.sink(output)

    def _forget(self, name: str) -> Accepted:
        accepted = self.live.pop(name)
        self.live_tokens -= len(accepted.request.prompt_ids)
        return accepted

    def _finish(self, accepted: Accepted, state: State, error: str) -> None:
        self._forget(accepted.request.id)
        accepted.sink(Output(accepted.request.id, finish=state, error=error))

    def _sweep(self, now: float) -> None:
        late = [a for a in self.live.values() if a.request.deadline is not None and now > a.request.deadline + 1.0]
        for accepted in late:
            if accepted.sent and self._process is not None:
                self._process.send(wire.Abort([accepted.request.id]))
            self._finish(accepted, State.TIMEOUT, "the deadline passed")


def add(past: EngineStats, last: EngineStats) -> EngineStats:
    """The counters of two processes together; gauges are left at 0."""
    names = ("prefix_queries", "prefix_hits", "preemptions", "steps", "computed_tokens", "adapter_reads")
    more = ("drafts", "draft_tokens", "accepted_tokens", "external_queries", "external_hits")
    per_pos = zip_longest(past.accepted_per_pos, last.accepted_per_pos, fillvalue=0)
    return EngineStats(
        **{name: getattr(past, name) + getattr(last, name) for name in (*names, *more)},
        accepted_per_pos=tuple(map(sum, per_pos)),
        tiers={
            tier: {key: past.tiers.get(tier, {}).get(key, 0) + last.tiers.get(tier, {}).get(key, 0) for key in counts}
            for tier, counts in (past.tiers | last.tiers).items()
        },
    )
