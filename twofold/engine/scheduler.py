"""Scheduler: which tokens of which requests go into the next step. Plain Python: no device, no socket, no thread.

A request has known tokens (prompt and outputs) and a count of those computed; each step moves the count towards the
tokens. Prefill, a prompt in pieces, decode, a prefix hit and the recomputation after a preemption are all that.

    one step's budget │ decodes, a token each │ prompts under way, oldest first │ new prompts, cut to fill the rest │

This is Dynamic SplitFuse (DeepSpeed-FastGen, 2023): steps are of about equal size, and nobody's decode waits for
somebody else's long prompt. What keeps it from thrashing:

- A request is admitted when blocks for all its known tokens are there, besides those that running requests still need
  for theirs and one more for each of these; and never in a step that preempted.
- When blocks run out, the request that loses the least computed work gives its blocks back, the youngest among equals.
  So the one with the most work always advances, and somebody always finishes.
- A request whose next block is being computed by a running one right now waits for it (promises.py).
- Drafts (speculation.py) get what is left of the budget, and blocks that nobody needs for a token of his own: they cut
  nobody short and preempt nobody.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..core import RequestError, StateError
from .adapters import AdapterPool
from .beams import BeamRow, row_of, shared, unshare
from .blocks import BlockPool
from .config import Policy
from .deadlines import Deadlines
from .limits import Limits
from .plan import Chunk, ChunkResult, StepPlan, StepResult
from .promises import Promises
from .request import Output, Request, State
from .row import Row, check_queues
from .speculation import Speculation
from .tiers import Tiers
from .waste import Waste


class Scheduler:
    """Requests in, plans out, results in, outputs out; between two calls every block is accounted for.

    `clock` gives seconds like `time.monotonic`. `version` is that of the weights, part of every cached block's name.
    `speculation` guesses at tokens; without it a step decides at most one token of a request. `tiers` hold blocks that
    the pool has not.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: Policy = "fcfs",
        chunked: bool = True,
        eos_ids: tuple[int, ...] = (),
        adapters: AdapterPool | None = None,
        clock: Callable[[], float] = time.monotonic,
        speculation: Speculation | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_batched_tokens
        self.policy = policy
        self.chunked = chunked
        self.eos_ids = eos_ids
        self.adapters = adapters or AdapterPool()
        self.clock = clock
        self.speculation = speculation
        self.version = 0
        self.step = 0
        self.running: list[Row] = []
        self.waiting: list[Row] = []
        self.gated: dict[int, Row] = {}  # by serial: the rows with a grammar
        self.finished: Counter[State] = Counter()
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._serial = 0
        self._rows: dict[str, Row] = {}
        self._planned: dict[int, tuple[Row, Chunk]] = {}
        self._copies: dict[int, tuple[int, int]] = {}
        self._forced: set[int] = set()  # serials of the last plan whose drafts are their grammar's
        self._promises = Promises(pool, tiers)
        self._deadlines = Deadlines()
        self._outbox: list[Output] = []
        self._waste = Waste()

    # ------------------------------------------------------------------------------------ in and out
    def submit(self, request: Request) -> None:
        """Queue a request; one that resumes goes on from its outputs, or ends at once if they were complete.

        Raises:
            RequestError: the id is taken, or the request is out of this engine's limits.
            CapacityError: it could never fit the cache; the message says what would.
        """
        if request.id in self._rows:
            raise RequestError(f"request id {request.id!r} is already running: choose another", "request_id")
        room = self.limits.room(request)
        urgency = request.priority if self.policy == "priority" else 0
        request.adapter = self.adapters.enter(request.adapter)
        size, serial = self.pool.block_size, self._next_serial()
        row = row_of(request, self.eos_ids, serial=serial, urgency=urgency, room=room, block_size=size)
        self._rows[request.id] = row
        if row.gate is not None:
            self.gated[row.serial] = row
        if self.pool.caching:
            row.rename(self.version)
        insort(self.waiting, row)
        self._deadlines.add(row)
        if request.output_ids and (end := row.end(self.eos_ids, self.clock())):
            self._finish(row, end[0], stop_reason=end[1])

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def abort(self, request_id: str) -> None:
        """End a request now, wherever it stands; an id that is unknown or already ended is ignored."""
        row = self._rows.get(request_id)
        if row is not None:
            self._finish(row, State.ABORT)

    def expire(self) -> None:
        """End every request whose deadline has passed."""
        for request_id, serial in self._deadlines.passed(self.clock()):
            row = self._rows.get(request_id)
            if row is not None and row.serial == serial:  # else it ended long ago, and another may have its id
                self._finish(row, State.TIMEOUT)

    def take(self) -> list[Output]:
        """What happened since the last call, in order; every request's last Output has `finish` set."""
        outputs, self._outbox = self._outbox, []
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._outbox)

    # ------------------------------------------------------------------------------------ plan
    def plan(self) -> StepPlan:
        """Choose the next step's tokens and allocate their blocks; empty where all wait for a grammar or a tier."""
        self.step += 1
        self._planned, self._copies = {}, {}
        self._pass_gates()
        before = self.preemptions
        left = self.budget
        if not self.chunked:
            left = self._admit(left)  # whole prompts, in a step of their own: everybody else's next token waits
            if self._planned:
                return StepPlan(step=self.step, chunks=tuple(chunk for _, chunk in self._planned.values()))
        for decoding in (True, False):
            for row in [part for queued in self.running for part in queued.parts]:
                runs = row.head.request.state is State.RUNNING
                if runs and (row.remaining == 1) is decoding and not row.held and left > 0:
                    left -= self._continue(row, left)
                    if self.preemptions != before:
                        left = self.budget - sum(len(chunk.ids) for _, chunk in self._planned.values())
        if self.chunked and self.preemptions == before:
            left = self._admit(left)
        if left > 0 and (self.speculation is not None or self.gated):
            self._guess(left)
        held = self._promises.loading or any(row.held for row in self.gated.values())
        if self._rows and not self._planned and not held:
            raise StateError(f"{len(self._rows)} requests and none can advance: {self.pool.available} blocks available")
        chunks = tuple(chunk for _, chunk in self._planned.values())
        return StepPlan(step=self.step, chunks=chunks, copies=tuple(self._copies.values()))

    def _continue(self, row: Row, left: int) -> int:
        """Plan a running row's next tokens, making room for them if need be; how many, 0 if it had to give way."""
        count = min(row.remaining, left)
        need = self.pool.blocks_for(row.request.num_computed + count) - len(row.blocks)
        while need + shared(row, self.pool) > self.pool.available:
            victim = max(self.running, key=lambda r: (r.urgency, -r.loss, r.serial))
            for part in victim.parts:
                self._planned.pop(part.serial, None)
                self._copies.pop(part.serial, None)
            self._preempt(victim)
            if victim is row.head:
                return 0
        self._plan_chunk(row, count, need)
        return count

    def _plan_chunk(self, row: Row, count: int, need: int) -> None:
        if shared(row, self.pool):
            self._copies[row.serial] = unshare(row, self.pool)
        if need > 0:
            row.grow(self.pool.allocate(need))
        self._planned[row.serial] = (row, row.chunk(count, self.eos_ids))

    def _admit(self, left: int) -> int:
        """Start waiting requests in order, while budget, seats and blocks last; what is left of the budget."""
        if not self.waiting:
            return left
        pool = self.pool
        parts = [part for row in self.running for part in row.parts]
        owed = sum(max(0, pool.blocks_for(part.request.num_tokens) - len(part.blocks)) for part in parts)
        place, seats = 0, sum(row.seats for row in self.running)
        self.adapters.begin()
        while place < len(self.waiting) and left > 0:
            row = self.waiting[place]
            if seats + row.seats > self.max_num_seqs:
                break
            found = None if self._promises.waits(row) else self._promises.find(row)
            if found is None or not self.adapters.reachable(row.request.adapter):
                place += 1  # what it waits for is with running ones: it holds up nobody
                continue
            need = pool.blocks_for(row.request.num_tokens) - len(found)
            if need + pool.idle(found) + owed + seats > pool.available:
                break  # no overtaking: a large request must not starve behind small ones
            if not self.chunked and row.request.num_tokens - len(found) * pool.block_size > left:
                break
            if (found := self._promises.fetch(row, found)) is None:
                place += 1
                continue
            if error := self.adapters.seat(row):
                self._finish(row, State.ERROR, error=error)
                continue
            del self.waiting[place]
            self._start(row, found)
            count = min(row.remaining, left)
            self._plan_chunk(row, count, pool.blocks_for(row.request.num_computed + count) - len(row.blocks))
            owed += pool.blocks_for(row.request.num_tokens) - len(row.blocks)
            seats += row.seats
            left -= count
        return left

    def _pass_gates(self) -> None:
        """End the rows whose text is complete by their grammar, and those that it cannot lead on."""
        for row in tuple(self.gated.values()):
            assert row.gate is not None
            end = row.gate.end(len(row.request.output_ids), row.request.params.min_tokens)
            if end is not None and (end[1] or row.request.state is State.RUNNING):
                self._finish(row, end[0], error=end[1], param=end[1] and "structured_outputs")

    def _guess(self, left: int) -> None:
        """Put drafts behind the last tokens of rows, as far as budget and idle blocks reach: what a grammar forces,
        else what speculation guesses."""
        pool, seats = self.pool, sum(row.seats for row in self.running)
        rows = [row for row, chunk in self._planned.values() if chunk.draws and row.scored]
        guesses = {row.serial: row.forced for row in rows if row.forced}
        self._forced = set(guesses)
        if self.speculation is not None:
            rows = [row for row in rows if row.serial not in guesses]
            guesses |= self.speculation.guess(rows, self.budget - left, left)
        for serial, guessed in guesses.items():
            row, chunk = self._planned[serial]
            known, held = row.request.num_tokens, len(row.blocks)
            idle = max(0, pool.available - seats)  # everybody may need one for his next token
            drafts = guessed[: min(left, row.guessable, (held + idle) * pool.block_size - known)]
            if drafts:
                row.grow(pool.allocate(max(0, pool.blocks_for(known + len(drafts)) - held)))
                self._planned[serial] = (row, row.drafted(chunk, drafts, self.eos_ids))
                left -= len(drafts)

    def _start(self, row: Row, found: list[int]) -> None:
        """Move a waiting row to running on top of the blocks found for it, and promise the ones it will compute."""
        request, pool = row.request, self.pool
        self._promises.begin(row, found)
        if request.preemptions == 0:
            request.num_cached = row.found
            if pool.caching and row.scored:
                pool.queries += request.num_tokens
                pool.hits += row.found - row.landed
        request.move(State.RUNNING)
        insort(self.running, row)

    # ------------------------------------------------------------------------------------ apply
    def apply(self, result: StepResult) -> None:
        """Take in what the last plan's step produced: tokens, scores, ends. Rows that ended meanwhile are passed over.

        Raises:
            StateError: the result is not that of the last plan.
        """
        if result.step != self.step or {got.serial for got in result.rows} != set(self._planned):
            raise StateError(f"a result of step {result.step} does not answer the plan of step {self.step}")
        planned, self._planned = self._planned, {}
        now = self.clock()
        for got in result.rows:
            row, chunk = planned[got.serial]
            if row.head.request.state is not State.RUNNING:
                continue
            if got.error is not None:
                self._finish(row.head, State.ERROR, error=got.error, param=got.param)
            elif isinstance(row.head, BeamRow):
                self._search(row.head, row, chunk, got)
            else:
                self._advance(row, chunk, got, now)
        self._waste.saw(self.pool, self.running)

    def _advance(self, row: Row, chunk: Chunk, got: ChunkResult, now: float) -> None:
        request = row.request
        if got.redo is not None:
            request.num_computed, row.drafting = got.redo, False
            return
        request.num_computed = chunk.start + len(chunk.ids) - len(chunk.draws)
        if got.tokens and not request.output_ids:
            self.prompt_tokens += len(request.prompt_ids)
        tokens, end = row.append(got.tokens, self.eos_ids, now)
        self.generation_tokens += len(tokens)
        request.num_computed += len(tokens) if chunk.draws else 0
        self._promises.publish(row)
        prompt = row.prompt_scores(got.scores)
        if self.speculation is not None and got.tokens and row.serial not in self._forced:
            self.speculation.told(row, got.tokens, len(chunk.draws) - 1)
        if end is not None:
            self._finish(row, end[0], stop_reason=end[1], tokens=tokens, prompt=prompt)
        elif tokens or prompt is not None:
            self._tell(row, tokens=tokens, prompt=prompt)

    def _search(self, row: BeamRow, part: Row, chunk: Chunk, got: ChunkResult) -> None:
        """`_advance` of one part of a beam search, which says nothing before its end."""
        part.request.num_computed = chunk.start + len(chunk.ids) - (len(chunk.draws) - len(got.tokens))
        self._promises.publish(part)
        if (prompt := row.prompt_scores(got.scores)) is not None:
            self._tell(row, prompt=prompt)
        if got.tokens and part is row and not row.request.output_ids:
            self.prompt_tokens += len(row.request.prompt_ids)
        if row.take(part, got, self.pool, self._next_serial):
            best = tuple(row.search.done[: row.request.params.n])
            self.generation_tokens += sum(len(beam.tokens) for beam in best)
            self._finish(row, best[0].finish, stop_reason=best[0].stop_reason, beams=best)

    # ------------------------------------------------------------------------------------ giving back
    def _leave(self, row: Row) -> None:
        """Take a row out of its queue, and its blocks back."""
        queue = self.running if row.request.state is State.RUNNING else self.waiting
        place = bisect_left(queue, row)
        if queue[place] is not row:
            raise StateError(f"request {row.request.id} is {row.request.state} but not in that queue")
        del queue[place]
        self._promises.break_all(row)
        row.drop(self.pool)
        self.adapters.unseat(row)

    def _preempt(self, row: Row) -> None:
        """Give a running row's blocks back; it keeps its rank and its tokens, and will compute them again."""
        self._leave(row)
        row.reset()
        if self.pool.caching:
            row.name_blocks(row.request.num_tokens)
        row.request.move(State.PREEMPTED)
        row.request.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, row)

    def preempt_all(self) -> None:
        """Send every running request back to the queue, for new weights or before the cache goes away."""
        for row in tuple(self.running):
            self._preempt(row)

    def set_version(self, version: int) -> None:
        """Make everything be computed anew, under names of these weights; what older weights made is forgotten."""
        self.preempt_all()
        self.version = version
        self.pool.forget_all()
        if self.pool.caching:
            for row in self.waiting:
                row.rename(version)

    def _finish(self, row: Row, state: State, **what: Any) -> None:
        """End a row; `what` is what its last Output says besides."""
        request = row.request
        self._leave(row)
        del self._rows[request.id]
        self.gated.pop(row.serial, None)
        self.adapters.leave(request.adapter)
        if self.speculation is not None:
            self.speculation.forget(row)
        request.move(state)
        self.finished[state] += 1
        self._tell(row, finish=state, **what)

    def _tell(self, row: Row, **what: Any) -> None:
        self._outbox.append(Output(row.request.id, version=self.version, **row.request.news(), **what))

    # ------------------------------------------------------------------------------------ truth
    @property
    def waste(self) -> float:
        """The share of allocated cache slots that held no token, over all steps so far."""
        return self._waste.share

    def check_integrity(self) -> None:
        """Check blocks, queues and promises against each other.

        Raises:
            StateError: saying what does not add up; always a bug in Twofold.
        """
        self.pool.check_integrity([table for row in self._rows.values() for table in row.tables])
        check_queues(self.running, self.waiting, len(self._rows))
        self.adapters.check_integrity(self.running, self._rows.values())
        self._promises.check_integrity(self.running, self.waiting)
