"""Roll call: the ranks of one attempt find each other in a store where earlier attempts left their names.

torchrun keeps one store for all attempts, and says nothing by which ranks could tell one from the next: its count of
restarts stays as it is when machines come and go. So rank 0 draws a name, the others answer to it with a name of their
own, and it says whom it has heard. Who is not among those has heard a rank 0 that is dead, and listens again.

    rank 0    lead = a7   ............... here/1 = 3c, here/2 = e9 ──> a7/all = {1: 3c, 2: e9}
    rank 1    reads lead  ─> a7/here/1 = 3c ......................... 3c is in a7/all: this attempt is a7
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Protocol

from ..core import WorkerError

POLL = 0.02
LEAD = "roll/lead"


class Store(Protocol):
    """What is asked of torch's key-value stores."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


def call_roll(store: Store, rank: int, world: int, timeout: float) -> str:
    """A name that all `world` ranks of this attempt have, and none of another attempt.

    Raises:
        WorkerError: some did not come within `timeout` seconds; they are named.
    """
    own, ends = secrets.token_hex(8), time.monotonic() + timeout
    if rank == 0:
        keys = {other: f"roll/{own}/here/{other}" for other in range(1, world)}
        store.set(LEAD, own)
        _until(lambda: store.check(list(keys.values())), ends, lambda: _missing(store, keys))
        store.set(f"roll/{own}/all", json.dumps([own, *(store.get(key).decode() for key in keys.values())]))
        return own
    led: str | None = None

    def heard() -> bool:
        nonlocal led
        now = store.get(LEAD).decode() if store.check([LEAD]) else None
        if now is not None and now != led:
            led = now
            store.set(f"roll/{led}/here/{rank}", own)
        everyone = f"roll/{led}/all"
        return led is not None and store.check([everyone]) and own in json.loads(store.get(everyone))

    _until(heard, ends, lambda: "rank 0 calls nobody")
    assert led is not None
    return led


def _until(done: Callable[[], bool], ends: float, why: Callable[[], str]) -> None:
    while not done():
        if time.monotonic() > ends:
            raise WorkerError(f"the ranks did not meet: {why()}; parallel.timeout says how long they wait")
        time.sleep(POLL)


def _missing(store: Store, keys: dict[int, str]) -> str:
    absent = [str(rank) for rank, key in keys.items() if not store.check([key])]
    return f"no word of rank {', '.join(absent)}"
