"""Judge: whether a form can be enforced is known before its request is accepted, and without the event loop waiting.

It has a grammar process of its own, so whatever it costs to compile a stranger's grammar, the masks of running requests
do not wait for it. The process is started by the first form, and again when it died on one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from ..core import RequestError, WorkerError
from ..engine.grammar import messages as m
from ..engine.grammar.process import GrammarProcess
from ..engine.structured import StructuredOutputs

log = logging.getLogger("twofold.serve")

AT_ONCE = 2  # as many as the process has lanes for
REMEMBERED = 256
WAITING = 256
STRIKES = 2
OPEN_SECONDS = 60.0
TICK = 0.25
COSTLY = "the grammar is too costly to compile"


class _Case:
    """One question and who waits for its answer."""

    def __init__(self, ask: Callable[[int], m.Check | m.Validate]) -> None:
        self.ask = ask
        self.answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.strikes = 0
        self.until = 0.0


class Judge:
    """`opening` gives what the process is told first; it is asked when a process is needed."""

    def __init__(self, opening: Callable[[], m.Open]) -> None:
        self.opening = opening
        self.restarts = 0
        self._process: GrammarProcess | None = None
        self._waiting: deque[_Case] = deque()
        self._asked: dict[int, _Case] = {}
        self._numbers = itertools.count()
        self._known: OrderedDict[StructuredOutputs, str | None] = OrderedDict()
        self._ticker: asyncio.TimerHandle | None = None
        self._opened = False
        self._seconds = 0.0

    async def check(self, wanted: StructuredOutputs) -> None:
        """Raises:
        RequestError: the form cannot be enforced; the message says why.
        WorkerError: too many questions wait already.
        """
        if wanted not in self._known:
            error = await self._ask(lambda number: m.Check(number, wanted))
            self._known[wanted] = error
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(wanted)
        if (known := self._known[wanted]) is not None:
            raise RequestError(known, f"structured_outputs.{wanted.form}")

    async def validate(self, wanted: StructuredOutputs, text: str) -> str | None:
        """What is wrong with a finished text, None when nothing is."""
        return await self._ask(lambda number: m.Validate(number, wanted, text))

    def stop(self) -> None:
        """End the process; whoever still waits is told."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        self._leave()
        self._tell_waiting(WorkerError("the server is going down"))

    def _tell_waiting(self, error: WorkerError) -> None:
        for case in (*self._asked.values(), *self._waiting):
            if not case.answer.done():
                case.answer.set_exception(error)
        self._asked.clear()
        self._waiting.clear()

    # -- questions --------------------------------------------------------------------------------------------------

    async def _ask(self, question: Callable[[int], m.Check | m.Validate]) -> str | None:
        if len(self._waiting) >= WAITING:
            raise WorkerError("too many grammars wait to be compiled: try again soon")
        case = _Case(question)
        self._waiting.append(case)
        self._feed()
        try:
            return await case.answer
        finally:
            with contextlib.suppress(ValueError):  # whoever asked is gone
                self._waiting.remove(case)

    def _feed(self) -> None:
        """Ask what waits, a few at a time; one that was there at a death goes alone."""
        if not self._waiting:
            return
        if self._process is None:
            self._start()
        while self._process is not None and self._waiting and len(self._asked) < AT_ONCE:
            suspect = self._waiting[0].strikes or any(case.strikes for case in self._asked.values())
            if suspect and self._asked:
                return
            case, number = self._waiting.popleft(), next(self._numbers)
            case.until = time.monotonic() + self._seconds + (0 if self._opened else OPEN_SECONDS)
            self._asked[number] = case
            self._process.send(case.ask(number))

    def _start(self) -> None:
        opening = self.opening()
        self._seconds = 2 * opening.compile_seconds + 1.0
        self._opened = False
        try:
            self._process = GrammarProcess(opening, modest=True)
        except OSError as error:
            self._tell_waiting(WorkerError(f"no grammar process can be started: {error}"))
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.fileno(), self._hear)
        if self._ticker is None:
            self._ticker = loop.call_later(TICK, self._tick)

    def _hear(self) -> None:
        if self._process is None:
            return
        try:
            for message in self._process.receive():
                if isinstance(message, m.Opened):
                    self._open(message)
                elif isinstance(message, m.Checked) and message.id in self._asked:
                    case = self._asked.pop(message.id)
                    if not case.answer.done():
                        case.answer.set_result(message.error)
        except (EOFError, WorkerError):
            self._died()
        self._feed()

    def _open(self, message: m.Opened) -> None:
        self._opened = True
        for case in self._asked.values():
            case.until = time.monotonic() + self._seconds
        if message.error is not None:
            log.error("no grammar can be compiled for this tokenizer: %s", message.error)
            for case in (*self._asked.values(), *self._waiting):
                if not case.answer.done():
                    case.answer.set_result(f"this model's tokenizer cannot be used with a grammar: {message.error}")
            self._asked.clear()
            self._waiting.clear()

    def _tick(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(TICK, self._tick)
        now = time.monotonic()
        if any(case.until < now for case in self._asked.values()):
            self._died()
            self._feed()

    def _died(self) -> None:
        """Whoever was asked about is a suspect, and is asked about again, alone; two deaths are proof."""
        self._leave()
        self.restarts += 1
        log.warning("the process that compiles grammars is gone with %d of them", len(self._asked))
        for case in reversed(self._asked.values()):
            case.strikes += 1
            if case.strikes < STRIKES:
                self._waiting.appendleft(case)
            elif not case.answer.done():
                case.answer.set_result(COSTLY)
        self._asked.clear()

    def _leave(self) -> None:
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process.fileno())
            self._process.kill()
            self._process = None
