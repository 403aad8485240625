"""The model's own process: it owns the engine and runs its step loop; text stays outside.

Three threads: `main` loads and steps, `ears` read the socket into an inbox (the end of the stream ends the process,
also in the middle of a step, so that no orphan keeps the memory), `pulse` beats four times a second.
"""

from __future__ import annotations

import faulthandler
import inspect
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from ..core import RequestError, TwofoldError, WorkerError
from ..core.errors import unknown
from ..engine.request import Output, Request, State
from ..engine.stats import EngineStats
from . import wire

BEAT_SECONDS = 0.25
STATS_SECONDS = 0.05
Verb = Callable[..., dict[str, Any]]


class Steps(Protocol):
    """The part of `Engine` that this process drives."""

    def submit(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Output]: ...
    @property
    def has_work(self) -> bool: ...


class Loaded(Protocol):
    """An engine, what the front must know of it, what it answers beside requests, and how to read its gauges."""

    @property
    def engine(self) -> Steps: ...
    @property
    def ready(self) -> wire.Ready: ...
    @property
    def verbs(self) -> Mapping[str, Verb]: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class Worker:
    """One end of the socketpair, and the loop behind it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox: queue.SimpleQueue[wire.ToWorker] = queue.SimpleQueue()
        self.waiting: dict[str, Request] = {}
        self.step_began: float | None = None
        self._lock = threading.Lock()
        self._last_stats: EngineStats | None = None
        self._stats_due = 0.0

    def run(self, load: Callable[[wire.Start], Loaded]) -> int:
        """Load, then step until told to stop; the exit code of the process."""
        threading.Thread(target=self._ears, name="ears", daemon=True).start()
        try:
            start = self.inbox.get()
            if not isinstance(start, wire.Start):
                return 0
            loaded = load(start)
            self.send(loaded.ready)
            threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
            self._loop(loaded)
            loaded.close()
        except TwofoldError as error:
            self.send(wire.Fatal(type(error).__name__, str(error)))
            return 1
        except Exception as error:
            traceback.print_exc()
            self.send(wire.Fatal(type(error).__name__, f"{type(error).__name__}: {error}"))
            return 1
        return 0

    def send(self, message: wire.ToFront) -> None:
        frame = wire.pack(message)
        with self._lock:
            self.sock.sendall(frame)

    def _loop(self, loaded: Loaded) -> None:
        engine = loaded.engine
        while self._take(loaded):
            if engine.has_work:
                began = self.step_began = time.monotonic()
                outputs = engine.step()
                self.step_began = None
                started = self._started(began)
                if outputs or started:
                    self.send(wire.Outputs(outputs, started, time.monotonic() - began))
            self._tell_stats(loaded)

    def _tell_stats(self, loaded: Loaded) -> None:
        """Now and then while there is work, and always before resting, so that what is free is known to be free."""
        now = time.monotonic()
        if now < self._stats_due and loaded.engine.has_work:
            return
        self._stats_due = now + STATS_SECONDS
        stats = loaded.stats()
        if stats != self._last_stats:
            self._last_stats = stats
            self.send(wire.Stats(stats))

    def _take(self, loaded: Loaded) -> bool:
        """Apply what the front asked for; wait for it when there is nothing else to do. False means leave."""
        engine = loaded.engine
        block = not engine.has_work
        while True:
            try:
                message = self.inbox.get(block)
            except queue.Empty:
                return True
            block = False
            if isinstance(message, wire.Submit):
                self._submit(engine, message)
            elif isinstance(message, wire.Abort):
                for name in message.ids:
                    self.waiting.pop(name, None)
                    engine.abort(name)
            elif isinstance(message, wire.Ask):
                self.step_began = time.monotonic()  # watched as a step is
                self._answer(loaded.verbs, message)
                self.step_began = None
            elif isinstance(message, wire.Stop):
                return False

    def _answer(self, verbs: Mapping[str, Verb], ask: wire.Ask) -> None:
        told = answer(verbs, ask)
        try:
            self.send(told)
        except (TypeError, WorkerError) as error:  # it does not fit a frame
            self.send(wire.Told(ask.id, f"{ask.verb}: {error}", {"kind": "WorkerError"}))

    def _submit(self, engine: Steps, message: wire.Submit) -> None:
        request = message.request()
        try:
            engine.submit(request)
        except TwofoldError as error:  # one bad request is its own affair
            self.send(wire.Outputs([Output(request.id, finish=State.ERROR, error=str(error))]))
        else:
            self.waiting[request.id] = request

    def _started(self, began: float) -> list[tuple[str, float]]:
        """The sequences that left the queue in the step that began then, with how long each stood in it."""
        gone = [r for r in self.waiting.values() if r.state is not State.WAITING]
        for request in gone:
            del self.waiting[request.id]
        return [(r.id, max(began - r.arrival, 0.0)) for r in gone]

    def _ears(self) -> None:
        try:
            while True:
                self.inbox.put(wire.for_worker(wire.receive(self.sock.recv)))
        except (OSError, EOFError):
            os._exit(0)  # the front is gone: nobody is left to tell
        except TwofoldError as error:
            print(f"twofold worker: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def _pulse(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            began = self.step_began
            try:
                self.send(wire.Beat(0.0 if began is None else time.monotonic() - began))
            except OSError:
                return


def answer(verbs: Mapping[str, Verb], ask: wire.Ask) -> wire.Told:
    """What the verb says, or why not: whatever it raises is the asker's affair, not the end of the process."""
    try:
        if ask.verb not in verbs:
            raise RequestError(unknown("verb", ask.verb, verbs), "verb")
        try:
            inspect.signature(verbs[ask.verb]).bind(**ask.what)
        except TypeError as error:
            raise RequestError(f"{ask.verb}: {error}") from None
        return wire.Told(ask.id, what=verbs[ask.verb](**ask.what))
    except TwofoldError as error:
        return wire.Told(ask.id, str(error), {"kind": type(error).__name__})
    except Exception as error:
        traceback.print_exc()
        return wire.Told(ask.id, f"{ask.verb}: {type(error).__name__}: {error}", {"kind": type(error).__name__})


def run(fd: int, load: Callable[[wire.Start], Loaded]) -> NoReturn:
    """The body of the process: signals are the front's to answer, SIGABRT leaves every thread's stack behind."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=fd) as sock:
        code = Worker(sock).run(load)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of math libraries may not be joined; the memory goes with the process


def main() -> NoReturn:
    """`python -m twofold.serve.worker FD`: what `ModelProcess.spawn` starts."""

    def load(start: wire.Start) -> Loaded:
        from .model import load_model  # torch is imported after the ears are open

        return load_model(start)

    run(int(sys.argv[1]), load)


if __name__ == "__main__":
    main()
