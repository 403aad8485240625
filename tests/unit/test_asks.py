"""Questions to the model's process: answers, errors as errors, deaths, and what each new process is told first."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from test_client import Heard, request, undisturbed, with_client

from twofold.core import CheckpointError, RequestError, WorkerError
from twofold.engine.request import State
from twofold.serve import wire
from twofold.serve.client import EngineClient, Phase
from twofold.serve.config import Watch


async def reborn(client: EngineClient, number: int = signal.SIGKILL) -> None:
    """Kill the process and wait until there is another."""
    old = client.pid
    assert old is not None
    os.kill(old, number)
    while client.pid == old or not client.ready:
        await asyncio.sleep(0.01)


def test_a_question_is_answered_while_requests_run() -> None:
    async def test(client: EngineClient) -> None:
        heard, asked = Heard(), request("r", tokens=60)
        client.submit([asked], heard)
        what = {"text": "é", "numbers": [1, 2**40], "table": {"a": None, "b": 1.5}, "raw": b"\x00\xff"}
        answers = await asyncio.gather(*(client.ask("echo", i=i, **what) for i in range(20)))
        assert answers == [{"i": i, **what} for i in range(20)]
        await heard.done.wait()
        assert heard.tokens["r"] == undisturbed(asked)
        assert not client.asks._open

    with_client(test, seconds=0.005)


def test_errors_come_back_as_errors_and_nobody_dies() -> None:
    async def test(client: EngineClient) -> None:
        pid = client.pid
        with pytest.raises(CheckpointError, match="no CheckpointError today"):
            await client.ask("fail", kind="CheckpointError")
        with pytest.raises(WorkerError, match="RuntimeError: no Surprise today"):
            await client.ask("fail", kind="Surprise")
        with pytest.raises(RequestError, match="did you mean 'echo'"):
            await client.ask("ehco", x=1)
        with pytest.raises(RequestError, match="fail: missing a required argument: 'kind'"):
            await client.ask("fail", colour="red")
        with pytest.raises(WorkerError, match="strange"):
            await client.ask("strange")
        assert (await client.ask("names"))["pid"] == pid and client.restarts == 0

    with_client(test)


def test_a_question_before_the_model_is_an_error() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(WorkerError, match="loading"):
            await client.ask("echo")

    with_client(test, ready=False)


def test_a_question_that_kills_gets_an_error_and_is_not_asked_again() -> None:
    async def test(client: EngineClient) -> None:
        heard, asked = Heard(), request("r", tokens=40)
        client.submit([asked], heard)
        with pytest.raises(WorkerError, match="'die' got no answer"):
            await client.ask("die")
        assert client.phase is not Phase.READY
        assert (await client.ask("echo", later=1)) == {"later": 1}, "asked while it is started again: waits"
        await heard.done.wait()
        assert heard.tokens["r"] == undisturbed(asked) and client.restarts == 1

    with_client(test, seconds=0.005)


def test_an_answer_of_a_dead_process_and_of_a_gone_asker_is_nobodys() -> None:
    async def test(client: EngineClient) -> None:
        waiting = asyncio.create_task(client.ask("sleep", seconds=0.2))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await client.ask("echo", a=1)) == {"a": 1}
        await reborn(client)
        client.asks.told(wire.Told("a0", what={"late": True}))
        client.asks.told(wire.Told("never", "error"))
        assert (await client.ask("echo", b=2)) == {"b": 2}

    with_client(test)


def test_a_question_that_takes_too_long_ends_as_a_step_would() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(WorkerError, match="'sleep' got no answer"):
            await client.ask("sleep", seconds=60.0)
        assert (await client.ask("echo")) == {}

    with_client(test, watch=Watch(step=0.4, backoff=0.05))


def test_each_new_process_is_told_what_stands_before_it_runs_anything() -> None:
    async def test(client: EngineClient) -> None:
        for name in ("one", "two", "three"):
            assert await client.ask("learn", name=name) == {"learned": name}
            client.asks.standing[name] = ("learn", {"name": name})
        del client.asks.standing["two"]
        first = await client.ask("names")
        await reborn(client)
        later = await client.ask("names")
        assert first["names"] == ["one", "two", "three"] and later["names"] == ["one", "three"]
        assert first["pid"] != later["pid"]

    with_client(test)


def test_what_a_new_process_refuses_stands_no_more_and_is_reported() -> None:
    async def test(client: EngineClient) -> None:
        refused: list[tuple[str, Exception]] = []
        client.asks.on_refused = lambda name, error: refused.append((name, error))
        await client.ask("learn", name="one", first=True)
        client.asks.standing["one"] = ("learn", {"name": "one"})
        await reborn(client)
        assert (await client.ask("names"))["names"] == []
        assert [name for name, _ in refused] == ["one"] and isinstance(refused[0][1], CheckpointError)
        assert not client.asks.standing
        heard = Heard()
        client.submit([request("r", tokens=2)], heard)
        await heard.done.wait()
        assert heard.ends["r"].finish is State.LENGTH

    with_client(test, forgetful=True)


def test_stopping_answers_everybody() -> None:
    async def test(client: EngineClient) -> None:
        waiting = [asyncio.create_task(client.ask("sleep", seconds=0.5)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await client.stop()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(answer, WorkerError | dict) for answer in answers)
        with pytest.raises(WorkerError, match="going down"):
            await client.ask("echo")

    with_client(test)


def test_giving_up_answers_everybody() -> None:
    async def test(client: EngineClient) -> None:
        answers = await asyncio.gather(*(client.ask("die") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(answer, WorkerError) for answer in answers)
        while client.phase is not Phase.FAILED:
            with pytest.raises(WorkerError):
                await client.ask("die")
        with pytest.raises(WorkerError, match="could not be kept running"):
            await client.ask("echo")

    with_client(test, watch=Watch(tries=2, backoff=0.01))
