"""AdapterPool: which adapters there are, which of them are in memory, and which have a slot. Plain Python.

    known ──read──▶ in memory ──put──▶ in a slot ◀──take/give── running requests
      ▲  (a path)    │  ▲               │
      └───evicted────┘  └────evicted────┘       least recently used first; never one that a running request has

An adapter is known by its key, `name@digest` of its numbers: a request keeps the key that its name had when it came, so
other weights under the same name are another adapter, to the requests that run and to the prefix cache.

A request without a slot waits and is passed over. So that it does not wait for ever, the slot with the fewest running
requests is drained for it: whoever stands behind it in the queue cannot be given that slot. That is S-LoRA's setting
(Sheng et al. 2023) with vLLM's slots.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..core import CapacityError, CheckpointError, RequestError, StateError, TwofoldError
from ..core.errors import unknown

if TYPE_CHECKING:
    from .row import Row

NAME = 128
MOST = 1024
"""Adapters that may be known at once."""


class Held(Protocol):
    """An adapter in memory."""

    @property
    def nbytes(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def base(self) -> str: ...


class Shelf(Protocol):
    """Who reads adapters and fills slots: `models.adapters.Slots`."""

    @property
    def count(self) -> int: ...
    def read(self, path: str | Path, most_bytes: int) -> Held: ...
    def put(self, slot: int, adapter: Any) -> None: ...


class Known(msgspec.Struct, frozen=True):
    """What is told of an adapter."""

    name: str
    key: str
    path: str
    rank: int
    nbytes: int
    base: str


class _Entry:
    __slots__ = ("held", "known", "retired", "running", "slot", "users")

    def __init__(self, known: Known) -> None:
        self.known = known
        self.held: Held | None = None
        self.slot: int | None = None
        self.users = 0  # requests that have it and have not ended
        self.running = 0  # of those, how many run now
        self.retired = False


class AdapterPool:
    """`shelf.count` slots, at most `most_bytes` and `most_held` adapters in memory; without a shelf, none at all."""

    def __init__(self, shelf: Shelf | None = None, *, most_bytes: int = 0, most_held: int | None = None) -> None:
        self._shelf = shelf
        self.most_bytes, self.most_held = most_bytes, most_held
        self.reads = 0
        self._names: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        self._held: OrderedDict[str, None] = OrderedDict()  # keys in memory, least recently used first
        self._slots: list[str | None] = [None] * (shelf.count if shelf else 0)
        self._draining: set[int] = set()

    @property
    def shelf(self) -> Shelf:
        if self._shelf is None:
            raise RequestError("this engine serves no adapters: start it with --enable-lora", "model")
        return self._shelf

    # ------------------------------------------------------------------------------------ known
    def load(
        self, name: str, path: str, key: str | None = None, *, replace: bool = False, listed: bool = True
    ) -> Known:
        """Read an adapter and know it by `name` from now on; with `key`, only if it still is that one.

        One that is not `listed` is known by its key alone, for requests that came when it was.

        Raises:
            RequestError: a name that cannot be, or is taken by another adapter (unless `replace`).
            CheckpointError: no adapter for this model, or not the one of that key any more.
            CapacityError: it, or one more, is more than was provided for.
        """
        if not (0 < len(name) <= NAME and name.isprintable() and "@" not in name and name.strip() == name):
            raise RequestError(f"an adapter's name has 1 to {NAME} printable characters and no '@': {name!r:.150}")
        if len(self._names) >= MOST:
            raise CapacityError(f"{MOST} adapters are known already: unload some")
        if listed and name in self._names and not replace:
            raise RequestError(f"there is an adapter '{name}' already: unload it first, or ask to replace it")
        held = self.shelf.read(path, self.most_bytes)
        found = f"{name}@{held.digest}"
        if key is not None and key != found:
            raise CheckpointError(f"{path} is not what was loaded as '{name}' before: load it again")
        before = self._names.get(name)
        entry = self._entries.get(found)
        if entry is None:
            known = Known(name, found, path, held.rank, held.nbytes, held.base)
            entry = self._entries[found] = _Entry(known)
        if not listed:
            entry.retired = found not in self._names.values()
            return entry.known
        entry.retired = False
        if entry.held is None and self._room(held.nbytes):
            self._keep(entry, held)
        self._names[name] = found
        if before is not None and before != found:
            self._retire(before)
        return entry.known

    def unload(self, key: str) -> None:
        """Know an adapter by its name no more; requests that have its key go on, and its memory is free after them.

        Raises:
            RequestError: no such adapter.
        """
        self._retire(self.key_of(key))

    def _retire(self, key: str) -> None:
        entry = self._entries[key]
        entry.retired = True
        if self._names.get(entry.known.name) == key:
            del self._names[entry.known.name]
        self._let_go(entry)

    def key_of(self, given: str) -> str:
        """The key of an adapter that is known by this key or this name.

        Raises:
            RequestError: nobody is.
        """
        if given in self._entries:
            return given
        if given not in self._names:
            raise RequestError(unknown("adapter", given.partition("@")[0], self._names if self.shelf else ()), "model")
        return self._names[given]

    @property
    def listed(self) -> list[Known]:
        """What may be asked for, in order of loading."""
        return [self._entries[key].known for key in self._names.values()]

    # ------------------------------------------------------------------------------------ requests
    def enter(self, given: str) -> str:
        """One more request has this adapter, if any; its key.

        Raises:
            RequestError: nobody knows it.
        """
        if not given:
            return ""
        key = self.key_of(given)
        self._entries[key].users += 1
        return key

    def leave(self, key: str) -> None:
        """One request less."""
        if key:
            entry = self._entries[key]
            entry.users -= 1
            self._let_go(entry)

    def begin(self) -> None:
        """Before the waiting requests are asked, in their order, whether they are `reachable`."""
        self._draining.clear()

    def reachable(self, key: str) -> bool:
        """Whether `take` would give a slot now. If not, one is kept from everybody who asks after this."""
        if not key:
            return True
        entry = self._entries[key]
        if entry.slot is not None:
            return entry.slot not in self._draining
        if self._free_slot() is not None and (entry.held is not None or self._could_hold(entry.known.nbytes)):
            return True
        if self._free_slot() is not None:  # memory is what lacks: what holds it must end first
            self._draining.update(range(len(self._slots)))
        left = [slot for slot in range(len(self._slots)) if slot not in self._draining]
        if left:
            self._draining.add(min(left, key=lambda slot: (self._in(slot).running, slot)))
        return False

    def take(self, key: str) -> int:
        """A slot for a request that starts to run, from 1 on: after `reachable` said so.

        Raises:
            CheckpointError: it was evicted, and what lies at its path now is another.
        """
        entry = self._entries[key]
        if entry.slot is None:
            if entry.held is None:
                self._read_again(entry)
            slot = self._free_slot()
            if slot is None:
                raise StateError(f"no slot is free for adapter {key}")
            self._empty(slot)
            self.shelf.put(slot, entry.held)
            self._slots[slot], entry.slot = key, slot
        entry.running += 1
        self._held.move_to_end(key)
        return entry.slot + 1

    def give(self, key: str) -> None:
        """A request that ran with this adapter has stopped to."""
        entry = self._entries[key]
        entry.running -= 1
        self._held.move_to_end(key)

    def seat(self, row: Row) -> str | None:
        """Give a row that starts to run its adapter's slot, if it has one; or say why that adapter cannot be had."""
        if row.request.adapter:
            try:
                row.slot = self.take(row.request.adapter)
            except TwofoldError as error:
                return str(error)
        return None

    def unseat(self, row: Row) -> None:
        """Take the slot of a row that no longer runs."""
        if row.slot:
            self.give(row.request.adapter)
            row.slot = 0

    # ------------------------------------------------------------------------------------ memory and slots
    def _in(self, slot: int) -> _Entry:
        key = self._slots[slot]
        assert key is not None, "only slots that are taken are looked into"
        return self._entries[key]

    def _free_slot(self) -> int | None:
        """An empty slot, or the one that was left unused for longest."""
        if None in self._slots:
            return self._slots.index(None)
        idle = [slot for slot in range(len(self._slots)) if not self._in(slot).running]
        ages = {key: age for age, key in enumerate(self._held)}
        return min(idle, key=lambda slot: ages[str(self._slots[slot])], default=None)

    def _empty(self, slot: int) -> None:
        if self._slots[slot] is not None:
            self._in(slot).slot = None
            self._slots[slot] = None
            self.shelf.put(slot, None)

    def _read_again(self, entry: _Entry) -> None:
        known = entry.known
        held = self.shelf.read(known.path, self.most_bytes)
        if held.digest != known.key.rpartition("@")[2]:
            raise CheckpointError(f"{known.path} has changed since it was loaded as '{known.name}': load it again")
        if not self._room(known.nbytes):
            raise StateError(f"no memory is free for adapter {known.key}")
        self._keep(entry, held)

    def _keep(self, entry: _Entry, held: Held) -> None:
        entry.held = held
        self._held[entry.known.key] = None
        self.reads += 1

    def _could_hold(self, nbytes: int) -> bool:
        busy = [self._entries[key] for key in self._held if self._entries[key].running]
        few = self.most_held is None or len(busy) < self.most_held
        return few and sum(entry.known.nbytes for entry in busy) + nbytes <= self.most_bytes

    def _room(self, nbytes: int) -> bool:
        """Make room for so much, if letting go of what nobody runs with is enough."""
        if not self._could_hold(nbytes):
            return False
        for key in [key for key in self._held if not self._entries[key].running]:
            few = self.most_held is None or len(self._held) < self.most_held
            if few and self.nbytes + nbytes <= self.most_bytes:
                break
            self._evict(self._entries[key])
        return True

    def _evict(self, entry: _Entry) -> None:
        if entry.slot is not None:
            self._empty(entry.slot)
        entry.held = None
        self._held.pop(entry.known.key, None)

    def _let_go(self, entry: _Entry) -> None:
        """Free the memory of one that nobody has and nobody can ask for; its key stays known for stragglers."""
        if entry.retired and not entry.users:
            self._evict(entry)
            old = [key for key, each in self._entries.items() if each.retired and not each.users]
            for key in old[:-MOST]:
                del self._entries[key]

    @property
    def nbytes(self) -> int:
        """Bytes of adapters in memory."""
        return sum(self._entries[key].known.nbytes for key in self._held)

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the adapters that running requests have."""
        return tuple(sorted({entry.known.name for entry in self._entries.values() if entry.running}))

    @property
    def waiting(self) -> tuple[str, ...]:
        """Names of the adapters that waiting requests have."""
        return tuple(sorted({entry.known.name for entry in self._entries.values() if entry.users > entry.running}))

    # ------------------------------------------------------------------------------------ truth
    def check_integrity(self, running: Iterable[Row], live: Iterable[Row]) -> None:
        """Check slots, memory and counts against running and all live requests.

        Raises:
            StateError: saying what does not add up; always a bug in Twofold.
        """
        seated, users = (Counter(row.request.adapter for row in rows) for rows in (running, live))
        for key, entry in self._entries.items():
            if (entry.running, entry.users) != (seated[key], users[key]):
                raise StateError(f"adapter {key}: {entry.running} running of {entry.users} on record")
            if entry.running and (entry.slot is None or entry.held is None):
                raise StateError(f"adapter {key} runs without a slot")
            if entry.slot is not None and self._slots[entry.slot] != key:
                raise StateError(f"adapter {key} is not in its slot {entry.slot}")
            if (entry.held is not None) != (key in self._held):
                raise StateError(f"adapter {key} is in memory, or not")
            if entry.retired and not entry.users and entry.held is not None:
                raise StateError(f"adapter {key} is nobody's and is still in memory")
        if self.nbytes > self.most_bytes or len(self._held) > (self.most_held or MOST):
            raise StateError(f"{self.nbytes} bytes of adapters are in memory, at most {self.most_bytes} may be")
        for slot, taken in enumerate(self._slots):
            if taken is not None and self._entries[taken].slot != slot:
                raise StateError(f"slot {slot} is not that of adapter {taken}")
