"""The front's end of the model's process: deaths, silence, poison, limits. The process is real, the model is a hash."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine

from twofold.core import CapacityError, CheckpointError, RequestError, WorkerError
from twofold.engine.request import Output, Request, State
from twofold.engine.sampling import SamplingParams
from twofold.serve import wire
from twofold.serve.client import EngineClient, Phase
from twofold.serve.config import Limits, ServeConfig, Watch

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


def with_client(
    test: Callable[[EngineClient], Awaitable[None]],
    *,
    ready: bool = True,
    limits: Limits | None = None,
    watch: Watch | None = None,
    **engine: Any,
) -> None:
    async def run() -> None:
        config = ServeConfig(model=Path("."), limits=limits or Limits(), watch=watch or Watch(backoff=0.05))
        client = EngineClient(config, wire.Start("", engine), COMMAND)
        client.start()
        try:
            if ready:
                await asyncio.wait_for(client.first_ready, 20)
            await asyncio.wait_for(test(client), 30)
        finally:
            await client.stop()

    asyncio.run(run())


def request(name: str, *, tokens: int = 20, prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> Request:
    return Request(id=name, prompt_ids=prompt, params=SamplingParams(max_tokens=tokens), seed=7, **fields)


class Heard:
    """A sink that keeps what it hears and knows when a number of requests has ended."""

    def __init__(self, expected: int = 1) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Output] = {}
        self.expected = expected
        self.done = asyncio.Event()

    def __call__(self, output: Output) -> None:
        self.tokens.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
        if output.finish is not None:
            assert output.request_id not in self.ends
            self.ends[output.request_id] = output
            if len(self.ends) == self.expected:
                self.done.set()

    async def until(self, count: int) -> None:
        while min(map(len, self.tokens.values()), default=0) < count:
            await asyncio.sleep(0.005)

    async def more(self) -> None:
        """Until everyone has said something new, or has ended."""
        before = {name: len(said) for name, said in self.tokens.items()}
        while any(len(said) == before.get(name, 0) for name, said in self.tokens.items() if name not in self.ends):
            await asyncio.sleep(0.005)


def undisturbed(asked: Request) -> list[int]:
    """What the hash says, without any process."""
    engine = FakeEngine({"seconds": 0.0})
    mine = Request(id="x", prompt_ids=asked.prompt_ids, params=asked.params, seed=asked.seed, sample=asked.sample)
    engine.submit(mine)
    while engine.has_work:
        engine.step()
    return mine.output_ids


def test_the_step_that_begins_a_request_is_no_part_of_its_wait() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard()
        client.submit([request("r", tokens=1)], heard)
        fate = client.live["r"].fate
        began = time.monotonic()
        await heard.done.wait()
        assert fate.started is not None and time.monotonic() - fate.started >= 0.2 > fate.started - began

    with_client(test, seconds=0.2)


def test_outputs_arrive_once_each_and_the_queue_empties() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard(3)
        asked = [request(f"r{i}", prompt=(i + 1, 5)) for i in range(3)]
        client.submit(asked, heard)
        await heard.done.wait()
        assert heard.tokens == {r.id: undisturbed(r) for r in asked}
        assert all(output.finish is State.LENGTH for output in heard.ends.values())
        assert not client.live and client.live_tokens == 0
        while client.stats.blocks_used:
            await asyncio.sleep(0.01)

    with_client(test)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_replaced_and_every_request_goes_on(number: int) -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard(8)
        asked = [request(f"r{i}", tokens=60, prompt=(i + 1,)) for i in range(8)]
        client.submit(asked, heard)
        await heard.until(12)
        for _ in range(3):  # more deaths than `suspects`: progress between them keeps everyone innocent
            await heard.more()
            assert client.pid is not None
            old = client.pid
            os.kill(old, number)
            while client.pid == old or not client.ready:
                assert client.phase is not Phase.FAILED
                await asyncio.sleep(0.01)
        await heard.done.wait()
        assert heard.tokens == {r.id: undisturbed(r) for r in asked}
        assert client.restarts == 3

    with_client(test, seconds=0.01)


def test_a_stopped_process_is_not_ready_then_replaced() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard()
        asked = request("r", tokens=80)
        client.submit([asked], heard)
        await heard.until(5)
        assert client.pid is not None and client.ready
        old, began = client.pid, time.monotonic()
        os.kill(old, signal.SIGSTOP)
        while client.ready:
            await asyncio.sleep(0.02)
        assert time.monotonic() - began < 30
        await heard.done.wait()
        assert client.pid != old and client.ready
        assert heard.tokens["r"] == undisturbed(asked)

    with_client(test, seconds=0.01, watch=Watch(late=0.8, dead=1.6, backoff=0.05))


def test_a_step_that_never_ends_is_ended() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard()
        client.submit([request("r")], heard)
        await heard.done.wait()
        assert heard.ends["r"].finish is State.ERROR
        assert "died" in (heard.ends["r"].error or "")

    with_client(test, seconds=60.0, watch=Watch(step=0.4, backoff=0.05, suspects=2))


def test_the_request_that_kills_is_found_and_the_others_live() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard(4)
        good = [request(f"good{i}", tokens=40, prompt=(i + 1,)) for i in range(3)]
        client.submit([request("bad", prompt=(400,)), *good], heard)
        await heard.done.wait()
        assert heard.ends["bad"].finish is State.ERROR and heard.tokens["bad"] == []
        assert {r.id: heard.tokens[r.id] for r in good} == {r.id: undisturbed(r) for r in good}
        assert client.restarts == 3  # together, together, alone

    with_client(test, poison=400)


def test_it_gives_up_on_a_process_that_always_dies_and_says_so() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(WorkerError, match="exit code 3"):
            await client.first_ready
        assert client.phase is Phase.FAILED
        with pytest.raises(WorkerError, match="exit code 3"):
            client.submit([request("r")], Heard())
        assert client.restarts == 1

    with_client(test, ready=False, load_error="exit", watch=Watch(tries=2, backoff=0.01))


def test_what_cannot_be_loaded_is_not_tried_twice() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(CheckpointError, match="cannot be"):
            await client.first_ready
        assert client.restarts == 0

    with_client(test, ready=False, load_error="CheckpointError")


def test_requests_before_the_model_are_told_to_wait() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(WorkerError, match="loading"):
            client.submit([request("r")], Heard())

    with_client(test, ready=False)


def test_the_queue_is_bounded_in_sequences_and_tokens() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard(4)
        client.submit([request(f"r{i}", tokens=400) for i in range(4)], heard)
        with pytest.raises(CapacityError, match="4 of 4"):
            client.submit([request("r")], heard)
        with pytest.raises(RequestError, match="split"):
            client.submit([request(f"x{i}") for i in range(5)], heard)
        assert 1 <= client.retry_after <= 60
        client.abort(["r0", "r1", "unknown", "r0"])
        client.submit([request("s", prompt=tuple([1] * 50))], heard)
        with pytest.raises(CapacityError):
            client.submit([request("t", prompt=tuple([1] * 60))], heard)
        assert "t" not in client.live

    with_client(test, limits=Limits(queue_requests=4, queue_tokens=100), seconds=0.02)


def test_an_aborted_request_is_heard_no_more_and_frees_its_blocks() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard()
        client.submit([request("r", tokens=400)], heard)
        await heard.until(3)
        client.abort(["r"])
        count = len(heard.tokens["r"])
        while client.stats.blocks_used or client.stats.steps == 0:
            await asyncio.sleep(0.01)
        assert len(heard.tokens["r"]) == count and not heard.ends

    with_client(test)


def test_a_request_that_the_engine_refuses_fails_alone() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard(2)
        client.submit([request("long", prompt=(1,) * 600), request("short")], heard)
        await heard.done.wait()
        assert heard.ends["long"].finish is State.ERROR and "too long" in (heard.ends["long"].error or "")
        assert heard.ends["short"].finish is State.LENGTH

    with_client(test)


def test_a_deadline_holds_while_the_process_is_silent() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard()
        client.submit([request("r", tokens=400, deadline=time.monotonic() + 0.2)], heard)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await heard.done.wait()
        assert heard.ends["r"].finish is State.TIMEOUT

    with_client(test, seconds=0.05, watch=Watch(late=0.5))


def test_stopping_ends_what_runs_and_leaves_no_process() -> None:
    async def test(client: EngineClient) -> None:
        heard = Heard()
        client.submit([request("r", tokens=400)], heard)
        await heard.until(2)
        pid = client.pid
        assert pid is not None
        await client.stop()
        assert heard.ends["r"].finish is State.ABORT
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    with_client(test, seconds=0.01)


def test_one_that_was_stopped_starts_again_and_its_counters_go_on() -> None:
    async def test(client: EngineClient) -> None:
        said = []
        for _ in range(2):
            heard, asked = Heard(), request("r")
            client.submit([asked], heard)
            await heard.done.wait()
            said.append(heard.tokens["r"])
            while client.stats.running or not client.stats.steps:
                await asyncio.sleep(0.01)
            before = client.past.steps + client.stats.steps
            await client.stop()
            assert client.phase is Phase.STOPPED and client.past.steps == before
            with pytest.raises(WorkerError):
                client.submit([request("s")], Heard())
            client.start()
            await asyncio.wait_for(client.first_ready, 20)
        assert said[0] == said[1] and client.restarts == 0

    with_client(test)
