"""BlockPool: who holds which block of the KV cache, and which blocks can be found again by what they hold.

A block is `block_size` consecutive tokens of one sequence, over all layers. It is in exactly one of three places:

              allocate                    publish (full, computed)
    free ────────────────▶ used (1 or more holders) ·····▶ also in the index
     ▲                      │      ▲
     │    release, unnamed  │      │ acquire (a prefix hit)
     └──────────────────────┤      │
     ▲                      ▼      │
     └─────────────────── cached (no holder, named)
        evicted, least recently used first

A full block's name is a hash chain: blake2b-128 of (parent's name, its tokens as int32), the first parent being a hash
of (salt, weights version, adapter). A hit also compares the tokens, so a collision of names can do no harm inside a
block. The idea is vLLM's prefix cache; the comparison of tokens is nano-vllm's.

Plain Python: no device, no socket.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

from ..core import ConfigError, StateError

Name = tuple[bytes, bytes]
"""A full block's digest, and the bytes of the tokens it holds."""


def root_digest(salt: str, version: int, adapter: str) -> bytes:
    """The parent of every first block: tenants, weights and adapters never share a chain."""
    hashed = blake2b(digest_size=16)
    for part in (salt, str(version), adapter):
        raw = part.encode("utf-8", "surrogatepass")
        hashed.update(len(raw).to_bytes(8, "little") + raw)
    return hashed.digest()


def block_name(parent: bytes, tokens: Sequence[int]) -> Name:
    """Name a full block of `tokens` that follows the block whose digest is `parent`."""
    content = array("i", tokens).tobytes()
    return blake2b(parent + content, digest_size=16).digest(), content


class Watcher(Protocol):
    """Who is told what happens to names."""

    def published(self, block: int, name: Name) -> None: ...
    def leaving(self, block: int, name: Name) -> None: ...


class BlockPool:
    """`num_blocks` blocks with reference counts, least-recently-used eviction and an index of full blocks by name.

    `queries` and `hits` count prompt tokens looked up and found, as vLLM's prefix_cache metrics do.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"a pool needs blocks: {num_blocks} blocks of {block_size} tokens were asked for")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.queries = 0
        self.hits = 0
        self.watcher: Watcher | None = None
        self._holders = [0] * num_blocks
        self._named: list[Name | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the last freed is reused first, warm in cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Blocks that can be had now: free ones, and cached ones by forgetting what they hold."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that can still be found."""
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.num_blocks - self.available

    @property
    def usage(self) -> float:
        """The share of blocks that somebody holds, 0 to 1."""
        return self.used / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    # ------------------------------------------------------------------------------------ holding
    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of unknown content; the caller has checked `available`."""
        if count > self.available:
            raise StateError(f"{count} blocks were taken while {self.available} are available")
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def acquire(self, blocks: Iterable[int]) -> None:
        """Become one more holder of blocks that `find` returned."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a block table, tail first, so that the heads of chains outlive their tails."""
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise StateError(f"block {block} was released more often than held")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._named[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        name = self._named[block]
        if self.watcher is not None and name is not None:
            self.watcher.leaving(block, name)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        name = self._named[block]
        if name is not None:
            del self._index[name[0]]
            self._named[block] = None

    # ------------------------------------------------------------------------------------ finding
    def find(self, names: Iterable[Name]) -> list[int]:
        """The blocks of the longest known prefix of a chain; nobody's count changes."""
        found = []
        for name in names:
            block = self._index.get(name[0])
            if block is None or self._named[block] != name:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds; acquiring those lowers `available`."""
        return sum(self._holders[block] == 0 for block in blocks)

    def holders(self, block: int) -> int:
        """How many block tables hold a block."""
        return self._holders[block]

    def name_of(self, block: int) -> Name | None:
        """What a block can be found by, if it can."""
        return self._named[block]

    def publish(self, block: int, name: Name) -> None:
        """Name a full block whose keys and values are in place. A second block of the same name stays nameless."""
        if self.caching and self._named[block] is None and name[0] not in self._index:
            self._index[name[0]] = block
            self._named[block] = name
            if self.watcher is not None:
                self.watcher.published(block, name)

    def forget_all(self) -> None:
        """Drop the index: cached blocks become free, held blocks stay held and nameless."""
        for block in range(self.num_blocks):
            self._forget(block)
        self._free.extend(reversed(self._cached))
        self._cached.clear()

    # ------------------------------------------------------------------------------------ truth
    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check that the three places partition the pool and that the counts are those of the block tables.

        Raises:
            StateError: saying what does not add up; always a bug in Twofold.
        """
        counted = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            if counted[block] != self._holders[block]:
                raise StateError(f"block {block}: {self._holders[block]} holders on record, {counted[block]} in tables")
        free, cached = set(self._free), set(self._cached)
        held = {block for block in range(self.num_blocks) if self._holders[block]}
        if len(self._free) != len(free) or free & cached or held & (free | cached):
            raise StateError("a block is in two places at once")
        if len(free) + len(cached) + len(held) != self.num_blocks:
            raise StateError(f"{len(free)} free + {len(cached)} cached + {len(held)} used is not {self.num_blocks}")
        if any(self._named[block] for block in free) or not all(self._named[block] for block in cached):
            raise StateError("a free block is named, or a cached one is not")
        named = {name[0]: block for block, name in enumerate(self._named) if name}
        if named != self._index:
            raise StateError("the index and the blocks' names differ")
