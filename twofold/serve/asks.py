"""Asks: questions to the model's process beside its requests, and who waits for the answers.

    ask ──▶ waits until the process is loaded ──▶ sent ──▶ Told: answered, or refused in the worker's words
                                                    └────▶ the process dies: an error, since it may or may not be done

What a process must know before it runs anything (adapters, say) is `standing`: each new one is told it first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from ..core import CapacityError, CheckpointError, ConfigError, RequestError, StateError, WorkerError
from . import wire

log = logging.getLogger("twofold.serve")

KINDS = {
    kind.__name__: kind for kind in (CapacityError, CheckpointError, ConfigError, RequestError, StateError, WorkerError)
}


class Asks:
    """The open questions of one EngineClient. `standing` maps a name of the owner's choice to a verb and its words."""

    def __init__(self) -> None:
        self.standing: dict[str, tuple[str, dict[str, Any]]] = {}
        self.on_refused: Callable[[str, Exception], None] = lambda name, error: None
        self._numbers = itertools.count()
        self._open: dict[str, tuple[wire.Ask, asyncio.Future[dict[str, Any]]]] = {}
        self._unsent: list[str] = []
        self._replayed: dict[str, str] = {}

    def add(self, verb: str, what: dict[str, Any]) -> asyncio.Future[dict[str, Any]]:
        """A question to be sent as soon as it can be; who stops waiting for the answer takes it back."""
        ask = wire.Ask(f"a{next(self._numbers)}", verb, what)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[ask.id] = ask, answer
        self._unsent.append(ask.id)
        answer.add_done_callback(lambda _: self._open.pop(ask.id, None))
        return answer

    def unsent(self) -> Iterator[wire.Ask]:
        """What was not sent yet, and counts as sent now."""
        names, self._unsent = self._unsent, []
        yield from (self._open[name][0] for name in names if name in self._open)

    def replay(self) -> Iterator[wire.Ask]:
        """What a new process is told before anything else."""
        self._replayed = {}
        for name, (verb, what) in self.standing.items():
            ask = wire.Ask(f"a{next(self._numbers)}", verb, what)
            self._replayed[ask.id] = name
            yield ask

    def told(self, message: wire.Told) -> None:
        """The worker's answer; one that nobody waits for any more is passed over."""
        if (name := self._replayed.pop(message.id, None)) is not None:
            if message.error is not None:
                log.error("%s could not be told to the new process: %s", name, message.error)
                self.standing.pop(name, None)
                self.on_refused(name, _error(message))
        elif message.id in self._open:
            answer = self._open[message.id][1]
            if answer.done():
                return
            if message.error is None:
                answer.set_result(message.what)
            else:
                answer.set_exception(_error(message))

    def lost(self, why: str, *, unsent: bool = False) -> None:
        """The process died: what it was asked gets an error; with `unsent`, so does what waited to be sent."""
        for name, (ask, answer) in list(self._open.items()):
            if (unsent or name not in self._unsent) and not answer.done():
                answer.set_exception(WorkerError(f"'{ask.verb}' got no answer, and may not be done: {why}"))


def _error(message: wire.Told) -> Exception:
    """The error that the worker raised, as far as it is one of Twofold's."""
    return KINDS.get(str(message.what.get("kind")), WorkerError)(message.error or "")
