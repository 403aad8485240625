"""Beam search: one request outside, `width` rows inside that share every block that holds the same tokens.

    trunk      prompt ──▶ the first token's alternatives          one row, as any other
    branches            ┬─▶ beam 0     after each step the best of all alternatives of all beams go on; a beam that has
                        ├─▶ beam 1     several goes on in several rows, which hold its blocks together. Whoever writes
                        └─▶ beam 2     first into a block that others hold too, writes into a copy

Which sequence is best, when one is finished and when the search ends are those of transformers' `generate(num_beams=w)`
(its version 5), so that both give the same sequences and scores.

Preemption takes the whole group. What it recomputes is the trunk again, now with all tokens that the beams have in
common, and then each beam's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from msgspec.structs import replace

from .blocks import BlockPool
from .plan import Chunk, ChunkResult
from .request import Beam, Request, State, TokenOut
from .row import Row
from .sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Path:
    """A running beam: its tokens, the sum of their log-probabilities, and which beam of the last step it goes on."""

    said: tuple[TokenOut, ...] = ()
    total: float = 0.0
    parent: int = 0

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.said]


class Search:
    """Running and finished sequences of one search; no tokens are computed here.

    `ends` are the ids that finish a sequence, those of `stops` with a reason of their own; one of `room` tokens is
    finished too.
    """

    def __init__(self, params: SamplingParams, *, ends: frozenset[int], stops: frozenset[int], room: int) -> None:
        self.width = params.width
        self.penalty = params.length_penalty
        self.early = params.early_stopping
        self.ends, self.stops, self.room = ends, stops, room
        self.live = [Path()]
        self.done: list[Beam] = []

    def advance(self, found: Sequence[Sequence[tuple[float, TokenOut]]]) -> bool:
        """Go on with the best of what follows each running beam: (edited log-probability, token). False: it is over."""
        length = len(self.live[0].said) + 1
        ranked = sorted(
            (-(path.total + value), number, place, token)
            for number, (path, options) in enumerate(zip(self.live, found, strict=True))
            for place, (value, token) in enumerate(options)
        )
        full = self.early is True and len(self.done) == self.width
        live: list[Path] = []
        for rank, (negated, number, _, token) in enumerate(ranked):
            path = Path((*self.live[number].said, token), -negated, number)
            if token.id not in self.ends and length < self.room:
                if len(live) < self.width:
                    live.append(path)
            elif rank < self.width and not full:
                self.done.append(self._finished(path))
        self.done = sorted(self.done, key=lambda beam: -beam.score)[: self.width]
        self.live = live
        return bool(live) and self._hopeful(length)

    def _hopeful(self, length: int) -> bool:
        """Whether a running beam may yet take a finished one's place, as far as `early_stopping` asks."""
        if len(self.done) < self.width:
            return True
        if self.early is True:
            return False
        reach = self.room if self.early == "never" and self.penalty > 0.0 else length
        best: float = self.live[0].total / reach**self.penalty
        return best > self.done[-1].score

    def _finished(self, path: Path) -> Beam:
        last, score = path.said[-1].id, path.total / len(path.said) ** self.penalty
        finish = State.STOP if last in self.ends else State.LENGTH
        return Beam(path.said, path.total, score, finish, last if last in self.stops else None)


class BeamRow(Row):
    """The row of a beam search in the scheduler's queues: its trunk, and its branches once it has any.

    Branches are rows that stand in no queue; they lie side by side with the search's running beams. `heard` holds what
    follows each of them, until all have been heard.
    """

    __slots__ = ("branches", "heard", "search")

    def __init__(
        self, request: Request, *, serial: int, urgency: int, room: int, block_size: int, eos_ids: tuple[int, ...]
    ) -> None:
        super().__init__(request, serial=serial, urgency=urgency, room=room, block_size=block_size)
        params = request.params
        stops = frozenset(params.stop_token_ids) - frozenset(() if params.ignore_eos else eos_ids)
        ends = stops | frozenset(params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_ids))
        self.search = Search(params, ends=ends, stops=stops, room=room)
        self.drafting = False
        self.branches: list[Row] = []
        self.heard: dict[int, list[tuple[float, TokenOut]]] = {}

    # ------------------------------------------------------------------------------------ what the scheduler asks
    @property
    def seats(self) -> int:
        return self.search.width

    @property
    def parts(self) -> tuple[Row, ...]:
        return tuple(branch for branch in self.branches if branch.remaining) if self.branches else (self,)

    @property
    def tables(self) -> list[list[int]]:
        return [self.blocks, *(branch.blocks for branch in self.branches)]

    @property
    def loss(self) -> int:
        trunk = self.request.num_computed
        return trunk - self.found + sum(branch.request.num_computed - trunk for branch in self.branches)

    @property
    def empty(self) -> int:
        """Slots of the last blocks without a token; a block that beams share counts once."""
        size = self.block_size
        ends: dict[int, int] = {}
        for row in self.branches or (self,):
            if row.blocks:
                ends[row.blocks[-1]] = max(ends.get(row.blocks[-1], 0), row.request.num_computed)
        return sum(-computed % size for computed in ends.values())

    def chunk(self, count: int, eos_ids: tuple[int, ...]) -> Chunk:
        """As any row's, but nothing is chosen after a trunk from which several beams go on."""
        chunk = super().chunk(count, eos_ids)
        return chunk if len(self.search.live) == 1 else replace(chunk, draws=())

    def drop(self, pool: BlockPool) -> None:
        super().drop(pool)
        for branch in self.branches:
            branch.drop(pool)
        self.branches = []

    def reset(self) -> None:
        """Forget blocks and progress: the trunk is now all that the running beams have in common."""
        super().reset()
        self.heard.clear()
        alike = takewhile(lambda ids: len(set(ids)) == 1, zip(*(path.ids for path in self.search.live)))
        self.request.output_ids[:] = [ids[0] for ids in alike]

    # ------------------------------------------------------------------------------------ a step
    def take(self, part: Row, got: ChunkResult, pool: BlockPool, serial: Callable[[], int]) -> bool:
        """Take in what one part computed; True when the search is over.

        `serial` gives numbers for new rows.
        """
        if got.tokens:
            self.heard[part.serial] = _options(part.request.params, got)
        if any(part.remaining for part in self.branches or (self,)):
            return False
        rows = self.branches or [self]
        if self.heard:
            if not self.search.advance([self.heard[row.serial] for row in rows]):
                return True
            self.heard.clear()
            parents = [rows[path.parent] for path in self.search.live]
        else:
            parents = [self] * len(self.search.live)  # a trunk that was computed again
        self._fork(rows, parents, pool, serial)
        return False

    def _fork(self, rows: list[Row], parents: list[Row], pool: BlockPool, serial: Callable[[], int]) -> None:
        """Go on from `parents`, side by side with the running beams; each parent's first child takes its place."""
        branches: list[Row] = []
        used: set[int] = set()
        for parent in parents:
            if parent.serial in used or parent is self:
                branch = self._child(parent, serial())
                pool.acquire(parent.blocks)
                branch.grow(parent.blocks)
            else:
                branch = parent
            used.add(parent.serial)
            branches.append(branch)
        for branch, path in zip(branches, self.search.live):
            branch.request.output_ids[:] = path.ids
        for row in rows:
            if row is self or row.serial not in used:
                row.drop(pool)
        self.branches = branches

    def _child(self, parent: Row, serial: int) -> Row:
        """A row that has computed what `parent` has, without its blocks."""
        mine = self.request
        request = Request(
            id=mine.id,
            prompt_ids=mine.prompt_ids,
            params=mine.params,
            salt=mine.salt,
            adapter=mine.adapter,
            seed=mine.seed,
            output_ids=list(parent.request.output_ids),
        )
        request.num_computed = parent.request.num_computed
        child = Row(request, serial=serial, urgency=self.urgency, room=self.room, block_size=self.block_size)
        child.head, child.scored, child.drafting, child.slot = self, True, False, self.slot
        child.root, child.chain = parent.root, list(parent.chain)
        child.published = child.promised = parent.published
        return child


def row_of(request: Request, eos_ids: tuple[int, ...], **about: int) -> Row:
    """The row of a request, whatever it asks for."""
    return BeamRow(request, eos_ids=eos_ids, **about) if request.params.use_beam_search else Row(request, **about)


def shared(row: Row, pool: BlockPool) -> bool:
    """Whether the block that a row writes next is one that others hold too, as only beams may."""
    if row.head is row:
        return False
    place = row.request.num_computed // row.block_size
    return place < len(row.blocks) and pool.holders(row.blocks[place]) > 1


def unshare(row: Row, pool: BlockPool) -> tuple[int, int]:
    """Give such a row a block of its own there; (from, to) of the copy."""
    place = row.request.num_computed // row.block_size
    (fresh,) = pool.allocate(1)
    pair = (row.blocks[place], fresh)
    pool.release(pair[:1])
    row.exchange(place, fresh)
    return pair


def _options(params: SamplingParams, got: ChunkResult) -> list[tuple[float, TokenOut]]:
    """What may follow a beam, best first: the search's own log-probability, and the token as the caller sees it."""
    top = got.tokens[0].top
    if got.thoughts:
        return [(value, thought) for (_, value), thought in zip(top, got.thoughts, strict=True)]
    shown = top[: params.logprobs] if params.logprobs is not None else ()
    return [(value, TokenOut(token, value, rank, shown)) for rank, (token, value) in enumerate(top, 1)]
