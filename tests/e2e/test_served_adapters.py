"""Adapters through the door: chosen by `model`, loaded and unloaded live, listed, and there again after a crash."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from served import Served, served

from twofold.models import LoraConfig, load, save_adapter
from twofold.models.lora import adapt, pair_parameters

KEY = "operator-key"
ADAPTERS = {"one": (2, 1), "two": (9, 2), "three": (4, 3)}


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("adapters")
    for name, (rank, seed) in ADAPTERS.items():
        decoder = load(tiny)
        adapt(decoder, LoraConfig(rank=rank, alpha=16.0), seed=seed)
        source = torch.Generator().manual_seed(seed)
        for key, parameter in pair_parameters(decoder).items():
            if key.endswith(".b"):
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
        save_adapter(decoder, base / name, str(tiny))
    (base / "empty").mkdir()
    (base / "not.a.directory").write_text("{}")
    (base.parent / "outside").mkdir(exist_ok=True)
    (base / "link").symlink_to(base.parent / "outside")
    return base


@pytest.fixture(scope="module")
def door(tiny: Path, folder: Path) -> Iterator[Served]:
    with served(
        tiny, api_keys=[KEY], lora_dir=str(folder), lora_modules=[f"one={folder / 'one'}"], engine={"max_loras": 2}
    ) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server


def say(server: Served, model: str = "tiny", prompt: str = "The quick", **fields: Any) -> str:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def ask(server: Served, verb: str, **body: Any) -> httpx.Response:
    return server.http.post(f"/v1/{verb}_lora_adapter", json=body)


def names(server: Served) -> list[str]:
    return [model["id"] for model in server.http.get("/v1/models").json()["data"]]


def test_an_adapter_is_a_model_beside_the_model(door: Served, folder: Path) -> None:
    client = openai.OpenAI(base_url=door.url + "/v1", api_key=KEY, http_client=httpx.Client(trust_env=False))
    base, one = client.models.list().data
    assert (base.id, one.id) == ("tiny", "one")
    assert one.model_dump()["parent"] == "tiny" and one.model_dump()["root"] == str(folder / "one")
    assert client.models.retrieve("one").id == "one"
    assert say(door, "one") != say(door)
    given: dict[str, Any] = {
        "model": "one",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "seed": 3,
    }
    whole = client.chat.completions.create(**given, n=2, temperature=0.8)
    said = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**given, n=2, temperature=0.8, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == {choice.index: choice.message.content for choice in whole.choices}


def test_texts_are_not_read_with_adapters(door: Served) -> None:
    answer = door.http.post("/v1/embeddings", json={"model": "one", "input": "x"})
    assert answer.status_code == 400 and "adapters" in answer.json()["error"]["message"]


def test_loaded_and_unloaded_live(door: Served) -> None:
    assert ask(door, "load", lora_name="two", lora_path="two").text == "Success: LoRA adapter 'two' added successfully."
    try:
        assert names(door) == ["tiny", "one", "two"]
        assert len({say(door), say(door, "one"), say(door, "two")}) == 3
        again = ask(door, "load", lora_name="two", lora_path="three")
        assert again.status_code == 400 and "already" in again.json()["error"]["message"]
        before = say(door, "two", prompt="The quick brown fox jumps over the lazy dog " * 3)
        assert ask(door, "load", lora_name="two", lora_path="three", load_inplace=True).status_code == 200
        after = say(door, "two", prompt="The quick brown fox jumps over the lazy dog " * 3)
        assert after != before, "no block of the older weights was found"
        metrics = door.http.get("/metrics").text
        assert 'vllm:lora_requests_info{max_lora="2",running_lora_adapters=""' in metrics
    finally:
        assert ask(door, "unload", lora_name="two").status_code == 200
    assert names(door) == ["tiny", "one"]
    gone = door.http.post("/v1/completions", json={"model": "two", "prompt": "x", "max_tokens": 2})
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"
    assert ask(door, "unload", lora_name="two").status_code == 404


def test_who_runs_when_it_is_unloaded_finishes(door: Served) -> None:
    assert ask(door, "load", lora_name="three", lora_path="three").status_code == 200
    alone = say(door, "three", max_tokens=200, ignore_eos=True)
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(say(door, "three", max_tokens=200, ignore_eos=True)))
    thread.start()
    door.wait(lambda: door.stats()["running"] == 1)
    assert ask(door, "unload", lora_name="three").status_code == 200
    refused = door.http.post("/v1/completions", json={"model": "three", "prompt": "x"})
    thread.join()
    assert refused.status_code == 404 and said == [alone]


def test_adapters_come_back_with_the_process(door: Served) -> None:
    for name in ("two", "three"):
        assert ask(door, "load", lora_name=name, lora_path=name).status_code == 200
    expected = {name: say(door, name, max_tokens=120, ignore_eos=True) for name in ("tiny", *ADAPTERS)}
    said: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda n=name: said.update({n: say(door, n, max_tokens=120, ignore_eos=True)}))
        for name in expected
    ]
    for thread in threads:
        thread.start()
    door.wait(lambda: door.stats()["running"] >= 2)
    for name in ("two", "three"):  # the new process must know them for those who still run, and for nobody else
        assert ask(door, "unload", lora_name=name).status_code == 200
    os.kill(door.worker.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert said == expected
    assert names(door) == ["tiny", "one"] and say(door, "one", max_tokens=120, ignore_eos=True) == expected["one"]
    assert ask(door, "load", lora_name="two", lora_path="two").status_code == 200
    assert say(door, "two", max_tokens=120, ignore_eos=True) == expected["two"]
    assert ask(door, "unload", lora_name="two").status_code == 200


HOSTILE: list[tuple[dict[str, Any], int]] = [
    ({"lora_name": "x", "lora_path": "../outside"}, 400),
    ({"lora_name": "x", "lora_path": "link"}, 400),
    ({"lora_name": "x", "lora_path": "/etc"}, 400),
    ({"lora_name": "x", "lora_path": "."}, 400),
    ({"lora_name": "x", "lora_path": ""}, 400),
    ({"lora_name": "x", "lora_path": "no\u0000thing"}, 400),
    ({"lora_name": "x", "lora_path": "a" * 5000}, 400),
    ({"lora_name": "x", "lora_path": "a/" * 500}, 400),
    ({"lora_name": "x", "lora_path": "empty"}, 400),
    ({"lora_name": "x", "lora_path": "not.a.directory"}, 400),
    ({"lora_name": "tiny", "lora_path": "two"}, 400),
    ({"lora_name": "", "lora_path": "two"}, 400),
    ({"lora_name": "a@b", "lora_path": "two"}, 400),
    ({"lora_name": "a\nb", "lora_path": "two"}, 400),
    ({"lora_name": "n" * 200, "lora_path": "two"}, 400),
    ({"lora_name": "x"}, 400),
    ({"lora_name": 3, "lora_path": "two"}, 400),
    ({"lora_name": "x", "lora_path": ["two"]}, 400),
    ({"lora_name": "x", "lora_path": "two", "surprise": 1}, 400),
]


@pytest.mark.parametrize(("body", "status"), HOSTILE)
def test_hostile_bodies_are_refused(door: Served, body: dict[str, Any], status: int) -> None:
    answer = ask(door, "load", **body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert names(door) == ["tiny", "one"]


def test_nobody_without_a_key_loads(tiny: Path, folder: Path, door: Served) -> None:
    stranger = httpx.post(
        door.url + "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "two"}, trust_env=False
    )
    assert stranger.status_code == 401
    with served(tiny, lora_dir=str(folder)) as open_door:
        refused = ask(open_door, "load", lora_name="two", lora_path="two")
        assert refused.status_code == 403 and "API key" in refused.json()["error"]["message"]
        assert ask(open_door, "unload", lora_name="two").status_code == 403


def test_what_a_server_was_not_told_to_do(tiny: Path, folder: Path) -> None:
    with served(tiny, lora_dir=str(folder), allow_lora_loading=True, engine={"max_lora_rank": 4}) as server:
        assert ask(server, "load", lora_name="one", lora_path="one").status_code == 200
        large = ask(server, "load", lora_name="two", lora_path="two")
        assert large.status_code == 400 and "--max-lora-rank 9" in large.json()["error"]["message"]
        assert say(server, "one") != say(server)
    with served(tiny) as plain:
        refused = ask(plain, "load", lora_name="one", lora_path="one")
        assert refused.status_code == 403 and "--lora-dir" in refused.json()["error"]["message"]


def test_an_adapter_that_cannot_be_loaded_ends_the_start(tiny: Path, folder: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(AssertionError, match=r"adapter_config\.json"),
        served(tiny, lora_modules=[f"x={folder / 'empty'}"]),
    ):
        pass
    assert time.monotonic() - began < 20
