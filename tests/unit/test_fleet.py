"""Which models are in memory: room by number and by memory, the idle first, the busy never, nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.core import CapacityError, CheckpointError
from twofold.serve import fleet as fleets
from twofold.serve.client import Phase
from twofold.serve.config import ServeConfig
from twofold.serve.errors import HttpError
from twofold.serve.fleet import Fleet, Hold, Member


class Memory:
    """Room for so many models, or CapacityError."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: set[str] = set()
        self.log: list[str] = []


class StubClient:
    """What a fleet sees of an EngineClient."""

    def __init__(self, name: str, memory: Memory, broken: Exception | None = None) -> None:
        self.name, self.memory, self.broken = name, memory, broken
        self.phase = Phase.STARTING
        self.live: dict[str, Any] = {}
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        self.phase = Phase.STARTING
        self.first_ready = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.01, self._loaded)

    def _loaded(self) -> None:
        error = self.broken
        if error is None and len(self.memory.held) >= self.memory.most:
            error = CapacityError("too little memory")
        if error is not None:
            self.first_ready.set_exception(error)
            return
        self.memory.held.add(self.name)
        self.memory.log.append(f"+{self.name}")
        self.phase = Phase.READY
        self.first_ready.set_result(None)

    async def stop(self) -> None:
        await asyncio.sleep(0.005)
        assert not self.live
        if self.name in self.memory.held:
            self.memory.held.remove(self.name)
            self.memory.log.append(f"-{self.name}")
        self.phase = Phase.STOPPED


Test = Callable[[Fleet, Memory], Awaitable[None]]


def with_fleet(test: Test, *, names: str = "abc", memory: int = 9, broken: str = "", **config: Any) -> None:
    async def run() -> None:
        held = Memory(memory)
        error = CheckpointError("damaged")
        clients = [StubClient(name, held, error if name in broken else None) for name in names]
        members = [Member(SimpleNamespace(client=c, config=SimpleNamespace(name=c.name)), None) for c in clients]  # type: ignore[arg-type]
        fleet = Fleet(members, ServeConfig(model=Path("."), **config))
        fleet.start()
        try:
            await asyncio.wait_for(test(fleet, held), 10)
        finally:
            await fleet.stop()

    asyncio.run(run())


async def use(fleet: Fleet, place: int, seconds: float = 0.0) -> None:
    hold = Hold(fleet, fleet.members[place])
    try:
        await hold.take()
        assert fleet.members[place].resident
        await asyncio.sleep(seconds)
        assert fleet.members[place].resident, "in use and swapped out"
    finally:
        hold.release()


def test_models_come_in_when_they_are_used_and_stay_while_there_is_room() -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        for place in (0, 1, 0, 2, 1):
            await use(fleet, place)
        assert memory.log == ["+a", "+b", "+c"]

    with_fleet(test)


@pytest.mark.parametrize("room", [{"max_resident": 2}, {"memory": 2}], ids=["by number", "by memory"])
def test_the_one_used_longest_ago_makes_room(room: dict[str, Any]) -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        for place in (0, 1, 0, 2, 1):
            await use(fleet, place)
        assert memory.log == ["+a", "+b", "-b", "+c", "-a", "+b"]

    with_fleet(test, **room)


def test_who_is_in_use_is_never_swapped_out() -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        await asyncio.gather(*(use(fleet, place % 3, 0.05) for place in range(30)))
        assert sorted(memory.held) == sorted(set(memory.held)) and len(memory.held) == 1
        assert {entry[1] for entry in memory.log} == set("abc")

    with_fleet(test, max_resident=1)


def test_a_sequence_under_way_is_a_use() -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        await use(fleet, 0)
        live = fleet.members[0].client.live
        live["r"] = None  # type: ignore[assignment]
        waiting = asyncio.ensure_future(use(fleet, 1))
        await asyncio.sleep(0.1)
        assert not waiting.done() and memory.held == {"a"}
        live.clear()
        await waiting
        assert memory.held == {"b"}

    with_fleet(test, max_resident=1)


def test_nobody_waits_for_ever_behind_one_that_is_always_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        done = asyncio.Event()

        async def crowd() -> None:
            while not done.is_set():
                await use(fleet, 0, 0.02)

        crowds = [asyncio.ensure_future(crowd()) for _ in range(5)]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(use(fleet, 1), 3)
        done.set()
        await asyncio.gather(*crowds)

    monkeypatch.setattr(fleets, "PATIENCE", 0.1)
    with_fleet(test, max_resident=1)


def test_one_that_cannot_be_loaded_fails_alone_and_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        with pytest.raises(HttpError, match="damaged") as caught:
            await use(fleet, 1)
        assert caught.value.status == 503 and caught.value.retry_after
        await use(fleet, 0)
        await use(fleet, 2)
        fleet.members[1].client.broken = None  # type: ignore[attr-defined]
        with pytest.raises(HttpError):
            await use(fleet, 1)
        monkeypatch.setattr(fleets, "AGAIN", 0.0)
        await use(fleet, 1)

    with_fleet(test, broken="b")


def test_one_that_fits_nowhere_says_so() -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        with pytest.raises(HttpError, match="too little memory"):
            await use(fleet, 0)

    with_fleet(test, memory=0)


def test_the_idle_leave_after_a_while() -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        await use(fleet, 0)
        while memory.held:
            await asyncio.sleep(0.01)
        await use(fleet, 0)
        assert memory.log == ["+a", "-a", "+a"]

    with_fleet(test, idle_seconds=0.1)


def test_a_client_that_leaves_does_not_stop_the_loading() -> None:
    async def test(fleet: Fleet, memory: Memory) -> None:
        waiting = asyncio.ensure_future(use(fleet, 1))
        await asyncio.sleep(0.002)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert "b" in memory.held and not fleet.members[1].users

    with_fleet(test)
