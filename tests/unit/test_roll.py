"""Ranks of one attempt find each other, whatever earlier attempts left in the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from twofold.core import WorkerError
from twofold.parallel.roll import LEAD, call_roll


class Memory:
    """A store in this process."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self.lock:
            self.kept[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.kept[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)


def meet(store: Memory, world: int, order: list[int]) -> set[str]:
    with ThreadPoolExecutor(world) as pool:
        asked = [pool.submit(call_roll, store, rank, world, 10.0) for rank in order]
        return {one.result() for one in asked}


def test_every_attempt_has_one_name_of_its_own() -> None:
    store, names = Memory(), set()
    for world, order in [(3, [0, 1, 2]), (3, [2, 1, 0]), (2, [1, 0]), (4, [3, 0, 2, 1])]:
        found = meet(store, world, order)
        assert len(found) == 1 and not found & names
        names |= found


def test_a_dead_lead_that_had_heard_all_is_not_believed() -> None:
    store = Memory()
    meet(store, 2, [0, 1])
    dead = store.get(LEAD).decode()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(call_roll, store, 1, 2, 10.0)  # hears the dead first
        while store.get(f"roll/{dead}/here/1") in store.get(f"roll/{dead}/all"):
            pass
        assert call_roll(store, 0, 2, 10.0) == late.result() != dead


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(WorkerError, match=r"no word of rank 1, 2; parallel\.timeout"):
        call_roll(Memory(), 0, 3, 0.1)
    with pytest.raises(WorkerError, match="rank 0 calls nobody"):
        call_roll(Memory(), 1, 2, 0.1)
