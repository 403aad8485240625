"""Tiers: blocks of the KV cache beyond the pool, found by name again: in this machine's memory, and on a disk.

    pool ──published──▶ queue ──a thread──▶ disk        a full block goes there as soon as it is computed
      │                                      │
      └──forgotten──▶ host                   │          the pool's own room ran out
      ▲                │                     │
      └─────copied─────┴──read by threads────┘          a request was admitted whose next blocks are there

A waiting request whose next blocks are in a tier is passed over while they are read, as one is that waits for a block
being computed. They come in pieces, each put into the pool as cached blocks, so that the request then finds them there
as if they had never left. What does not come in time, or not at all, is computed. The bytes that come back are those
that went, so nothing of this shows in a text.

After vLLM's KV connectors and SGLang's HiCache. Plain Python: who copies bytes is `contents.py`, or a test.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from itertools import islice
from typing import Protocol

from ..core import StateError
from .blocks import BlockPool, Name
from .row import Row

Content = memoryview | None
"""A block's bytes; None for one that was not there after all."""

PIECE_BYTES = 64 << 20
"""What is read for one request before it is put into the pool."""
AT_ONCE = 8
"""Blocks that are copied before a tier is asked again whether it has room."""
STAGED_BYTES = 128 << 20
"""What has been read for all requests and is not in the pool yet, about."""
PATIENCE = 5.0
"""Seconds after which a piece is given up and computed."""


class Tier(Protocol):
    """A place for blocks by name. Nothing but `close` may block: it is called between two steps.

    `name` is that in the metrics. Trouble with the storage is counted in `errors` and raised to nobody.
    """

    name: str
    errors: int
    stored_bytes: int

    @property
    def held_bytes(self) -> int:
        """What it holds now, as far as it knows."""

    @property
    def full(self) -> bool:
        """Whether `store` would leave a block out for now."""

    def wants(self, name: Name, leaving: bool) -> bool:
        """Whether it should have this block, which was used just now, or is `leaving` the pool."""

    def store(self, name: Name, content: memoryview) -> None:
        """Keep a block, unless full; its bytes are the tier's from now on."""

    def lookup(self, name: Name) -> bool:
        """Whether it probably has the block."""

    def load(self, name: Name) -> Future[Content]:
        """The block's bytes, to be read alone; a future that never raises."""

    def forget(self) -> None:
        """The weights have changed: nothing that is here may be found."""

    def close(self) -> None:
        """Finish what is under way, within two seconds."""


class Contents(Protocol):
    """Who copies blocks out of the cache and into it."""

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""

    def save(self, blocks: Sequence[int]) -> list[memoryview]: ...
    def restore(self, blocks: Sequence[int], contents: Sequence[memoryview]) -> None: ...


class HostTier:
    """Blocks that the pool forgot, in this machine's memory; the least recently used go first.

    On the CPU that is the memory which the pool has too: a larger pool does the same without copies. It is of use
    beside a CUDA device, and where a pool should stay small.
    """

    name = "host"
    errors = 0
    full = False

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self.stored_bytes = 0
        self._kept: OrderedDict[bytes, tuple[bytes, memoryview]] = OrderedDict()  # digest -> tokens, bytes

    def wants(self, name: Name, leaving: bool) -> bool:
        if self.lookup(name):
            self._kept.move_to_end(name[0])
            return False
        return leaving

    def store(self, name: Name, content: memoryview) -> None:
        if content.nbytes > self.most_bytes:
            return
        self._drop(name[0])
        self._kept[name[0]] = (name[1], content)
        self.held_bytes += content.nbytes
        self.stored_bytes += content.nbytes
        while self.held_bytes > self.most_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, digest: bytes) -> None:
        _, content = self._kept.pop(digest, (b"", memoryview(b"")))
        self.held_bytes -= content.nbytes

    def lookup(self, name: Name) -> bool:
        return self._kept.get(name[0], (None,))[0] == name[1]

    def load(self, name: Name) -> Future[Content]:
        found: Future[Content] = Future()
        found.set_result(self._kept[name[0]][1] if self.lookup(name) else None)
        if self.lookup(name):
            self._kept.move_to_end(name[0])
        return found

    def forget(self) -> None:
        self._kept.clear()
        self.held_bytes = 0

    def close(self) -> None:
        self.forget()


class _Wait:
    """What has been asked of the tiers for one row, and the piece that is on its way."""

    __slots__ = ("asked", "began", "piece")

    def __init__(self) -> None:
        self.asked: set[bytes] = set()  # each block once, so that two rows cannot drive each other's out for ever
        self.piece: list[tuple[Name, Tier, Future[Content]]] = []
        self.began = 0.0


class Tiers:
    """The tiers of one pool, nearest first. It watches what the pool publishes and forgets.

    `queries` and `hits` count prompt tokens that the pool did not have: looked up here, and found. `found` and
    `loaded_bytes` count by tier what was put into the pool, for resumed requests too.
    """

    def __init__(
        self,
        pool: BlockPool,
        contents: Contents,
        tiers: Sequence[Tier],
        *,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.contents, self.tiers = pool, contents, tuple(tiers)
        self.patience, self.clock = patience, clock
        self.queries = 0
        self.hits = 0
        self.found = dict.fromkeys((tier.name for tier in self.tiers), 0)
        self._late: dict[str, Future[Content]] = {}  # of each tier that was too slow, what it is still about
        self._waits: dict[int, _Wait] = {}  # by serial
        self._fresh: dict[int, Name] = {}
        self._leaving: dict[int, Name] = {}
        pool.watcher = self

    # ------------------------------------------------------------------------------------ out of the pool
    def published(self, block: int, name: Name) -> None:
        """A block can be found in the pool from now on, or was found just now."""
        self._fresh[block] = name

    def leaving(self, block: int, name: Name) -> None:
        """The pool forgets a block, whose bytes are there until the next step."""
        self._fresh.pop(block, None)
        self._leaving[block] = name

    @property
    def behind(self) -> bool:
        """Whether blocks that were published wait for room in a tier's queue; they are safe in the pool meanwhile."""
        return bool(self._fresh)

    def flush(self) -> None:
        """Hand on what was published and forgotten; to be called before its blocks are written to."""
        leaving, self._leaving = self._leaving, {}
        self._hand_on(leaving, True)
        while self._fresh and not any(tier.full for tier in self.tiers):
            some = dict(islice(self._fresh.items(), AT_ONCE))
            for block in some:
                del self._fresh[block]
            self._hand_on({block: name for block, name in some.items() if self.pool.name_of(block) == name}, False)

    def _hand_on(self, blocks: dict[int, Name], leaving: bool) -> None:
        wanted = [
            (block, name, takers)
            for block, name in blocks.items()
            if (takers := [tier for tier in self.tiers if tier.wants(name, leaving)])
        ]
        contents = self.contents.save([block for block, *_ in wanted]) if wanted else []
        for (_, name, takers), content in zip(wanted, contents, strict=True):
            for tier in takers:
                tier.store(name, content)

    # ------------------------------------------------------------------------------------ into the pool
    @property
    def loading(self) -> bool:
        """Whether any request waits for a tier."""
        return any(each.piece for each in self._waits.values())

    def arrived(self, row: Row, found: list[int]) -> list[int] | None:
        """The cached blocks that a row can start on, of which the pool has `found`; None while more are on their way.

        The pool must have room for the row besides.
        """
        waiting = self._waits.setdefault(row.serial, _Wait())
        while True:
            if waiting.piece:
                if not self._over(waiting):
                    return None
                found = self._land(row, waiting, found)
            staged = sum(len(each.piece) for each in self._waits.values()) * self.contents.nbytes
            if not self._ask(row, waiting, len(found), staged):
                return found if staged < STAGED_BYTES else None

    def _ask(self, row: Row, waiting: _Wait, place: int, staged: int) -> bool:
        """Begin to load what the tiers have of a row's chain from `place` on; False when that is nothing new."""
        if staged >= STAGED_BYTES:
            return False
        most = max(1, PIECE_BYTES // self.contents.nbytes)
        for name in row.chain[place : min(row.readable, place + most)]:
            tier = self._holder(name) if name[0] not in waiting.asked else None
            if tier is None:
                break
            waiting.asked.add(name[0])
            waiting.piece.append((name, tier, tier.load(name)))
        waiting.began = self.clock()
        return bool(waiting.piece)

    def _holder(self, name: Name) -> Tier | None:
        for tier in self.tiers:
            late = self._late.get(tier.name)
            if (late is None or late.done()) and tier.lookup(name):
                return tier
        return None

    def _over(self, waiting: _Wait) -> bool:
        """Whether a piece has come, or nobody waits for it any longer."""
        pending = next(((tier, future) for _, tier, future in waiting.piece if not future.done()), None)
        if pending is None:
            return True
        if self.clock() - waiting.began < self.patience:
            return False
        tier, future = pending
        tier.errors += 1
        self._late[tier.name] = future
        return True

    def _land(self, row: Row, waiting: _Wait, found: list[int]) -> list[int]:
        """Put what came of a piece into the pool, behind the blocks that it has; those that it has then."""
        came: list[tuple[Name, Tier, memoryview]] = []
        piece = {name: (tier, future.result()) for name, tier, future in waiting.piece if future.done()}
        for name in row.chain[len(found) : row.readable]:  # the pool may have more than when they were asked for
            tier, content = piece.get(name, (None, None))
            if tier is None or content is None:
                break
            came.append((name, tier, content))
        waiting.piece = []
        if came:
            pool = self.pool
            pool.acquire(found)
            blocks = pool.allocate(len(came))
            self.flush()
            self.contents.restore(blocks, [content for *_, content in came])
            for block, (name, tier, _) in zip(blocks, came, strict=True):
                pool.publish(block, name)
                self.found[tier.name] += pool.block_size
                row.request.tiers[tier.name] = row.request.tiers.get(tier.name, 0) + pool.block_size
            pool.release([*found, *blocks])
            row.landed += len(came) * pool.block_size
        return self.pool.find(row.chain[: row.readable])

    def started(self, row: Row) -> None:
        """A row runs on what was found for it."""
        self._waits.pop(row.serial, None)
        row.landed = min(row.landed, row.found)  # the pool may have forgotten some already
        for block, name in zip(row.blocks, row.chain):
            self.published(block, name)
        if row.request.preemptions == 0 and row.scored:
            self.queries += row.request.num_tokens - row.found + row.landed
            self.hits += row.landed

    def holds(self, row: Row) -> bool:
        """Whether a row waits for what a tier is asked for."""
        waiting = self._waits.get(row.serial)
        return waiting is not None and bool(waiting.piece)

    def left(self, row: Row) -> None:
        """A row needs nothing any more; what is being read for it comes to nobody."""
        self._waits.pop(row.serial, None)

    def wait(self, seconds: float) -> None:
        """Wait for what is on its way to some request, or for room in a queue, at most so long: there is nothing else
        to do."""
        pieces = [each.piece for each in self._waits.values() if each.piece]
        if pieces:
            wait([future for *_, future in pieces[0]], seconds)
        elif self.behind:
            time.sleep(min(seconds, 0.005))

    # ------------------------------------------------------------------------------------ the rest
    def forget(self) -> None:
        """The weights have changed: nothing that older ones computed is found."""
        self._waits.clear()
        self._fresh.clear()
        self._leaving.clear()
        for tier in self.tiers:
            tier.forget()

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()

    def counters(self) -> dict[str, dict[str, int]]:
        """By tier: tokens found, bytes stored, loaded and held, errors."""
        per_token = self.contents.nbytes // self.pool.block_size
        return {
            tier.name: {
                "hits": self.found[tier.name],
                "stored_bytes": tier.stored_bytes,
                "loaded_bytes": self.found[tier.name] * per_token,
                "held_bytes": tier.held_bytes,
                "errors": tier.errors,
            }
            for tier in self.tiers
        }

    def check_integrity(self, waiting: Iterable[Row]) -> None:
        """Raises StateError when something is loaded for a request that does not wait; always a bug in Twofold."""
        if not self._waits.keys() <= {row.serial for row in waiting}:
            raise StateError("blocks are loaded for a request that does not wait")
