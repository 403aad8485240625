"""The grammar process: lanes of work, a watchdog, a limit on memory.

    ears ──▶ a row's pending work ──▶ quick lane │ slow lanes ──▶ answers

A request's first work, and work of one that was slow before, goes to the slow lanes; the others share one lane of
their own, so a costly grammar delays nobody else's masks. Where a piece of work takes too long, the watchdog says
whose it was and ends the process: native code cannot be stopped otherwise. Its parent starts another one.
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import msgspec

from ...core import TwofoldError
from ...data.schema import schema_error
from . import messages as m
from .matchers import Matchers, Stand
from .vocabulary import Vocabulary

QUICK_SECONDS = 0.003
SLOW_LANES = 2
LOOK_SECONDS = 0.02

Job = Callable[[], msgspec.Struct | None]


class Row:
    """A request's work in order: at most one lane has it at a time."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Job, Callable[[str], msgspec.Struct], float]] = deque()
        self.queued = False
        self.seconds = 1.0  # of its last work; the first counts as slow
        self.stand: Stand | None = None


class Lane:
    """A thread that works off rows, and what it is at now, for the watchdog."""

    def __init__(self, child: Child, rows: queue.SimpleQueue[Row], name: str) -> None:
        self.child = child
        self.rows = rows
        self.now: tuple[float, Callable[[str], msgspec.Struct]] | None = None  # until when, and what to say after it
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while True:
            row = self.rows.get()
            job, failed, seconds = row.jobs[0]
            began = time.monotonic()
            self.now = (began + seconds, failed)
            try:
                answer = job()
            except TwofoldError as error:
                answer = failed(str(error))
            except Exception as error:  # a mistake of ours or of the library's is that request's alone
                answer = failed(f"{type(error).__name__}: {error!s:.200}")
            self.now = None
            row.seconds = time.monotonic() - began
            if answer is not None:
                self.child.send(answer)
            self.child.done(row)


class Child:
    """One end of the socketpair, and the rows behind it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rows: dict[int, Row] = {}
        self.quick: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self.slow: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._sending = threading.Lock()

    def run(self) -> None:
        """Answer until the other end closes."""
        opened = self._receive()
        if not isinstance(opened, m.Open):
            return
        try:
            vocabulary = Vocabulary(opened.folder, opened.vocab, opened.eos_ids)
        except Exception as error:
            self.send(m.Opened(f"{type(error).__name__}: {error}"))
            return
        _limit_memory(opened.memory_bytes)
        self.opened, self.matchers = opened, Matchers(vocabulary)
        lanes = [Lane(self, self.quick, "quick")]
        lanes += [Lane(self, self.slow, f"slow-{number}") for number in range(SLOW_LANES)]
        threading.Thread(target=self._watch, args=(lanes,), name="watch", daemon=True).start()
        self.send(m.Opened())
        while (message := self._receive()) is not None:
            self._take(message)

    # ------------------------------------------------------------------------------------ work
    def _take(self, message: m.ToChild) -> None:
        masks, compiles = self.opened.mask_seconds, self.opened.compile_seconds
        if isinstance(message, m.Check | m.Validate):
            number = message.id
            self._add(Row(), self._judged(message), lambda why: m.Checked(number, why), compiles)
        elif isinstance(message, m.End):
            for serial in message.serials:
                self.rows.pop(serial, None)
        elif isinstance(message, m.Begin):
            row = self.rows[message.serial] = Row()
            self._add(row, self._begun(row, message), _failed(message.serial, len(message.ids)), compiles)
        elif isinstance(message, m.Advance | m.Along):
            row_of = self.rows.get(message.serial)
            if row_of is not None:
                work = self._advanced if isinstance(message, m.Advance) else self._along
                self._add(row_of, work(row_of, message), _failed(message.serial, -1), masks)  # type: ignore[arg-type]

    def _add(self, row: Row, job: Job, failed: Callable[[str], msgspec.Struct], seconds: float) -> None:
        with self._lock:
            row.jobs.append((job, failed, seconds))
            if not row.queued:
                row.queued = True
                self._enqueue(row)

    def done(self, row: Row) -> None:
        """A lane has done a row's first job."""
        with self._lock:
            row.jobs.popleft()
            row.queued = bool(row.jobs)
            if row.queued:
                self._enqueue(row)

    def _enqueue(self, row: Row) -> None:
        (self.quick if row.seconds < QUICK_SECONDS else self.slow).put(row)

    def _judged(self, message: m.Check | m.Validate) -> Job:
        def job() -> m.Checked:
            if isinstance(message, m.Validate):
                return m.Checked(message.id, schema_error(message.text, str(message.wanted.json)))
            Stand(self.matchers, message.wanted, ()).next()  # a grammar may compile and fail at its first token
            if message.wanted.checked_after:
                schema_error("null", str(message.wanted.json))  # raises for a schema that nothing can be checked by
            return m.Checked(message.id)

        return job

    def _begun(self, row: Row, message: m.Begin) -> Job:
        def job() -> m.Next:
            row.stand = Stand(self.matchers, message.wanted, message.ids)
            return self._next(message.serial, row.stand)

        return job

    def _advanced(self, row: Row, message: m.Advance) -> Job:
        def job() -> m.Next | None:
            if row.stand is None:
                return None  # its Begin failed, and said so
            row.stand.advance(message.ids)
            return self._next(message.serial, row.stand)

        return job

    def _along(self, row: Row, message: m.Along) -> Job:
        def job() -> m.Masks | None:
            if row.stand is None:
                return None
            masks = row.stand.along(message.drafts)
            return m.Masks(message.serial, row.stand.at, message.drafts, masks)

        return job

    def _next(self, serial: int, stand: Stand) -> m.Next:
        forced, mask = stand.next()
        return m.Next(serial, stand.at, forced, mask)

    # ------------------------------------------------------------------------------------ frames
    def send(self, message: msgspec.Struct) -> None:
        frame = m.pack(message)
        with self._sending:
            try:
                self.sock.sendall(frame)
            except OSError:
                os._exit(0)  # nobody is left to tell

    def _receive(self) -> m.ToChild | None:
        try:
            return m.for_child(m.receive(self.sock.recv))
        except (OSError, EOFError):
            return None

    def _watch(self, lanes: list[Lane]) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            for lane in lanes:
                now = lane.now
                if now is not None and time.monotonic() > now[0]:
                    self.send(now[1]("the grammar is too costly: it took more time than one may have"))
                    os._exit(3)


def _failed(serial: int, at: int) -> Callable[[str], msgspec.Struct]:
    return lambda why: m.Next(serial, at, error=why)


def _limit_memory(room: int) -> None:
    """At most `room` bytes more than what is taken now; what asks for more ends the process."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, most))


def main() -> NoReturn:
    """`python -m twofold.engine.grammar.child FD`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        Child(sock).run()
    os._exit(0)


if __name__ == "__main__":
    main()
