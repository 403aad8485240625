"""Clients that leave, a model's process that is killed, a server that is told to go: nobody else notices."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, served

FAKE_ENGINE = Path(__file__).resolve().parents[1] / "unit" / "fake_engine.py"


def chat(seed: int, tokens: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me about number {seed}. " * (1 + seed % 4)}]
    scores = {"prompt_logprobs": 1, "logprobs": True} if seed % 4 == 3 else {}
    return {"messages": messages, "seed": seed, "max_tokens": tokens, "ignore_eos": True, **scores, **fields}


def whole(server: Served, seed: int, tokens: int) -> str:
    """The text of an undisturbed run, alone."""
    answer = server.http.post("/v1/chat/completions", json=chat(seed, tokens))
    return str(answer.json()["choices"][0]["message"]["content"])


async def stream(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None) -> tuple[str, str]:
    """The text of a streamed chat and how it ended; `leave_after` so many characters the client hangs up."""
    text, end, scored = "", "", 0
    async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if leave_after is not None and len(text) >= leave_after:
                return text, "left"
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            scored += "prompt_logprobs" in chunk
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                end = choice["finish_reason"] or end
    assert scored == ("prompt_logprobs" in body), "the prompt is scored once, whatever happens in between"
    return text, end


def together(server: Served, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as http:
            return await asyncio.wait_for(work(http), 60)

    return asyncio.run(run())


def test_32_streams_with_random_disconnects(server: Served) -> None:
    """Half of them leave, some at once; all blocks come back, and the others say what they say alone."""
    rng = random.Random(4)
    tokens = 48
    stay = [seed for seed in range(32) if seed % 2]
    alone = {seed: whole(server, seed, tokens) for seed in stay}

    async def work(http: httpx.AsyncClient) -> list[tuple[str, str]]:
        return await asyncio.gather(
            *(
                stream(http, chat(seed, tokens if seed % 2 else 400), None if seed % 2 else rng.randint(0, 30))
                for seed in range(32)
            )
        )

    found = together(server, work)
    server.wait(server.idle)
    assert {seed: found[seed][0] for seed in stay} == alone
    assert all(found[seed][1] == "length" for seed in stay)
    assert [end for _, end in found].count("left") == 16


def test_a_client_that_leaves_a_whole_answer_frees_it_too(server: Served) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        body = {**chat(1, 450), "n": 4}
        leaving = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(6)]
        while len(server.stats()["requests"]) < 24:
            await asyncio.sleep(0.01)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)

    together(server, work)
    server.wait(server.idle)
    text = server.http.get("/metrics").text
    (aborted,) = [
        line for line in text.splitlines() if line.startswith("vllm:request_success_total") and "abort" in line
    ]
    assert float(aborted.split()[-1]) >= 24


def test_kill_stop_and_drain(tiny: Path) -> None:
    """One server for three misfortunes, since each starts a model: kill -9 twice, kill -STOP, and SIGTERM."""
    tokens = 300
    with served(tiny, watch={"late": 1.0, "dead": 2.0, "backoff": 0.05}) as server:
        alone = together(server, lambda http: beside(server, http, tokens, asyncio.sleep(0)))
        assert alone[3][0] == whole(server, 3, tokens)
        for misfortune in (killed_twice, stopped):
            found = together(server, lambda http, m=misfortune: beside(server, http, tokens, m(server, http)))
            assert found == alone, misfortune.__name__
            server.wait(server.idle)
        assert server.stats()["engine_restarts_total"] == 3
        found = together(server, lambda http: beside(server, http, tokens, told_to_leave(server, http)))
        assert found == alone and all(end == "length" for _, end in found)
        assert server.process.wait(timeout=10) == 0
    assert not [line for line in server.log if "Traceback" in line], "".join(server.log)


async def beside(
    server: Served, http: httpx.AsyncClient, tokens: int, misfortune: Awaitable[None]
) -> list[tuple[str, str]]:
    """Eight streams, and what happens to them when each has said something."""
    streams = [asyncio.create_task(stream(http, chat(seed, tokens))) for seed in range(8)]
    rows: list[Any] = []
    while len(rows) < 8 or min(row["output_tokens"] for row in rows) <= 20:
        rows = (await http.get("/stats")).json()["requests"]
        assert not any(task.done() for task in streams), "an answer was over before anything happened to it"
        await asyncio.sleep(0.01)
    await misfortune
    return list(await asyncio.gather(*streams))


async def killed_twice(server: Served, http: httpx.AsyncClient) -> None:
    for _ in range(2):
        victim = server.worker.pid
        os.kill(victim, signal.SIGKILL)
        await replaced(server, http, victim)
        await asyncio.sleep(0.1)


async def stopped(server: Served, http: httpx.AsyncClient) -> None:
    victim = server.worker.pid
    os.kill(victim, signal.SIGSTOP)
    await replaced(server, http, victim)


async def replaced(server: Served, http: httpx.AsyncClient, victim: int) -> None:
    """Until the server has said that it is not ready, and that it is again."""
    await not_ready(http)
    while (await http.get("/readyz")).status_code != 200:
        await asyncio.sleep(0.05)
    assert server.worker.pid != victim


async def not_ready(http: httpx.AsyncClient) -> None:
    while (await http.get("/readyz")).status_code == 200:
        await asyncio.sleep(0.02)


async def told_to_leave(server: Served, http: httpx.AsyncClient) -> None:
    os.kill(server.process.pid, signal.SIGTERM)
    await not_ready(http)
    late = await http.post("/v1/chat/completions", json=chat(9, 5))
    assert late.status_code == 503 and late.headers["retry-after"]
    assert server.process.poll() is None


def test_what_does_not_finish_in_time_is_told_so(tiny: Path) -> None:
    command = [sys.executable, str(FAKE_ENGINE)]
    with served(tiny, drain_seconds=0.5, command=command) as server:

        async def work(http: httpx.AsyncClient) -> tuple[Any, str, httpx.Response]:
            body = {"prompt": "The", "max_tokens": 490}
            waiting = asyncio.create_task(http.post("/v1/completions", json=body))
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                os.kill(server.process.pid, signal.SIGTERM)
                lines = [line async for line in answer.aiter_lines() if line]
            return json.loads(lines[-2].removeprefix("data: ")), lines[-1], await waiting

        last, done, waited = together(server, work)
        assert last["error"]["code"] == "aborted" and done == "data: [DONE]"
        assert waited.status_code == 503 and "going down" in waited.json()["error"]["message"]
        assert server.process.wait(timeout=10) == 0


def test_told_twice_it_leaves_at_once_and_so_does_the_model(tiny: Path) -> None:
    with served(tiny, command=[sys.executable, str(FAKE_ENGINE)]) as server:
        worker = server.worker
        with server.http.stream("POST", "/v1/completions", json={"prompt": "The", "max_tokens": 490, "stream": True}):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=10) == 1
            worker.wait(timeout=10)


def test_a_front_that_is_killed_leaves_no_model_behind(tiny: Path) -> None:
    with served(tiny, command=[sys.executable, str(FAKE_ENGINE)]) as server:
        worker = server.worker
        server.process.kill()
        worker.wait(timeout=5)


def test_a_checkpoint_that_cannot_be_is_said_before_anything_is_served(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(AssertionError, match="CheckpointError"), served(broken):
        pass
