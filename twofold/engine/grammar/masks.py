"""Grammars: the engine's end of the grammar process. It is told the tokens of a step, works while the next forward pass
runs, and is asked for masks when that is done.

    apply ─▶ tell (tokens) ─▶ ...       ─▶ poll (forced tokens) ─▶ plan ─▶ ask ─▶ forward ─▶ masks ─▶ draws
                        └──── the grammar process finds the next masks ────┘

- A row whose mask is late draws nothing in that step and is held until the mask is there: it delays nobody.
- A process that hangs or dies is replaced. Its watchdog names the row at fault, which ends with an error; the others'
  states are made again from their tokens. A row that is at work in two deaths is at fault too.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core import RequestError, WorkerError
from ..plan import Chunk, StepPlan
from ..row import Row
from ..structured import StructuredOutputs
from . import messages as m
from .process import GrammarProcess

log = logging.getLogger("twofold.engine")


OPEN_SECONDS = 60.0
SHARE = 0.1
"""Of a forward pass: how long its draws wait for a mask that is late."""
LEAST_SECONDS = 0.001
ALONE_SECONDS = 0.05  # where nobody else draws in the step
AHEAD_MOST = 0.001
TRIES = 3
STRIKES = 2


class Grammars:
    """`gated` is the scheduler's own table of rows with a grammar. Nothing is started before there is one.

    `ahead_seconds` is how long a plan may wait to know which tokens are forced; None: a twentieth of a forward pass.
    """

    ahead_seconds: float | None = None

    def __init__(
        self,
        folder: str | Path,
        vocab: int,
        eos_ids: Sequence[int],
        gated: Mapping[int, Row],
        limits: m.GrammarLimits | None = None,
    ) -> None:
        self.opening = m.opening(folder, vocab, eos_ids, limits)
        self.gated = gated
        self.restarts = 0
        self._process: GrammarProcess | None = None
        self._opened = False
        self._told: dict[int, int] = {}  # how many outputs of a row the process knows
        self._due: dict[int, float] = {}  # rows that it owes an answer, and since when
        self._strikes: dict[int, int] = {}
        self._along: dict[int, m.Masks] = {}
        self._checked: dict[int, m.Checked] = {}
        self._numbers = itertools.count()
        self._deaths = 0  # without an answer in between
        self._began = self._started = 0.0
        self._asked: dict[int, tuple[Row, Chunk]] = {}
        self._drawing = 0
        self._forward = 0.0

    # ------------------------------------------------------------------------------------ the step's verbs
    def tell(self) -> None:
        """Tell the process of rows that came, went on, or ended."""
        gone = tuple(serial for serial in self._told if serial not in self.gated)
        for serial in gone:
            for table in (self._told, self._due, self._strikes):
                table.pop(serial, None)
        if gone:
            self._send(m.End(gone))
        for serial, row in self.gated.items():
            outputs, known = row.request.output_ids, self._told.get(serial)
            wanted = row.request.params.structured_outputs
            if known == len(outputs) or (row.gate is not None and row.gate.error) or wanted is None:
                continue
            self._told[serial] = len(outputs)
            self._due.setdefault(serial, time.monotonic())
            if known is None:
                self._send(m.Begin(serial, wanted, tuple(outputs)))
            else:
                self._send(m.Advance(serial, tuple(outputs[known:])))

    def poll(self) -> None:
        """Take what has been answered, and wait a moment for answers that may force tokens of rows about to decode."""
        self.tell()
        if self._process is None:
            return
        self._receive()
        least = min(AHEAD_MOST, self._forward * SHARE / 2)
        until = time.monotonic() + (least if self.ahead_seconds is None else self.ahead_seconds)
        while any(self._ahead(row) for row in self.gated.values()) and (left := until - time.monotonic()) > 0:
            self._receive(left)

    def _ahead(self, row: Row) -> bool:
        gate = row.gate
        return gate is not None and gate.at >= 0 and not gate.held and row.remaining == 1 and not _known(row)

    def ask(self, plan: StepPlan) -> None:
        """Note which rows draw in this step, and ask for masks along drafts that are not their grammar's own."""
        drawing = [chunk for chunk in plan.chunks if chunk.draws]
        self._drawing, self._began = len(drawing), time.monotonic()
        self._along.clear()
        self._asked = {c.serial: (self.gated[c.serial], c) for c in drawing if c.serial in self.gated}
        for serial, (row, chunk) in self._asked.items():
            if chunk.drafts and not _led(row, chunk):
                self._due.setdefault(serial, time.monotonic())
                self._send(m.Along(serial, len(row.request.output_ids), chunk.drafts))

    def masks(self) -> dict[int, Sequence[bytes]]:
        """`plan.Masks`: what is there once the forward pass is done, and a moment's patience later."""
        if not self._asked:
            return {}
        now = time.monotonic()
        self._forward = now - self._began
        patience = max(LEAST_SECONDS, SHARE * self._forward)
        until = now + (max(patience, ALONE_SECONDS) if self._drawing == 1 else patience)
        self._receive()
        while not all(self._settled(*each) for each in self._asked.values()) and (left := until - time.monotonic()) > 0:
            self._receive(left)
        return {serial: self._granted(row, chunk) for serial, (row, chunk) in self._asked.items()}

    def wait(self) -> None:
        """Wait a moment for any answer: nothing can be computed before one."""
        self._receive(0.02)

    # ------------------------------------------------------------------------------------ one row
    def _settled(self, row: Row, chunk: Chunk) -> bool:
        if row.gate is None or row.gate.error:
            return True
        return _known(row) if _led(row, chunk) or not chunk.drafts else chunk.serial in self._along

    def _granted(self, row: Row, chunk: Chunk) -> Sequence[bytes]:
        gate = row.gate
        assert gate is not None
        if gate.error:
            return ()
        along = self._along.get(chunk.serial)
        if along is not None and along.drafts == chunk.drafts:
            return tuple(itertools.takewhile(bool, along.masks))
        if not _known(row):
            gate.held = True
            return ()
        path = [*(self._only(token) for token in gate.forced), *([gate.mask] if gate.mask else [])]
        return path[: len(chunk.draws)] if _led(row, chunk) else path[:1]

    def _only(self, token: int) -> bytes:
        mask = bytearray(-(-self.opening.vocab // 32) * 4)
        mask[token >> 3] = 1 << (token & 7)
        return bytes(mask)

    # ------------------------------------------------------------------------------------ the process
    def check(self, wanted: StructuredOutputs) -> None:
        """Wait until it is known whether a form compiles; raises RequestError if not."""
        answer = self._question(m.Check(next(self._numbers), wanted))
        if answer.error is not None:
            raise RequestError(answer.error, f"structured_outputs.{wanted.form}")

    def validate(self, wanted: StructuredOutputs, text: str) -> str | None:
        """Wait until it is known what is wrong with a finished text; None: nothing."""
        return self._question(m.Validate(next(self._numbers), wanted, text)).error

    def _question(self, message: m.Check | m.Validate) -> m.Checked:
        deaths = self.restarts
        self._send(message)
        until = time.monotonic() + OPEN_SECONDS + 2 * self.opening.compile_seconds
        while message.id not in self._checked:
            self._receive(0.05)
            if self._process is None or time.monotonic() > until or self.restarts > deaths:
                return m.Checked(message.id, "the grammar is too costly: the process that compiled it is gone")
        return self._checked.pop(message.id)

    def _send(self, message: m.ToChild) -> None:
        if self._process is None:
            try:
                self._process, self._opened = GrammarProcess(self.opening), False
            except OSError as error:
                self._fail(f"no grammar process can be started: {error}")
                return
            self._started = time.monotonic()
        self._process.send(message)

    def _receive(self, seconds: float = 0.0) -> None:
        if self._process is None:
            return
        try:
            for message in self._process.receive(seconds):
                self._take(message)
        except (EOFError, WorkerError) as error:
            self._died(str(error) or "it ended")
            return
        self._look()

    def _take(self, message: m.FromChild) -> None:
        self._deaths = 0
        if isinstance(message, m.Opened):
            self._opened = True
            self._due = dict.fromkeys(self._due, time.monotonic())
            if message.error is not None:
                self._fail(f"this checkpoint's tokenizer cannot be used with a grammar: {message.error}")
        elif isinstance(message, m.Checked):
            self._checked[message.id] = message
        elif (row := self.gated.get(message.serial)) is not None and row.gate is not None:
            gate = row.gate
            if message.error is not None:
                gate.error, gate.held = message.error, False
                self._due.pop(message.serial, None)
                return
            if isinstance(message, m.Masks):
                self._along[message.serial] = message
            else:
                gate.at, gate.forced, gate.mask = message.at, message.forced, message.mask
            if message.at == self._told.get(message.serial):
                gate.held = False
                self._due.pop(message.serial, None)
                self._strikes.pop(message.serial, None)

    def _look(self) -> None:
        """End a process that cannot even end itself."""
        if self._process is None or not self._due:
            return
        if self._opened:
            since = min(self._due.values())
            limit = 2 * (self.opening.compile_seconds + self.opening.mask_seconds)
        else:
            since, limit = self._started, OPEN_SECONDS
        if time.monotonic() - since > limit:
            self._died("it does not answer")

    def _died(self, why: str) -> None:
        assert self._process is not None
        self._process.kill()
        self._process = None
        self.restarts += 1
        self._deaths += 1
        log.warning("the grammar process is gone (%s); it is started again for %d requests", why, len(self.gated))
        for serial in self._due:
            self._strikes[serial] = self._strikes.get(serial, 0) + 1
            row = self.gated.get(serial)
            if row is not None and row.gate is not None and self._strikes[serial] >= STRIKES:
                row.gate.error = row.gate.error or "the grammar process died twice while it worked for this request"
                row.gate.held = False
        if self._deaths >= TRIES:
            self._fail(f"the grammar process cannot be kept running: {why}")
        self._told.clear()
        self._due.clear()
        self._along.clear()
        self.tell()

    def _fail(self, why: str) -> None:
        for row in self.gated.values():
            if row.gate is not None:
                row.gate.error, row.gate.held = why, False

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def _known(row: Row) -> bool:
    return row.gate is not None and row.gate.at == len(row.request.output_ids)


def _led(row: Row, chunk: Chunk) -> bool:
    """Whether a chunk's drafts are what its grammar forces."""
    return _known(row) and row.gate is not None and chunk.drafts == row.gate.forced[: len(chunk.drafts)]
