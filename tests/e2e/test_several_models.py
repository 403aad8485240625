"""Several models behind one server, over real processes: chosen by name, swapped in and out, failing alone."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import ROOT, Served, served

PROGRAM = """
import sys, time
sys.path.insert(0, UNIT)
import fake_engine
from twofold.core import CheckpointError
from twofold.serve import worker
said = fake_engine.next_token
def load(start):
    time.sleep(SECONDS)
    if start.model.endswith("broken"):
        raise CheckpointError("these weights are gone")
    if start.model.endswith("other"):
        fake_engine.next_token = lambda request: 1 + (said(request) + 5) % 390
    return fake_engine.load(start)
worker.run(int(sys.argv[1]), load)
"""


def engine(seconds: float) -> list[str]:
    """An engine that is a hash, another one for another model, and loads for so long."""
    unit = repr(str(ROOT / "tests" / "unit"))
    return [sys.executable, "-c", PROGRAM.replace("UNIT", unit).replace("SECONDS", str(seconds))]


@pytest.fixture(scope="module")
def both(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two models, and one that cannot be loaded; room for one at a time."""
    folder = tmp_path_factory.mktemp("models")
    other, broken = (shutil.copytree(tiny, folder / name) for name in ("other", "broken"))
    models = [f"a={tiny}", f"b={other}", f"broken={broken}"]
    with served(tiny, models=models, max_resident=1, command=engine(0.0)) as server:
        yield server


def complete(server: Served, model: str | None, **fields: Any) -> httpx.Response:
    body = {"prompt": "The quick", "max_tokens": 16, "seed": 3, "return_token_ids": True, **fields}
    return server.http.post("/v1/completions", json=body | ({"model": model} if model else {}))


def processes(server: Served) -> int:
    return len(psutil.Process(server.process.pid).children())


def test_each_model_answers_for_itself_one_at_a_time(both: Served, tiny: Path) -> None:
    said = {}
    for turn in ("a", "b", "a", None):
        answer = complete(both, turn)
        assert answer.status_code == 200 and answer.json()["model"] == (turn or "a")
        said.setdefault(turn or "a", []).append(answer.json()["choices"][0]["token_ids"])
        assert processes(both) == 1
    assert said["a"][0] == said["a"][1] == said["a"][2] != said["b"][0]


def test_one_that_cannot_be_loaded_is_refused_alone(both: Served) -> None:
    answer = complete(both, "broken")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert complete(both, "a").status_code == 200
    assert both.http.get("/readyz").status_code == both.http.get("/livez").status_code == 200


def test_all_are_listed_and_an_unknown_one_is_404(both: Served) -> None:
    assert [card["id"] for card in both.http.get("/v1/models").json()["data"]] == ["a", "b", "broken"]
    assert both.http.get("/v1/models/b").json()["id"] == "b"
    answer = complete(both, "c")
    assert answer.status_code == 404 and "'a', 'b', 'broken'" in answer.json()["error"]["message"]
    assert both.http.get("/v1/models/c").status_code == 404


def test_metrics_tell_the_models_apart(both: Served) -> None:
    complete(both, "a")
    complete(both, "b")
    text = both.http.get("/metrics").text
    for name in ("a", "b"):
        (line,) = [
            x
            for x in text.splitlines()
            if x.startswith(f'vllm:generation_tokens_total{{engine="0",model_name="{name}"')
        ]
        assert float(line.split()[-1]) >= 16
    assert text.count("# TYPE vllm:generation_tokens_total") == 1
    assert both.http.get("/stats", params={"model": "b"}).json()["model"] == "b"


def test_clients_of_both_at_once_are_all_answered(both: Served) -> None:
    alone = {name: complete(both, name).json()["choices"][0]["token_ids"] for name in "ab"}
    found: list[tuple[str, Any]] = []

    def ask(name: str) -> None:
        with httpx.Client(base_url=both.url, timeout=60, trust_env=False) as http:
            body = {"prompt": "The quick", "max_tokens": 16, "seed": 3, "return_token_ids": True, "model": name}
            found.append((name, http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]))

    threads = [threading.Thread(target=ask, args=("ab"[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(ids == alone[name] for name, ids in found)


def test_what_needs_no_engine_brings_nothing_in(both: Served) -> None:
    complete(both, "b")
    complete(both, "a")
    pid = both.worker.pid
    assert both.http.post("/tokenize", json={"prompt": "hi", "model": "b"}).status_code == 200
    messages = [{"role": "user", "content": "hi"}]
    assert both.http.post("/v1/messages/count_tokens", json={"model": "b", "messages": messages}).status_code == 200
    assert both.worker.pid == pid


def test_a_stream_is_kept_alive_while_its_model_comes_in(tiny: Path) -> None:
    models = [f"a={tiny}", f"b={tiny}"]
    with served(tiny, models=models, max_resident=1, ping_seconds=0.1, idle_seconds=60, command=engine(0.6)) as server:
        body = {"model": "b", "prompt": "The", "max_tokens": 3, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines.count(": ping") >= 3 and lines[-1] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length" and chunks[0]["model"] == "b"
        body = {"model": "a", "prompt": "The", "max_tokens": 3, "stream": True, "temperature": 9}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:  # too late for a status
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-2][6:])["error"]["param"] == "temperature" and lines[-1] == "data: [DONE]"
        late = complete(server, "b", max_tokens=2)
        assert late.status_code == 200
        answer = server.http.post(
            "/v1/completions", json={"model": "a", "prompt": "x"}, headers={"X-Request-Timeout": "0.1"}
        )
        assert answer.status_code == 504


def test_a_batch_of_two_models_brings_each_in_once(tiny: Path) -> None:
    rows = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions",
         "body": {"model": "ab"[n % 2], "prompt": "x", "max_tokens": 3}}
        for n in range(20)
    ]  # fmt: skip
    with served(tiny, models=[f"a={tiny}", f"b={tiny}"], max_resident=1, command=engine(0.0)) as server:
        data = "\n".join(map(json.dumps, rows)).encode()
        file = server.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x", data)}).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "1h"}
        name = server.http.post("/v1/batches", json=body).json()["id"]
        server.wait(lambda: server.http.get(f"/v1/batches/{name}").json()["status"] == "completed")
        assert server.http.get(f"/v1/batches/{name}").json()["request_counts"]["completed"] == 20
        assert sum("is in memory" in line for line in server.log) == 2
